"""Structures that are wrong, that cost too much, or that a tokenizer cannot follow."""

import json
import re
from collections.abc import Callable

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from headlong.server.engine import structured_budget
from headlong.server.engine.engine import Engine
from headlong.server.engine.sampling_params import SamplingParams, Structure, StructureKind
from headlong.server.engine.structured import StructureCompiler
from headlong.server.errors import InvalidRequestError
from support.engines import build_engine, greedy
from support.structured import TIMEOUT_S, Writer, byte_fallback_tokenizer, serve, text_of
from support.tiny_models import save_byte_tokenizer, save_tiny_model


@pytest.fixture(scope="module")
def byte_writer(tmp_path_factory: pytest.TempPathFactory) -> Writer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return Writer(AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build_engine(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json_schema", "{", "no JSON Schema"),
        ("json_schema", "[]", "no JSON Schema"),
        ("json_schema", '{"type": "strong"}', "strong"),
        ("json_schema", '{"$ref": "http://127.0.0.1/s.json"}', "127.0.0.1"),
        ("json_schema", '{"$ref": "file:///etc/passwd"}', "passwd"),
        ("json_schema", '{"$ref": "#"}', "refers to itself without end"),
        ("json_schema", '{"enum": []}', "structure cannot be used"),
        ("regex", "(", "unclosed"),
        ("regex", "(?=a)b", "look-around"),
        ("grammar", "", "structure cannot be used"),
        ("grammar", "start: start", "refers to itself without end"),
        ("regex", r"[^\s\S]", "asks for what no text is"),
        ("grammar", "start: x", "x"),
        ("grammar", "root ::= x", "x"),
        ("grammar", 'root ::= "a', "GBNF"),
        ("grammar", 'root ::= "\\', "GBNF"),
        ("regex", "a" * 70_000, "65536"),
        ("regex", "a\0b", "NUL"),
    ],
)
def test_a_bad_structure_says_what_is_wrong(
    byte_writer: Writer, kind: StructureKind, text: str, reason: str
) -> None:
    future = byte_writer.compiler.submit(Structure(kind, text, param="structure"))
    with pytest.raises(InvalidRequestError, match=re.escape(reason)) as caught:
        future.result(TIMEOUT_S)
    assert caught.value.param == "structure"
    assert len(caught.value.message) < 500


def _chain(link: str, length: int) -> str:
    links = [link.replace("NEXT", f"#/$defs/a{index + 1}") for index in range(length)]
    named = ",".join(f'"a{index}":{text}' for index, text in enumerate([*links, "{}"]))
    return f'{{"$ref":"#/$defs/a0","$defs":{{{named}}}}}'


def _rules(line: str, length: int) -> str:
    rules = "".join(line.format(index, index + 1) for index in range(length))
    return f'start: A0 | b0\n{rules}A{length}: "x"\nb{length}: "y"\n'


def _terminals(count: int) -> str:
    rules = "".join(f"A{i}: /.*[a-z]{{{i}}}x.{{{i % 17}}}y/\n" for i in range(count))
    return f"start: {' | '.join(f'A{i}' for i in range(count))}\n{rules}"


# The ways to read it grow with each token, and so does the time for the next.
AMBIGUOUS = 'start: start start start start | start start | "a" | "b"'
HOSTILE: dict[str, tuple[StructureKind, str]] = {
    "nested repetition": ("regex", "((((a{1,100}){1,100}){1,100}){1,100})"),
    "huge repetition": ("regex", "(a|bc){1,1000000000}"),
    "exponential states": ("regex", r"(\w|\s)*a(\w|\s){300}"),
    "ambiguous": ("regex", "(x*)*" * 5000),
    "deep regex": ("regex", "(" * 20_000 + ")" * 20_000),
    "long enum": ("json_schema", json.dumps({"enum": [f"x{i}" * 2 for i in range(4000)]})),
    "huge bounds": ("json_schema", '{"type":"array","minItems":1000000000}'),
    "many steps": ("json_schema", '{"type":"integer","multipleOf":123457,"minimum":1}'),
    "deep schema": ("json_schema", '{"items":' * 6000 + "{}" + "}" * 6000),
    "deep allOf": ("json_schema", _chain('{"allOf":[{"$ref":"NEXT"}]}', 1500)),
    "deep anyOf": ("json_schema", _chain('{"anyOf":[{"$ref":"NEXT"}]}', 1500)),
    "deep properties": ("json_schema", _chain('{"properties":{"x":{"$ref":"NEXT"}}}', 1100)),
    "doubling": (
        "json_schema",
        _chain('{"allOf":[{"$ref":"NEXT"},{"$ref":"NEXT"}]}', 40),
    ),
    "cycle": ("json_schema", '{"$ref":"#/$defs/a","$defs":{"a":{"allOf":[{"$ref":"#/$defs/a"}]}}}'),
    "many optional": (
        "json_schema",
        json.dumps({"properties": {f"p{i}": {"type": "integer"} for i in range(2000)}}),
    ),
    "rule chain": ("grammar", "start: a0\n" + "".join(f"a{i}:a{i + 1}\n" for i in range(990))),
    "terminal chain": ("grammar", _rules('A{0}: A{1}* | "y"\nb{0}: b{1}\n', 490)),
    "too many lines": ("grammar", "\n" * 60_000 + 'start: "a"'),
    "endless grammar": ("grammar", 'start: start start | "a" | ""'),
    "ambiguous grammar": ("grammar", AMBIGUOUS),
    "many terminals": ("grammar", _terminals(300)),
    "deep grammar": ("grammar", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "deep GBNF": ("grammar", "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "many GBNF rules": ("grammar", "root ::= a\n" + "a::=b\n" * 9000),
    "many JSON": ("grammar", "start: " + "%json {} " * 5000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_structure_costs_little(byte_writer: Writer, name: str) -> None:
    """It is refused, or written, or given up; it neither hangs nor takes the process down."""
    kind, text = HOSTILE[name]
    structure = Structure(kind, text)
    longest = max(map(len, byte_writer.tokenizer.get_vocab()))
    try:
        written, _ = byte_writer.write(structure, max_tokens=300)
    except InvalidRequestError as error:
        assert len(error.message) < 500
    else:
        assert len(written) <= 300 * longest


def _object(prefix: str, count: int) -> dict[str, object]:
    kinds = ("string", "integer", "boolean", "number")
    names = {f"{prefix}{index}": {"type": kinds[index % 4]} for index in range(count)}
    return {"type": "object", "properties": names, "additionalProperties": False}


LARGE: dict[str, dict[str, object]] = {
    "nested": {"type": "object", "properties": {f"n{i}": _object("p", 50) for i in range(9)}},
    "optional": {**_object("p", 400), "required": ["p399"]},
    "enum": {"type": "array", "items": {"enum": [f"x{i * 7919}" for i in range(500)]}},
    "anyOf": {"anyOf": [_object(f"p{i}_", 20) for i in range(20)]},
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_schema_is_within_the_bounds(byte_writer: Writer, name: str) -> None:
    bias = {byte_writer.tokenizer.encode(char)[-1]: 6.0 for char in '"}]'}
    schema = LARGE[name]
    text, reason = byte_writer.write(
        Structure("json_schema", json.dumps(schema)), max_tokens=6000, logit_bias=bias
    )
    assert reason == "stop"
    jsonschema.validate(json.loads(text), schema)


def test_a_grammar_whose_tokens_take_ever_longer_ends_its_request(byte_writer: Writer) -> None:
    never = dict.fromkeys(byte_writer.eos_token_ids, -100.0)
    with pytest.raises(InvalidRequestError, match=r"too long to follow|many items|Current row"):
        byte_writer.write(Structure("grammar", AMBIGUOUS), max_tokens=900, logit_bias=never)


def test_the_completions_of_a_request_share_its_time(
    byte_writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = byte_writer.compiler.submit(Structure("regex", "a{9}")).result(TIMEOUT_S)
    first, second = compiled.matcher(), compiled.matcher()
    logits = torch.zeros(byte_writer.vocab_size)
    monkeypatch.setattr(structured_budget, "FOLLOWING_S", 0.0)
    monkeypatch.setattr(structured_budget, "FOLLOWING_S_PER_TOKEN", 0.0)
    first.mask(logits)
    with pytest.raises(InvalidRequestError, match="too long to follow"):
        second.mask(logits)


def test_following_a_token_takes_of_the_time_and_allows_more(
    byte_writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = byte_writer.compiler.submit(Structure("regex", "a{9}")).result(TIMEOUT_S)
    monkeypatch.setattr(structured_budget, "FOLLOWING_S", 0.0)
    monkeypatch.setattr(structured_budget, "FOLLOWING_S_PER_TOKEN", 0.0)
    matcher = compiled.matcher()
    (token,) = byte_writer.tokenizer("a").input_ids
    matcher.accept(token)
    logits = torch.zeros(byte_writer.vocab_size)
    with pytest.raises(InvalidRequestError, match="for 1 tokens"):
        matcher.mask(logits)
    monkeypatch.setattr(structured_budget, "FOLLOWING_S_PER_TOKEN", 1000.0)
    matcher.mask(logits)
    assert torch.isfinite(logits).nonzero().flatten().tolist() == [token]


def test_a_token_that_does_not_follow_is_told_by_the_next_mask(byte_writer: Writer) -> None:
    compiled = byte_writer.compiler.submit(Structure("regex", "ab")).result(TIMEOUT_S)
    matcher = compiled.matcher()
    matcher.accept(byte_writer.tokenizer("z").input_ids[0])
    assert not matcher.finished
    with pytest.raises(InvalidRequestError):
        matcher.mask(torch.zeros(byte_writer.vocab_size))


class SlowTokenizer(PreTrainedTokenizerBase):
    def __len__(self) -> int:
        return 9


def words_alone() -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<e>": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")


def endless() -> PreTrainedTokenizerBase:
    tokenizer = byte_fallback_tokenizer().backend_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [SlowTokenizer, words_alone, endless])
def test_a_tokenizer_that_cannot_be_followed_fails_the_request(
    make: Callable[[], PreTrainedTokenizerBase],
) -> None:
    compiler = StructureCompiler(make(), 9, frozenset())
    with pytest.raises(InvalidRequestError, match="tokenizer") as caught:
        compiler.submit(Structure("json_object", param="response_format")).result(TIMEOUT_S)
    assert caught.value.param == "response_format"


def test_an_engine_ends_those_alone_whose_structures_fail(engine: Engine) -> None:
    def under(kind: StructureKind, text: str) -> SamplingParams:
        return SamplingParams(max_tokens=40, min_tokens=40, structure=Structure(kind, text))

    asked = {
        "bad": under("regex", "("),
        # Too much to work out, but not before its second token.
        "late": under("regex", "a((((a{1,100}){1,100}){1,100}){1,100})"),
        "good": under("regex", "[xy]{30}"),
        "free": greedy(20),
    }
    outputs = serve(engine, asked)
    for name in ("bad", "late"):
        assert outputs[name][-1].finish_reason == "abort"
        assert outputs[name][-1].error
        assert outputs[name][-1].error_code == "invalid_structure"
    assert len(outputs["late"]) > 1
    assert re.fullmatch("[xy]{30}", text_of(outputs["good"]))
    assert len([token for each in outputs["free"] for token in each.token_ids]) == 20
