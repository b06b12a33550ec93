"""An engine that says what it is told to, behind the real application."""

import asyncio
import json
import logging
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from headlong.server.engine.status import EngineInfo, EngineStats, GroupInfo, RankInfo
from headlong.server.errors import DrainingError, EngineDeadError
from headlong.server.listen import bind
from headlong.server.telemetry.observer import NoObserver, Observer

MODEL = "fake/model"
TEMPLATE = (
    "{%- for message in messages %}{{- '<' + message.role + '>' + message.content + '</>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<assistant>' + (tone or '') }}{%- endif %}"
)


PIECES = ["Hel", "lo", " wör", "ld"]
FIRST_PIECE_ID = 257
ENCODED_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
INFO = EngineInfo(
    model=MODEL,
    max_model_len=64,
    vocab_size=FIRST_PIECE_ID + len(PIECES),
    max_num_seqs=8,
    block_size=16,
    eos_token_ids=(0,),
    default_sampling={"temperature": 0.5, "top_k": 7},
    head_groups=((0, 1),),
    groups=(
        GroupInfo(
            name="retrieval",
            sink_size=0,
            window_size=None,
            num_heads=1,
            num_blocks=100,
            block_bytes=512,
        ),
        GroupInfo(
            name="streaming",
            sink_size=4,
            window_size=16,
            num_heads=1,
            num_blocks=50,
            block_bytes=512,
        ),
    ),
    full_token_bytes=64,
    device="cpu",
    dtype="float32",
    lines=("layer 0 [bold]RS",),
    ranks=(RankInfo(device="cpu", num_heads=4, num_retrieval_heads=1, kv_bytes=4096),),
    pid=os.getpid(),
)


class FakeTicket:
    """Places in the queue; the engine counts those that were not given back."""

    def __init__(self, engine: "FakeEngine", count: int) -> None:
        self._engine = engine
        self._num_left = count
        engine.num_places += count

    def __enter__(self) -> "FakeTicket":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        self._engine.num_places -= self._num_left
        self._num_left = 0

    def give_back_one(self) -> None:
        assert self._num_left > 0
        self._num_left -= 1
        self._engine.num_places -= 1


class FakeEngine:
    """Streams `pieces`, one a token, and keeps account of its requests.

    Attributes:
        fail_at: Number of tokens after which `failure` is raised or, as text, reported with
            `failure_code`.
        hang_at: Number of tokens after which nothing comes any more.
        refusal: Raised by `admit`.
        cached: Prompt tokens found in the prefix cache, at most.
        misses: The reasons for the others.
        num_places: Places in the queue that were not given back.
        admitted: What `admit` was asked for.
        requests: What `generate` was asked for.
        seen: Of each, its token ids and parameters.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.info = INFO
        self.stats = EngineStats()
        self.observer: Observer = NoObserver()
        self.max_model_len = INFO.max_model_len
        self.vocab_size = INFO.vocab_size
        self.default_sampling = dict(INFO.default_sampling)
        self.pieces = PIECES
        self.fail_at = 0
        self.failure: Exception | str | None = None
        self.failure_code = "request_aborted"
        self.hang_at: int | None = None
        self.refusal: Exception | None = None
        self.cached = 0
        self.misses: dict[str, int] = {}
        self.is_alive = False
        self.is_draining = False
        self.num_places = 0
        self.admitted: list[int] = []
        self.requests: list[EngineRequest] = []
        self.seen: list[tuple[list[int], SamplingParams]] = []
        self.running: set[str] = set()
        self.num_aborted = 0
        self.hanging = threading.Event()
        self.idle = threading.Event()

    @property
    def state(self) -> str:
        if self.is_draining:
            return "draining"
        return "ready" if self.is_alive else "dead"

    async def start(self) -> None:
        self.is_alive = True

    async def shutdown(self) -> None:
        self.is_alive = False

    def kill(self) -> None:
        self.is_alive = False

    async def wait_dead(self) -> None:
        await asyncio.Event().wait()

    def describe(self) -> list[str]:
        return list(self.info.lines)

    def admit(self, count: int) -> FakeTicket:
        if self.refusal is not None:
            raise self.refusal
        if self.is_draining:
            raise DrainingError("the server is shutting down")
        if not self.is_alive:
            raise EngineDeadError("the engine is not running")
        self.admitted.append(count)
        return FakeTicket(self, count)

    async def generate(
        self, request: EngineRequest, ticket: FakeTicket | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        if not self.is_alive:
            raise EngineDeadError("the engine is not running")
        request_id = request.request_id
        assert request_id not in self.running
        self.requests.append(request)
        self.seen.append((list(request.prompt_token_ids), request.params))
        self.running.add(request_id)
        self.idle.clear()
        finished, waits = False, ticket is not None
        try:
            async for output in self._outputs(request):
                if waits and ticket is not None:
                    ticket.give_back_one()
                    waits = False
                finished = output.finish_reason is not None and output.index == request.n - 1
                finished |= output.finish_reason == "abort"
                yield output
        finally:
            if waits and ticket is not None:
                ticket.give_back_one()
            self.running.remove(request_id)
            self.num_aborted += not finished
            if not self.running:
                self.idle.set()

    async def _outputs(self, request: EngineRequest) -> AsyncGenerator[RequestOutput, None]:
        """First that the request left the queue, then each completion's tokens in turn."""
        prompt, params = request.prompt_token_ids, request.params
        cached = min(self.cached, len(prompt) - 1)
        blank = RequestOutput(
            request_id=request.request_id,
            text="",
            token_ids=(),
            logprobs=None,
            finish_reason=None,
            stop_reason=None,
            num_prompt_tokens=len(prompt),
            num_cached_tokens=cached,
            num_completion_tokens=0,
        )
        pieces = self.pieces[: params.max_tokens]
        reason = "length" if len(pieces) < len(self.pieces) else "stop"
        for step, piece in enumerate(pieces):
            await asyncio.sleep(0)
            if self.hang_at == step:
                self.hanging.set()
                await asyncio.Event().wait()
            if step == 0 and not (self.failure is not None and self.fail_at == 0):
                yield replace(blank, queued_s=0.25)
            error = None
            if self.failure is not None and self.fail_at == step:
                if isinstance(self.failure, Exception):
                    raise self.failure
                error = self.failure
            if error is not None:
                yield replace(
                    blank, finish_reason="abort", error=error, error_code=self.failure_code
                )
                return
            last = step == len(pieces) - 1
            token_id = FIRST_PIECE_ID + PIECES.index(piece) if piece in PIECES else step + 1
            for index in range(request.n):
                scored = step == index == 0 and params.prompt_logprobs is not None
                yield replace(
                    blank,
                    index=index,
                    # To the others all but the last token of the prompt is cached by the first.
                    num_cached_tokens=cached if index == 0 else len(prompt) - 1,
                    text=piece,
                    token_ids=(token_id,),
                    logprobs=self._logprobs(token_id, piece, params.logprobs),
                    finish_reason=reason if last else None,
                    stop_reason=2 if last and reason == "stop" else None,
                    num_completion_tokens=step + 1,
                    prompt_logprobs=self.prompt_logprobs(prompt, params) if scored else None,
                    cache_misses=self.misses if last else {},
                    kv_bytes_peak=100 + index if last else 0,
                    kv_bytes_full=300 if last else 0,
                )

    def prompt_logprobs(
        self, prompt: Sequence[int], params: SamplingParams
    ) -> tuple[PositionLogprobs, ...]:
        """A token's log probability is minus its id's hundredth; end comes first in the top."""
        positions: list[PositionLogprobs] = []
        for token_id in prompt[1:]:
            chosen = TokenLogprob(token_id, self.tokenizer.decode([token_id]), -token_id / 100)
            top = (TokenLogprob(0, "<|end|>", -0.125), chosen)
            positions.append(PositionLogprobs(chosen, top[: params.prompt_logprobs]))
        return tuple(positions)

    @staticmethod
    def _logprobs(
        token_id: int, piece: str, count: int | None
    ) -> tuple[PositionLogprobs, ...] | None:
        if count is None:
            return None
        top = [TokenLogprob(token_id, piece, -0.25), TokenLogprob(1, "\ufffd", float("-inf"))]
        return (PositionLogprobs(top[0], tuple(top[:count])),)


@pytest.fixture(autouse=True)
def keep_logging() -> Iterator[None]:
    """Puts back what a server that starts here sets up for its whole process."""
    loggers = [logging.getLogger(name) for name in (None, "headlong", "uvicorn")]
    handlers, levels = list(loggers[0].handlers), [each.level for each in loggers]
    yield
    loggers[0].handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The engine's pieces are only decoded: without merges no text is encoded into them.
    pieces = [ENCODED_BYTES.pre_tokenize_str(piece)[0][0] for piece in PIECES]
    vocab = {token: index for index, token in enumerate(["<|end|>", *alphabet, *pieces])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = ENCODED_BYTES
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerFast) -> Iterator[FakeEngine]:
    tokenizer.chat_template = TEMPLATE
    fake = FakeEngine(tokenizer)
    yield fake
    assert not fake.running, "requests are left on the engine"
    assert not fake.num_places, "places in the queue are left"


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
