"""What clients and orchestrators see when the engine, a client or the server itself goes."""

import asyncio
import os
import signal
import socket
from typing import Literal
from urllib.parse import urlsplit

import httpx
import pytest

from headlong.server.async_engine import AsyncEngine
from headlong.server.config import ServerConfig
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.faults import Faults
from headlong.server.engine.request import EngineRequest
from headlong.server.engine_process import EngineProcess
from headlong.server.errors import ConfigError, RequestAbortedError
from headlong.server.start_engine import start_engine
from headlong.server.telemetry.logs import log_config
from support.engines import greedy
from support.servers import (
    ENGINE,
    Reader,
    body,
    command_server,
    fault_server,
    wait_gone,
)

LONG_PROMPT = [10 + index % 50 for index in range(1900)]


def test_a_killed_engine_ends_every_stream_and_the_server() -> None:
    with command_server() as server:
        readers = [Reader(server, max_tokens=2000) for _ in range(5)]
        for reader in readers:
            reader.wait_events(3)
        assert server.get("/health").status_code == server.get("/ready").status_code == 200
        os.kill(server.worker, signal.SIGKILL)
        for reader in readers:
            error = reader.wait_error()
            assert error["code"] == "engine_dead"
            assert "SIGKILL" in error["message"]
        try:
            assert server.get("/health").status_code == 503
            assert server.complete().status_code == 503
        except httpx.TransportError:
            pass  # it has ended already
        assert server.wait() == 1


def test_a_hang_is_found_and_a_long_prefill_is_none() -> None:
    faults = {"slow_step_s": 0.06, "hang_at_step": 40}
    with fault_server(
        faults, {"hang_timeout": 1.0}, max_num_batched_tokens=64, enable_prefix_caching=False
    ) as server:
        # 30 steps that take almost twice the timeout at least, without a token.
        answer = server.complete(prompt=LONG_PROMPT, max_tokens=3)
        assert answer.status_code == 200, answer.text
        reader = Reader(server, max_tokens=500)
        error = reader.wait_error()
        assert error["code"] == "engine_dead"
        assert "no step" in error["message"]
        assert server.wait() == 1
        wait_gone(server.worker)


def test_a_full_queue_and_a_drain() -> None:
    faults = {"slow_step_s": 0.05}
    with fault_server(faults, {"max_num_queued_reqs": 1}, max_num_seqs=1) as server:
        # It alone runs, for 100 seconds if it is let; of the other two one may wait.
        longest = Reader(server, max_tokens=2000)
        longest.wait_events(1)
        others = [Reader(server, max_tokens=5) for _ in range(2)]
        while not (refused := [reader for reader in others if reader.ended]):
            pass
        (refused_one,) = refused
        assert refused_one.status == 429
        assert refused_one.wait_error()["code"] == "queue_full"
        assert 1 <= int(refused_one.headers["Retry-After"]) <= 60
        # A service manager may signal all processes of a service.
        for process in (server.worker, server.process.pid):
            os.kill(process, signal.SIGTERM)
        while server.get("/ready").status_code == 200:
            pass
        assert server.get("/health").status_code == 200
        answer = server.complete()
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "draining"
        assert "Retry-After" in answer.headers
        longest.leave()
        (waiting,) = (reader for reader in others if reader is not refused_one)
        assert waiting.wait_end() == "[DONE]"
        assert server.wait() == 0
        wait_gone(server.worker)


@pytest.mark.parametrize("second_signal", [False, True])
def test_a_drain_that_takes_too_long(second_signal: bool) -> None:
    faults = {"slow_step_s": 0.05}
    with fault_server(faults, {"shutdown_timeout": 1000 if second_signal else 1}) as server:
        readers = [Reader(server, max_tokens=2000) for _ in range(2)]
        for reader in readers:
            reader.wait_events(1)
        server.process.send_signal(signal.SIGTERM)
        if second_signal:
            while server.get("/ready").status_code == 200:
                pass
            server.process.send_signal(signal.SIGTERM)
        for reader in readers:
            assert reader.wait_error()["code"] == "draining"
        assert server.wait() == 0
        wait_gone(server.worker)


def test_a_client_that_does_not_read_is_cut() -> None:
    faults = {"slow_step_s": 0.05}
    with fault_server(faults, {"send_timeout": 0.5}, max_num_seqs=1) as server:
        address = urlsplit(server.url)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((address.hostname, address.port))
            data = body(stream=True, max_tokens=2000, logprobs=5)
            request = httpx.Request("POST", server.url + "/v1/completions", json=data)
            head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
            client.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode())
            client.sendall(request.content)
            client.recv(1)
            # It alone may run, and would for 100 seconds: the next one runs when it is cut.
            assert server.complete(max_tokens=2).status_code == 200
        # The server is killed, and so it cannot end its engine.
        server.process.kill()
        wait_gone(server.worker)


def test_out_of_memory_fails_one_request() -> None:
    async def tokens(engine: AsyncEngine, name: str, prompt: list[int]) -> list[int]:
        found: list[int] = []
        async for output in engine.generate(EngineRequest(name, prompt, greedy(20))):
            found.extend(output.token_ids)
            if output.finish_reason == "abort":
                raise RequestAbortedError(output.error or "")
        return found

    async def scenario() -> None:
        config = EngineConfig(**ENGINE)  # type: ignore[arg-type]
        faults = Faults(out_of_memory_request="victim")
        engine = AsyncEngine(EngineProcess(config, log_config(ServerConfig()), faults))
        await engine.start()
        try:
            alone = await tokens(engine, "alone", [10, 20, 30])
            victim, neighbour = await asyncio.gather(
                tokens(engine, "victim", [40, 50, 60]),
                tokens(engine, "neighbour", [10, 20, 30]),
                return_exceptions=True,
            )
            assert isinstance(victim, RequestAbortedError)
            assert "memory" in victim.message
            assert neighbour == alone
            assert len(alone) == 20
            assert engine.state == "ready"
        finally:
            await engine.shutdown()

    asyncio.run(scenario())


def test_a_configuration_that_cannot_start_is_an_error_here() -> None:
    config = EngineConfig(model="/nowhere", device="cpu")
    with pytest.raises(ConfigError, match="there is no such folder") as caught:
        EngineProcess(config, log_config(ServerConfig()))
    assert caught.value.param == "model"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_progress_bar_is_drawn_among_json_logs(
    log_format: Literal["text", "json"], capfd: pytest.CaptureFixture[str]
) -> None:
    config = EngineConfig(**ENGINE)  # type: ignore[arg-type]
    start_engine(config, ServerConfig(log_format=log_format)).kill()
    assert ("Loading weights" in capfd.readouterr().err) == (log_format == "text")
