"""A server whose engine has two ranks: when one goes, all go, and nobody is left behind."""

import os
import signal
from pathlib import Path

from support.servers import Reader, Server, command_server, wait_gone


def follower_of(server: Server) -> int:
    """Process id of rank 1, which the engine started."""
    children = Path(f"/proc/{server.worker}/task/{server.worker}/children").read_text()
    (pid,) = map(int, children.split())
    return pid


def test_a_killed_rank_ends_every_stream_and_the_server() -> None:
    with command_server("--tensor-parallel-size=2") as server:
        rank = follower_of(server)
        readers = [Reader(server, max_tokens=2000) for _ in range(2)]
        for reader in readers:
            reader.wait_events(3)
        metrics = server.get("/metrics").text.splitlines()
        assert len([line for line in metrics if line.startswith("headlong:rank_info")]) == 2
        os.kill(rank, signal.SIGKILL)
        for reader in readers:
            error = reader.wait_error()
            assert error["code"] == "engine_dead"
            assert "rank 1 ended by signal 9" in error["message"]
        assert server.wait() == 1
        wait_gone(server.worker)


def test_a_server_that_is_stopped_lets_its_streams_end() -> None:
    with command_server("--tensor-parallel-size=2") as server:
        rank = follower_of(server)
        reader = Reader(server, max_tokens=60)
        reader.wait_events(3)
        server.process.send_signal(signal.SIGTERM)
        assert reader.wait_end() == "[DONE]"
        assert server.wait() == 0
        wait_gone(server.worker)
        wait_gone(rank)


def test_no_rank_outlives_a_server_that_is_killed() -> None:
    with command_server("--tensor-parallel-size=2") as server:
        rank = follower_of(server)
        assert server.complete(max_tokens=3).status_code == 200
        server.process.kill()
        wait_gone(server.worker)
        wait_gone(rank)
