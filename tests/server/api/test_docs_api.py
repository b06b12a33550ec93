"""docs/api.md says what the application does."""

import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, TypeAdapter
from starlette.routing import Route
from starlette.testclient import TestClient

from headlong.server.api import unsupported
from headlong.server.api.schemas_chat import ChatRequest
from headlong.server.api.schemas_common import (
    MAX_CACHE_SALT_CHARS,
    MAX_N,
    MAX_STOP,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    Usage,
)
from headlong.server.api.schemas_completions import (
    MAX_PROMPTS,
    CompletionRequest,
    CompletionResponse,
)
from headlong.server.api.schemas_messages import MAX_MESSAGES, MAX_PARTS, MAX_TEMPLATE_KWARGS_BYTES
from headlong.server.api.schemas_responses import (
    MAX_METADATA,
    MAX_METADATA_KEY_CHARS,
    MAX_METADATA_VALUE_CHARS,
    ResponsesRequest,
)
from headlong.server.api.schemas_responses_output import ResponseUsage
from headlong.server.api.schemas_structures import MAX_CHOICES
from headlong.server.api.schemas_tokenize import MAX_DETOKENIZE_TOKENS, DetokenizeRequest
from headlong.server.api.schemas_tools import MAX_TOOLS, MAX_TOOLS_BYTES
from headlong.server.api.serving import MAX_CHOICES as MAX_COMPLETIONS
from headlong.server.app import create_app
from headlong.server.config import ServerConfig
from headlong.server.engine.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STRUCTURE_CHARS,
)
from headlong.server.engine.structured_grammar import MAX_GBNF_RULES, MAX_GRAMMAR_LINES
from headlong.server.errors import HeadlongError
from support.markdown import ROOT, blocks, code_spans, names, prose, rows, section

TEXT = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
SPANS = code_spans(TEXT)
WORDS = {word for span in SPANS for word in re.findall(r"\w+", span)}
MODEL = "headlong-demo"
ADDRESS = "http://127.0.0.1:8000"
NOT_FOR_RESPONSES = "not for responses"


@pytest.fixture
def engine(engine):
    engine.max_model_len = 4096
    return engine


@pytest.fixture
def config():
    return ServerConfig(served_model_name=(MODEL,))


def fields_of(*headings: str) -> dict[str, str]:
    """Each field that the sections' tables list, and the row that lists it."""
    return {
        name: " ".join(cells)
        for heading in headings
        for cells in rows(section(TEXT, heading))
        for name in names(cells[0])
    }


def routes_of(router: Any) -> Iterator[Route]:
    """All routes, those of the routers that FastAPI keeps inside it as well."""
    for each in router.routes:
        if isinstance(each, Route):
            yield each
        else:
            yield from routes_of(each.original_router)


def test_every_route_is_listed(engine, config):
    there = {
        (method, route.path_format)
        for route in routes_of(create_app(engine, config))
        for method in route.methods or ()
        if method != "HEAD" and not route.path.startswith("/page/")
    }
    listed = {
        tuple(span.split(" ")) for span in SPANS if re.match(r"(GET|POST|DELETE|PUT) /", span)
    }
    assert there
    assert listed == there


def test_every_documented_operation_is_listed(client):
    document = client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method in operations:
            assert f"{method.upper()} {path}" in SPANS


@pytest.mark.parametrize(
    ("request_type", "heading"),
    [
        (CompletionRequest, "Completions"),
        (ChatRequest, "Chat completions"),
        (ResponsesRequest, "Responses"),
    ],
)
def test_every_field_is_listed_and_no_other(request_type, heading):
    common = fields_of("Common fields")
    if request_type is ResponsesRequest:
        common = {name: row for name, row in common.items() if NOT_FOR_RESPONSES not in row}
    assert {*common, *fields_of(heading)} == set(request_type.model_fields)


def inner_models(kind: Any) -> set[type[BaseModel]]:
    """All models that a type is made of."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        inside = (inner_models(field.annotation) for field in kind.model_fields.values())
        return {kind}.union(*inside)
    return set().union(*map(inner_models, get_args(kind)))


@pytest.mark.parametrize("request_type", unsupported.REQUESTS, ids=lambda each: each.__name__)
def test_what_lies_inside_a_field_is_named(request_type):
    for model in inner_models(request_type):
        for name, field in model.model_fields.items():
            assert (field.alias or name) in WORDS, (model.__name__, name)


def test_the_tokenizers_fields_are_named_beside_its_routes():
    here = {
        word
        for span in code_spans(section(TEXT, "Tokenizer routes"))
        for word in re.findall(r"\w+", span)
    }
    for request_type in unsupported.REQUESTS[3:]:
        assert set(request_type.model_fields) <= here | {"model"}
    assert DetokenizeRequest in unsupported.REQUESTS[3:]


def test_every_refused_field_is_named():
    tables = (
        unsupported.COMPLETION_FIELDS,
        unsupported.CHAT_FIELDS,
        unsupported.RESPONSES_FIELDS,
        unsupported.STREAM_OPTIONS_FIELDS,
        unsupported.MESSAGE_FIELDS,
    )
    assert not {name for table in tables for name in table} - WORDS


def refused_in(heading: str) -> set[str]:
    """The fields that a section's paragraph lists as refused."""
    paragraph = re.search(r"^Refused .*?(?=^$)", section(TEXT, heading), re.M | re.S)
    assert paragraph
    text = re.split(r"\. |; ", " ".join(paragraph[0].split()))[0]
    return {name for name in names(text) if re.fullmatch(r"\w+", name)} - {"disabled"}


def test_what_every_route_refuses():
    listed = refused_in("Common fields")
    tables = (
        unsupported.COMPLETION_FIELDS,
        unsupported.CHAT_FIELDS,
        unsupported.RESPONSES_FIELDS,
    )
    known = set().union(*(each.model_fields for each in unsupported.REQUESTS))
    assert listed == set.intersection(*map(set, tables)) - known


@pytest.mark.parametrize(
    ("heading", "table", "request_type"),
    [
        ("Chat completions", unsupported.CHAT_FIELDS, ChatRequest),
        ("Responses", unsupported.RESPONSES_FIELDS, ResponsesRequest),
    ],
)
def test_what_a_route_refuses(heading, table, request_type):
    known = set().union(*(each.model_fields for each in unsupported.REQUESTS))
    listed = refused_in(heading)
    assert listed <= set(table)
    listed |= refused_in("Common fields") | refused_in("Chat completions")
    assert set(table) - known <= listed


def _errors(kind=HeadlongError):
    yield str(kind.status), kind.type, kind.code
    for each in kind.__subclasses__():
        yield from _errors(each)


def test_every_error_is_listed_with_its_status_and_type():
    listed = {
        tuple(cell.strip("`") for cell in cells[:3])
        for cells in rows(section(TEXT, "Errors"))
        if cells[2]
    }
    assert listed == {each for each in _errors() if each[2] is not None}


@pytest.mark.parametrize(
    ("heading", "field", "limits"),
    [
        ("Common fields", "n", (MAX_N, MAX_COMPLETIONS)),
        ("Common fields", "stop", (MAX_STOP, MAX_STOP_CHARS)),
        ("Common fields", "stop_token_ids", (MAX_STOP_TOKEN_IDS,)),
        ("Common fields", "logit_bias", (MAX_LOGIT_BIAS,)),
        ("Common fields", "cache_salt", (MAX_CACHE_SALT_CHARS,)),
        ("Completions", "prompt", (MAX_PROMPTS,)),
        ("Completions", "logprobs", (MAX_LOGPROBS,)),
        ("Chat completions", "messages", (MAX_MESSAGES, MAX_PARTS)),
        ("Chat completions", "chat_template_kwargs", (MAX_TEMPLATE_KWARGS_BYTES >> 10,)),
        ("Responses", "input", (MAX_MESSAGES,)),
        (
            "Responses",
            "metadata",
            (MAX_METADATA, MAX_METADATA_KEY_CHARS, MAX_METADATA_VALUE_CHARS),
        ),
        ("Form", "grammar", (MAX_GRAMMAR_LINES, MAX_GBNF_RULES)),
        ("Form", "structured_outputs", (MAX_CHOICES,)),
        ("Tools", "tools", (MAX_TOOLS, MAX_TOOLS_BYTES >> 10)),
    ],
)
def test_limits_are_those_of_the_schemas(heading, field, limits):
    row = fields_of(heading)[field]
    for limit in limits:
        assert re.search(rf"\b{limit}\b", row), limit


def test_limits_outside_of_tables():
    assert f"up to {MAX_STRUCTURE_CHARS} characters" in section(TEXT, "Form")
    assert f"up to {MAX_DETOKENIZE_TOKENS} `tokens`" in section(TEXT, "Tokenizer routes")


def test_every_part_of_the_usage_is_named():
    here = {
        word for span in code_spans(section(TEXT, "Usage")) for word in re.findall(r"\w+", span)
    }
    for model in inner_models(Usage) | inner_models(ResponseUsage):
        assert set(model.model_fields) <= here


def examples() -> list[tuple[str, str]]:
    """Path and body of every request that the page shows."""
    shown = [tuple(block.split("\n", 1)) for block in blocks(TEXT, "http")]
    found = [(first.removeprefix("POST "), body) for first, body in shown]
    for block in blocks(TEXT, "sh"):
        path, body = re.search(rf"{ADDRESS}(\S+).*-d '(.*)'", block, re.S).groups()
        found.append((path, body))
    return found


@pytest.mark.parametrize(("path", "body"), examples())
def test_every_example_is_answered(client, path, body):
    response = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200, response.text
    if json.loads(body).get("stream"):
        assert response.text.endswith("data: [DONE]\n\n")


def test_there_is_an_example_of_every_generating_route():
    generating = {"/v1/completions", "/v1/chat/completions", "/v1/responses"}
    assert generating <= {path for path, _ in examples()}


def test_the_shown_response_is_one():
    (shown,) = blocks(TEXT, "json")
    response = TypeAdapter(CompletionResponse).validate_json(shown)
    assert response.usage is not None


def test_the_program_runs(live, engine, capsys):
    (program,) = blocks(TEXT, "python")
    assert ADDRESS in program
    exec(compile(program.replace(ADDRESS, live), "docs/api.md", "exec"), {})
    assert "Hello" in capsys.readouterr().out
    (request,) = engine.requests
    assert (request.kv_policy.window_size, request.params.top_k) == (1024, 20)


def test_the_events_of_a_response_are_named(client: TestClient, engine):
    body = {"model": MODEL, "input": "hi", "stream": True}
    text = client.post("/v1/responses", json=body).text
    engine.failure, engine.fail_at = "gone", 1
    text += client.post("/v1/responses", json=body).text
    seen = set(re.findall(r"^event: (\S+)$", text, re.M))
    assert {"response.completed", "response.failed", "error"} <= seen
    assert not seen - set(SPANS)


def test_prose_names_no_field_that_is_gone():
    """Every field in a table of the page is one of some request or usage."""
    there = {
        field.alias or name
        for request in (*unsupported.REQUESTS, Usage, ResponseUsage)
        for model in inner_models(request)
        for name, field in model.model_fields.items()
    }
    sections = ("Common fields", "Completions", "Chat completions", "Responses", "Form", "Tools")
    assert not {name for name in fields_of(*sections) if name not in there}
    assert "{response_id}" in prose(TEXT)
