import json
import re
from pathlib import Path

import jsonschema
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from headlong.server.engine.engine import Engine
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampler import sample
from headlong.server.engine.sampling_params import SamplingParams, Structure, StructureKind
from support.engines import build_engine, greedy, run
from support.sequences import make_sequence
from support.structured import TIMEOUT_S, Writer, byte_fallback_tokenizer, serve, text_of
from support.tiny_models import save_byte_tokenizer, save_tiny_model

DEMO = Path(__file__).parents[3] / "demo" / "model"
SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["é", "a/b", 'q"', None]},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 3},
        "left": {"type": "boolean"},
    },
    "required": ["name", "kind", "age", "tags"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "pattern": "^[a-z]{1,3}$"}},
}
JSON = Structure("json_schema", json.dumps(SCHEMA))


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["bytes", "fallback", "demo"])
def writer(request: pytest.FixtureRequest, byte_tokenizer: PreTrainedTokenizerBase) -> Writer:
    if request.param == "bytes":
        return Writer(byte_tokenizer)
    if request.param == "fallback":
        return Writer(byte_fallback_tokenizer(), extra_vocab=61)
    return Writer(AutoTokenizer.from_pretrained(DEMO), extra_vocab=7)


@pytest.fixture(scope="module")
def byte_writer(byte_tokenizer: PreTrainedTokenizerBase) -> Writer:
    return Writer(byte_tokenizer)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build_engine(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


def check_json(text: str, schema: dict[str, object]) -> None:
    jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.7, "temperature": 1.4}])
@pytest.mark.parametrize("seed", range(6))
def test_json_always_validates(writer: Writer, seed: int, params: dict[str, object]) -> None:
    text, reason = writer.write(JSON, seed, **params)
    assert reason == "stop"
    check_json(text, SCHEMA)


@pytest.mark.parametrize("seed", range(4))
def test_any_object(writer: Writer, seed: int) -> None:
    # Random text closes its strings seldom: the bias helps what may end to end.
    bias = {writer.tokenizer.encode(char, add_special_tokens=False)[-1]: 4.0 for char in '"}'}
    text, reason = writer.write(
        Structure("json_object"), seed, max_tokens=3000, logit_bias=bias, temperature=0.8
    )
    assert reason == "stop"
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{3}-[a-f]+x",
        r"(yes|no)/\"?",
        "^a?b$",
        "é☃\n?",
        r"[^a-z]{2,5}",
        "(?i)abc",
        "",
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_regex_matches_the_whole_text(writer: Writer, pattern: str, seed: int) -> None:
    text, reason = writer.write(Structure("regex", pattern), seed, max_tokens=900)
    assert reason == "stop"
    assert re.fullmatch(pattern, text)


LARK = 'start: sum\nsum: NUMBER (" + " NUMBER){0,3}\nNUMBER: /[0-9]{1,3}/\n'
GBNF = '# sums\nroot ::= number (" + " number){0,3}\nnumber ::= [0-9]{1,3}\n'


@pytest.mark.parametrize("text", [LARK, GBNF, f"%llguidance {{}}\n{LARK}"])
@pytest.mark.parametrize("seed", range(3))
def test_grammars(writer: Writer, text: str, seed: int) -> None:
    written, reason = writer.write(Structure("grammar", text), seed)
    assert reason == "stop"
    assert re.fullmatch(r"[0-9]{1,3}( \+ [0-9]{1,3}){0,3}", written)


@pytest.mark.parametrize(
    ("kind", "text", "written"),
    [
        ("regex", "<eos>x", "<eos>x"),
        ("grammar", 'start: "<bos>" "<eos>"', "<bos><eos>"),
        ("json_schema", '{"const": "<eos>"}', '"<eos>"'),
    ],
)
def test_the_name_of_a_special_token_is_text(
    byte_writer: Writer, kind: StructureKind, text: str, written: str
) -> None:
    assert byte_writer.write(Structure(kind, text)) == (written, "stop")


def test_white_space_between_tokens_is_bounded(byte_writer: Writer) -> None:
    """A model that writes white space wherever it may comes to an end all the same."""
    space = dict.fromkeys(byte_writer.tokenizer("  \n\t").input_ids, 100.0)
    text, reason = byte_writer.write(JSON, logit_bias=space, max_tokens=2000)
    assert reason == "stop"
    check_json(text, SCHEMA)
    assert "\n" in text


def test_the_end_comes_only_where_the_structure_may_end(byte_writer: Writer) -> None:
    (eos,) = byte_writer.eos_token_ids
    eager = {eos: 100.0}
    assert byte_writer.write(Structure("regex", "[ab]{3,9}"), logit_bias=eager)[0].isalpha()
    text, reason = byte_writer.write(Structure("regex", "[ab]{3,9}"), logit_bias=eager)
    assert (len(text), reason) == (3, "stop")


@pytest.mark.parametrize("eos_token_ids", [{2, 1}, {1}, set()])
def test_a_model_with_several_ends_or_none(
    byte_tokenizer: PreTrainedTokenizerBase, eos_token_ids: set[int]
) -> None:
    """One that names none ends with the tokenizer's."""
    writer = Writer(byte_tokenizer, eos_token_ids=frozenset(eos_token_ids))
    for seed in range(6):
        text, reason = writer.write(Structure("regex", "[ab]{3}"), seed)
        assert (len(text), reason) == (3, "stop")
    for end in eos_token_ids or {2}:
        text, reason = writer.write(Structure("regex", "[ab]{3,}"), logit_bias={end: 100.0})
        assert (len(text), reason) == (3, "stop")


def test_more_tokens_than_logits(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    writer = Writer(byte_tokenizer, extra_vocab=-1)
    text, reason = writer.write(Structure("regex", "[a-c]{5}"))
    assert (len(text), reason) == (5, "stop")


def test_the_minimum_length_yields_to_a_complete_structure(byte_writer: Writer) -> None:
    regex = Structure("regex", "a|bb|c*")
    assert byte_writer.write(regex, min_tokens=7, max_tokens=9)[0].count("c") >= 7
    end = byte_writer.write(Structure("regex", "(ab)?"), min_tokens=5)
    assert end == ("ab", "stop")
    assert byte_writer.write(Structure("regex", ""), min_tokens=5) == ("", "stop")


def test_ignoring_the_end_does_not_go_beyond_it(byte_writer: Writer) -> None:
    for seed in range(3):
        text, reason = byte_writer.write(Structure("regex", "x{1,4}"), seed, ignore_eos=True)
        assert re.fullmatch("x{1,4}", text)
        assert reason == "stop"


def test_no_bias_and_no_penalty_leads_out_of_the_structure(byte_writer: Writer) -> None:
    away = dict.fromkeys(byte_writer.tokenizer("zq").input_ids, 100.0)
    text, _ = byte_writer.write(
        Structure("regex", "(ab){6}"),
        logit_bias=away,
        repetition_penalty=100.0,
        presence_penalty=2.0,
        frequency_penalty=2.0,
    )
    assert text == "ab" * 6


def test_logprobs_are_the_models_own(byte_writer: Writer) -> None:
    params = SamplingParams(temperature=0.0, logprobs=1)
    sequence = make_sequence(EngineRequest("r", (3,), params), byte_writer.tokenizer)
    (token,) = byte_writer.tokenizer("a").input_ids
    compiled = byte_writer.compiler.submit(Structure("regex", "a")).result(TIMEOUT_S)
    sequence.matcher = compiled.matcher()
    logits = torch.randn(1, byte_writer.vocab_size)
    (sampled,) = sample(logits, [sequence], byte_writer.eos_token_ids)
    own = torch.log_softmax(logits[0], dim=-1)
    assert sampled.token_id == token
    assert sampled.logprob == own[token].item()
    assert sampled.top == ((int(own.argmax()), own.max().item()),)


def test_completions_of_a_structure_are_followed_apart(byte_writer: Writer) -> None:
    compiled = byte_writer.compiler.submit(Structure("regex", "ab|cd")).result(TIMEOUT_S)
    first, second = compiled.matcher(), compiled.matcher()
    a, b, c, d = byte_writer.tokenizer("abcd").input_ids

    def allowed(matcher: object) -> set[int]:
        logits = torch.zeros(byte_writer.vocab_size)
        matcher.mask(logits)  # type: ignore[attr-defined]
        return set(torch.isfinite(logits).nonzero().flatten().tolist())

    first.accept(a)
    assert (allowed(first), allowed(second)) == ({b}, {a, c})
    second.accept(c)
    assert (allowed(first), allowed(second)) == ({b}, {d})
    first.accept(b)
    assert first.finished
    assert not second.finished


def test_an_engine_keeps_each_request_to_its_own_structure(engine: Engine) -> None:
    prompt = [[3, 4, 5]]
    (alone,) = run(engine, prompt, greedy(20))
    asked = {
        "free": greedy(20),
        "json": SamplingParams(max_tokens=400, temperature=0.0, structure=JSON),
        "drawn": SamplingParams(max_tokens=400, seed=3, structure=JSON),
        "regex": SamplingParams(max_tokens=30, seed=4, structure=Structure("regex", "[0-9]{9}")),
    }
    together = serve(engine, asked)
    assert [token for each in together["free"] for token in each.token_ids] == alone
    for name in ("json", "drawn"):
        check_json(text_of(together[name]), SCHEMA)
    assert re.fullmatch("[0-9]{9}", text_of(together["regex"]))
    assert {name: each[-1].finish_reason for name, each in together.items()} == {
        "free": "length",
        "json": "stop",
        "drawn": "stop",
        "regex": "stop",
    }
    for name, params in asked.items():
        apart = serve(engine, {name: params})[name]
        assert text_of(apart) == text_of(together[name])
