"""What an ingress makes of what replicas do, without Ray."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from headlong.server.async_engine import AsyncEngine
from headlong.server.engine.messages import Fault, Lost, Refused, Report
from headlong.server.engine.outputs import RequestOutput
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams
from headlong.server.engine.status import EngineInfo, EngineStats, GroupInfo
from headlong.server.errors import DeadlineExceededError, EngineDeadError, InvalidRequestError
from headlong.server.fleet import link as ray_link
from headlong.server.fleet.link import RayLink
from headlong.server.fleet.messages import Told, encode_told

Script = Callable[[str], AsyncIterator[bytes]]

INFO = EngineInfo(
    model="m", max_model_len=100, vocab_size=100, max_num_seqs=4, block_size=16, eos_token_ids=(),
    default_sampling={}, head_groups=((0,),), full_token_bytes=4, device="cpu", dtype="float32",
    lines=(),
    groups=(GroupInfo(name="g", sink_size=0, window_size=None, num_heads=1, num_blocks=8,
                      block_bytes=64),),
)  # fmt: skip


class Response:
    def __init__(self, messages: AsyncIterator[bytes]) -> None:
        self._messages = messages
        self.cancelled = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._messages

    def cancel(self) -> None:
        self.cancelled = True


class Engines:
    """A deployment's handle: each call of `generate` follows the next script."""

    def __init__(self, *scripts: Script) -> None:
        self._scripts = list(scripts)
        self.responses: list[Response] = []
        self.stats: dict[str, EngineStats] = {}
        self.generate = self

    def options(self, *, stream: bool) -> "Engines":
        assert stream
        return self

    def remote(self, request: bytes, age_s: float, pages: bytes, ingress: str) -> Response:
        assert ingress
        assert age_s >= 0.0
        assert pages == b""
        assert request
        response = Response(self._scripts.pop(0)("r"))
        self.responses.append(response)
        return response

    def broadcast(self, method: str, ingress: str) -> "Engines":
        assert method == "stats"
        assert ingress
        return self

    async def results_async(self, **_: Any) -> list[bytes]:
        if not self.stats:
            raise DeploymentUnavailableError(DeploymentID("engine"))
        return [encode_told(Told(each, Report([], it))) for each, it in self.stats.items()]


def _output(request_id: str, *tokens: int, last: bool = False) -> bytes:
    output = RequestOutput(
        request_id, "x" * len(tokens), tokens, None, "length" if last else None, None, 1, 0,
        len(tokens), queued_s=None if tokens else 0.0,
    )  # fmt: skip
    return encode_told(Told("a", Report([output], EngineStats(steps_total=1, num_running=1))))


async def _whole(request_id: str) -> AsyncIterator[bytes]:
    yield _output(request_id)
    yield _output(request_id, 5, last=True)


async def _dies(request_id: str) -> AsyncIterator[bytes]:
    yield _output(request_id)
    yield _output(request_id, 5)
    raise ActorDiedError


async def _stops(request_id: str) -> AsyncIterator[bytes]:
    yield _output(request_id)


async def _dead_already(request_id: str) -> AsyncIterator[bytes]:
    yield encode_told(Told("a", Refused(request_id, Fault.of(EngineDeadError("dead")))))


async def _dies_under_it(request_id: str) -> AsyncIterator[bytes]:
    yield _output(request_id)
    yield encode_told(Told("a", Lost(request_id, Fault.of(EngineDeadError("killed")))))


async def _refuses(request_id: str) -> AsyncIterator[bytes]:
    yield encode_told(Told("a", Refused(request_id, Fault.of(InvalidRequestError("no", "stop")))))


async def _fails(request_id: str) -> AsyncIterator[bytes]:
    yield b"\xc1 is no message"


async def _is_never_placed(request_id: str) -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield _output(request_id)


async def _waits(request_id: str) -> AsyncIterator[bytes]:
    yield _output(request_id, 5)
    await asyncio.Event().wait()


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_link, "NEXT_ATTEMPT_S", 0.0)
    monkeypatch.setattr(ray_link, "POLL_S", 0.01)


def _engine(engines: Engines) -> AsyncEngine:
    return AsyncEngine(RayLink(engines, INFO, None))  # type: ignore[arg-type]


def _run(engines: Engines, timeout_s: float | None = None) -> list[tuple[int, ...]]:
    async def scenario() -> list[tuple[int, ...]]:
        engine = _engine(engines)
        await engine.start()
        request = EngineRequest("r", [1, 2, 3], SamplingParams(), timeout_s=timeout_s)
        tokens = [output.token_ids async for output in engine.generate(request)]
        assert engine.is_idle
        await engine.shutdown()
        return tokens

    return asyncio.run(scenario())


def test_outputs_come_in_order() -> None:
    assert _run(Engines(_whole)) == [(), (5,)]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (_dies, "the replica that ran the request is gone"),
        (_stops, "the replica that ran the request stopped early"),
        (_dies_under_it, "killed"),
        (_fails, "could not be passed on"),
    ],
)
def test_a_lost_request_fails_alone(script: Script, said: str) -> None:
    engines = Engines(script, _whole)
    with pytest.raises(EngineDeadError, match=said):
        _run(engines)
    # It is not sent again: part of it may have been read.
    assert len(engines.responses) == 1


def test_what_a_dead_engine_never_had_goes_to_another() -> None:
    engines = Engines(_dead_already, _dead_already, _whole)
    assert _run(engines) == [(), (5,)]


def test_it_is_given_up_in_the_end() -> None:
    engines = Engines(*[_dead_already] * ray_link.MAX_ATTEMPTS)
    with pytest.raises(EngineDeadError, match="no replica takes the request"):
        _run(engines)


def test_a_refusal_is_the_engines() -> None:
    with pytest.raises(InvalidRequestError, match="no") as refused:
        _run(Engines(_refuses))
    assert refused.value.param == "stop"


def test_a_request_without_a_replica_runs_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_link, "OVERTIME_S", 0.0)
    engines = Engines(_is_never_placed)
    with pytest.raises(DeadlineExceededError, match="ran out of time") as late:
        _run(engines, timeout_s=0.01)
    assert late.value.param == "timeout"
    assert engines.responses[0].cancelled


def test_a_reader_who_leaves_cancels_the_call() -> None:
    engines = Engines(_waits)

    async def scenario() -> None:
        engine = _engine(engines)
        await engine.start()
        outputs = engine.generate(EngineRequest("r", [1], SamplingParams()))
        await anext(outputs)
        await outputs.aclose()
        while not engines.responses[0].cancelled:
            await asyncio.sleep(0)
        await engine.shutdown()

    asyncio.run(scenario())


def test_stats_are_those_of_all_that_answer() -> None:
    engines = Engines()

    async def scenario() -> None:
        engine = _engine(engines)
        await engine.start()
        engines.stats = {
            "a": EngineStats(steps_total=3, num_running=1, owned_blocks=(2,)),
            "b": EngineStats(steps_total=4, num_running=2, owned_blocks=(5,)),
        }
        while engine.stats.steps_total != 7:
            await asyncio.sleep(0.01)
        assert (engine.stats.num_running, engine.stats.owned_blocks) == (3, (7,))
        assert engine.info.groups[0].num_blocks == 16
        del engines.stats["b"]
        while engine.stats.num_running != 1:
            await asyncio.sleep(0.01)
        assert engine.stats.steps_total == 7
        assert engine.info.groups[0].num_blocks == 8
        engines.stats.clear()
        while engine.stats.num_running:
            await asyncio.sleep(0.01)
        assert engine.is_alive
        await engine.shutdown()

    asyncio.run(scenario())
