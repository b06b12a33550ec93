"""An engine that says what it is told to, behind the real application."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headlong.server.app import create_app
from headlong.server.config import ServerConfig
from headlong.server.engine.outputs import PositionLogprobs, RequestOutput, TokenLogprob
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams
from headlong.server.errors import EngineDeadError
from headlong.server.listen import bind

MODEL = "fake/model"
TEMPLATE = (
    "{%- for message in messages %}{{- '<' + message.role + '>' + message.content + '</>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<assistant>' + (tone or '') }}{%- endif %}"
)


class FakeEngine:
    """Streams `pieces`, one a token, and keeps account of its requests.

    Attributes:
        fail_at: Number of outputs after which `failure` is raised or, as text, reported.
        hang_at: Number of outputs after which nothing comes any more.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = 64
        self.vocab_size = len(tokenizer)
        self.default_sampling: dict[str, float | int] = {"temperature": 0.5, "top_k": 7}
        self.pieces = ["Hel", "lo", " wör", "ld"]
        self.fail_at = 0
        self.failure: Exception | str | None = None
        self.hang_at: int | None = None
        self.is_alive = False
        self.seen: list[tuple[list[int], SamplingParams]] = []
        self.running: set[str] = set()
        self.num_aborted = 0
        self.hanging = threading.Event()
        self.idle = threading.Event()

    async def start(self) -> None:
        self.is_alive = True

    async def shutdown(self) -> None:
        self.is_alive = False

    async def wait_dead(self) -> None:
        await asyncio.Event().wait()

    def describe(self) -> list[str]:
        return ["layer 0 [bold]RS"]

    async def generate(self, request: EngineRequest) -> AsyncGenerator[RequestOutput, None]:
        request_id, prompt_token_ids = request.request_id, request.prompt_token_ids
        params = request.params
        if not self.is_alive:
            raise EngineDeadError("the engine is not running")
        assert request_id not in self.running
        self.seen.append((list(prompt_token_ids), params))
        self.running.add(request_id)
        self.idle.clear()
        finished = False
        try:
            pieces = self.pieces[: params.max_tokens]
            for index, piece in enumerate(pieces):
                await asyncio.sleep(0)
                if self.hang_at == index:
                    self.hanging.set()
                    await asyncio.Event().wait()
                error = None
                if self.failure is not None and self.fail_at == index:
                    if isinstance(self.failure, Exception):
                        raise self.failure
                    error = self.failure
                last = index == len(pieces) - 1
                reason = "length" if len(pieces) < len(self.pieces) else "stop"
                finished = last or error is not None
                yield RequestOutput(
                    request_id=request_id,
                    text=piece,
                    token_ids=(index,),
                    logprobs=self._logprobs(piece, params.logprobs),
                    finish_reason="abort" if error else reason if last else None,
                    stop_reason=2 if last and reason == "stop" else None,
                    num_prompt_tokens=len(prompt_token_ids),
                    num_cached_tokens=0,
                    num_completion_tokens=index + 1,
                    error=error,
                )
        finally:
            self.running.remove(request_id)
            self.num_aborted += not finished
            if not self.running:
                self.idle.set()

    @staticmethod
    def _logprobs(piece: str, count: int | None) -> tuple[PositionLogprobs, ...] | None:
        if count is None:
            return None
        top = [TokenLogprob(0, piece, -0.25), TokenLogprob(1, "\ufffd", float("-inf"))]
        return (PositionLogprobs(top[0], tuple(top[:count])),)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(["<|end|>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerFast) -> Iterator[FakeEngine]:
    tokenizer.chat_template = TEMPLATE
    fake = FakeEngine(tokenizer)
    yield fake
    assert not fake.running, "requests are left on the engine"


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig(served_model_name=(MODEL, "alias"), max_body_bytes=200_000)


@pytest.fixture
def client(engine: FakeEngine, config: ServerConfig) -> Iterator[TestClient]:
    with TestClient(create_app(engine, config), raise_server_exceptions=False) as test_client:
        yield test_client


@pytest.fixture
def post(client: TestClient) -> Callable[..., Any]:
    """Posts to an endpoint, with the least that it needs, and what is given on top."""
    least = {
        "/v1/completions": {"model": MODEL, "prompt": "hi"},
        "/v1/chat/completions": {
            "model": MODEL,
            "messages": [{"role": "user", "content": "hi"}],
        },
    }

    def send(path: str, **fields: Any) -> Any:
        body = {**least[path], **fields}
        return client.post(
            path, content=json.dumps(body), headers={"content-type": "application/json"}
        )

    return send


@pytest.fixture
def events() -> Callable[[str], list[Any]]:
    """Reads the events of a stream; the end mark is the string "[DONE]"."""

    def read(text: str) -> list[Any]:
        blocks = text.split("\n\n")
        assert blocks.pop() == ""
        assert all(block.startswith("data: ") for block in blocks)
        payloads = [block.removeprefix("data: ") for block in blocks]
        return [each if each == "[DONE]" else json.loads(each) for each in payloads]

    return read


@pytest.fixture
def live(engine: FakeEngine, config: ServerConfig) -> Iterator[str]:
    """The URL of a real server, in a thread."""
    with _serving(create_app(engine, config)) as url:
        yield url


@contextmanager
def _serving(app: Any) -> Iterator[str]:
    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            started.set()

    server = Server(uvicorn.Config(app, http="h11", log_level="error", lifespan="on"))
    with bind("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        assert started.wait(20)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
