import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headlong.demo.paths import MODEL_DIR
from headlong.loadtest.hub_tokenizer import load_tokenizer
from headlong.loadtest.tokens import WordTokenizer
from headlong.loadtest.trace import trace
from headlong.loadtest.workload import Message, Session, Turn, Workload

WORDS = WordTokenizer()


def write(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def test_prompts_come_at_their_times(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"timestamp": 100, "prompt": "Once", "max_tokens": 5},
        {"timestamp": 100, "prompt": "upon é", "max_tokens": 6, "expected": "time", "id": 7},
        {"timestamp": 103.5, "prompt": "a", "max_tokens": 7, "expected": None},
    )
    assert trace(path, WORDS) == Workload(
        "trace",
        [
            Session((Turn("Once", 5),), 0.0),
            Session((Turn("upon é", 6, "time"),), 0.0),
            Session((Turn("a", 7),), 3.5),
        ],
    )


def test_messages_before_the_last_are_history(tmp_path: Path) -> None:
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi", "name": "Ann"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Who?"},
    ]
    path = write(tmp_path, {"timestamp": 0, "messages": said})
    workload = trace(path, WORDS, output_len=9)
    history = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", ""))
    assert workload.chat
    assert not workload.ignore_eos
    assert workload.sessions == [Session((Turn("Who?", 9),), 0.0, history)]


def test_times_follow_the_unit_and_the_speed(tmp_path: Path) -> None:
    path = write(tmp_path, *({"timestamp": time, "prompt": "a"} for time in (1000, 3000, 4000)))

    def starts(**options: Any) -> list[float | None]:
        return [session.start_s for session in trace(path, WORDS, **options).sessions]

    assert starts() == [0, 2000, 3000]
    assert starts(timestamp_unit="ms") == [0, 2, 3]
    assert starts(timestamp_unit="ms", speed=0.5) == [0, 4, 6]
    assert starts(speed=1000) == [0, 2, 3]
    assert starts(num_prompts=2) == [0, 2000]


def test_mooncake_requests_share_what_their_hash_ids_say(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"timestamp": 0, "input_length": 40, "output_length": 3, "hash_ids": [0, 1, 2]},
        {"timestamp": 500, "input_length": 35, "output_length": 4, "hash_ids": [0, 1, 3]},
        {"timestamp": 1500, "input_length": 32, "output_length": 1, "hash_ids": [0, 1]},
        {"timestamp": 1500, "input_length": 7, "output_length": 1, "hash_ids": ["x"]},
        {"timestamp": 1500, "input_length": 20, "output_length": 1, "hash_ids": [0, 4]},
    )
    tokenizer = load_tokenizer(str(MODEL_DIR))
    workload = trace(path, tokenizer, block_size=16)
    assert (workload.chat, workload.ignore_eos, workload.approximate_lengths) == (
        False,
        True,
        False,
    )
    assert [session.start_s for session in workload.sessions] == [0, 0.5, 1.5, 1.5, 1.5]
    turns = [session.turns[0] for session in workload.sessions]
    assert [turn.max_tokens for turn in turns] == [3, 4, 1, 1, 1]
    first, second, third, other, last = (tokenizer.encode(turn.prompt) for turn in turns)
    assert [len(each) for each in (first, second, third, other, last)] == [40, 35, 32, 7, 20]
    assert first[:32] == second[:32] == third
    assert first[32] != second[32]
    assert other[0] != first[0]
    assert last[:16] == first[:16]
    assert last[16] != first[16]
    assert trace(path, tokenizer, block_size=16) == workload
    assert trace(path, tokenizer, block_size=16, seed=1) != workload
    assert trace(path, WORDS, block_size=16).approximate_lengths
    assert trace(path, WORDS, block_size=16, timestamp_unit="s").sessions[1].start_s == 500


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.text("ab", min_size=1)), min_size=1))
def test_a_trace_keeps_order_gaps_and_prompts(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[int, str]]
) -> None:
    requests.sort(key=lambda request: request[0])
    path = write(
        tmp_path_factory.mktemp("trace"),
        *({"timestamp": time, "prompt": text} for time, text in requests),
    )
    sessions = trace(path, WORDS).sessions
    assert [session.turns[0].prompt for session in sessions] == [text for _, text in requests]
    assert [session.start_s for session in sessions] == [t - requests[0][0] for t, _ in requests]


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\r\n{"timestamp": 0, "prompt": "a"}\r\n\n  \n')
    assert len(trace(path, WORDS).sessions) == 1


def line_of(**changes: Any) -> bytes:
    fields = {"timestamp": 5, "prompt": "a", "max_tokens": 1} | changes
    return json.dumps({name: value for name, value in fields.items() if value != "gone"}).encode()


def mooncake(**changes: Any) -> bytes:
    fields = {"input_length": 600, "output_length": 1, "hash_ids": [1, 2]} | changes
    return line_of(prompt="gone", max_tokens="gone", **fields)


def chat(*messages: object) -> bytes:
    return line_of(prompt="gone", messages=list(messages))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"is not JSON: .* \(column 2\)"),
        (b"[" * 100_000, "is not JSON that can be read: nested too deep"),
        (b"[1]", "holds a list, not a JSON object"),
        (b"\xff", "is not UTF-8 text: invalid start byte"),
        (b'{"timestamp": NaN, "prompt": "a"}', "holds NaN, which is not a finite number"),
        (b'{"timestamp": 1e999, "prompt": "a"}', "timestamp must be a finite number, got Infinity"),
        (line_of(timestamp=10**400), "timestamp must be a finite number, got 1000"),
        (line_of(timestamp=True), "timestamp must be a finite number, got true"),
        (line_of(timestamp="5"), 'timestamp must be a finite number, got "5"'),
        (line_of(timestamp=None), "timestamp must be a finite number, got null"),
        (line_of(timestamp="gone"), "has no timestamp"),
        (line_of(timestamp=-1), "timestamp must be at least 0 and finite, got -1"),
        (line_of(timestamp=4), "timestamp 4.0 is before the last one's, 5.0"),
        (line_of(prompt="gone"), "has none of prompt, messages, input_length"),
        (line_of(messages=[]), "has prompt and messages, of which only one is allowed"),
        (line_of(output_length=1), "has max_tokens and output_length, of which only one"),
        (line_of(prompt=["a"]), r'prompt must be a text that is not empty, got \["a"\]'),
        (line_of(prompt=""), "prompt must be a text that is not empty"),
        (line_of(prompt="\ud800"), "prompt holds half of a surrogate pair"),
        (line_of(max_tokens=0), "max_tokens must be 1 to 100000000, got 0"),
        (line_of(max_tokens=1.0), r"max_tokens must be a whole number of tokens, got 1\.0"),
        (line_of(max_tokens=True), "max_tokens must be a whole number of tokens, got true"),
        (line_of(expected=3), "expected must be a text that is not empty, got 3"),
        (line_of(max_tokens="gone"), "has prompt and no length, where the lines before have"),
        (chat({"role": "user", "content": "a"}), "has messages and max_tokens, where the lines"),
        (chat(), "messages must be a list that is not empty"),
        (chat("a"), r'messages\[0\] must be an object, got "a"'),
        (chat({"content": "a"}), r"messages\[0\].role must be one of .*, got null"),
        (chat({"role": "tool", "content": "a"}), r"messages\[0\].role must be one of .*tool"),
        (chat({"role": "user", "content": [1]}), r"messages\[0\].content must be a text, got \[1"),
        (chat({"role": "system", "content": "a"}), "the last message must be the user's"),
        (mooncake(hash_ids="gone"), "has no hash_ids"),
        (mooncake(hash_ids=1), "hash_ids must be a list, got 1"),
        (mooncake(hash_ids=[1, 2.5]), "hash_ids must be whole numbers or texts, got 2.5"),
        (mooncake(hash_ids=[1]), "600 tokens are 2 blocks of 512, but hash_ids has 1"),
        (mooncake(input_length=-3), "input_length must be 1 to 100000000, got -3"),
        (mooncake(output_length=10**9), "output_length must be 1 to 100000000, got 1000000000"),
    ],
)
def test_a_broken_line_is_named_with_what_is_wrong(
    tmp_path: Path, line: bytes, message: str
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(line_of() + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"^{path}:3: {message}") as raised:
        trace(path, WORDS)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < len(str(path)) + 300


def test_a_file_that_holds_nothing_or_is_none_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(ValueError, match=rf"^{empty}: holds no request"):
        trace(empty, WORDS)
    with pytest.raises(ValueError, match=rf"^{tmp_path}: cannot be read: Is a directory"):
        trace(tmp_path, WORDS)
    with pytest.raises(ValueError, match=r"gone.jsonl: cannot be read: No such file"):
        trace(tmp_path / "gone.jsonl", WORDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 0}, "num_prompts must be at least 1, got 0"),
        ({"output_len": 0}, "output_len must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"speed": 0.0}, "speed must be above 0 and finite, got 0.0"),
        ({"speed": float("nan")}, "speed must be above 0 and finite, got nan"),
    ],
)
def test_a_bad_option_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = write(tmp_path, {"timestamp": 0, "prompt": "a"})
    with pytest.raises(ValueError, match=f"^{message}"):
        trace(path, WORDS, **options)
