"""Servers in processes of their own, and clients that note what they get."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from headlong.demo.paths import MODEL_DIR

PATIENCE_S = 60
ENGINE: Mapping[str, object] = {
    "model": str(MODEL_DIR),
    "device": "cpu",
    "kv_cache_memory_bytes": 64 << 20,
    "max_model_len": 2048,
    "max_num_seqs": 8,
}
COMMAND = "from headlong.server.cli import main; main()"


class Server:
    """A server's process, which has printed where it listens.

    Attributes:
        url: Where.
        worker: Process id of its engine.
        log: Lines of its standard error so far.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[str] = []
        self.url = ""
        listening = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(listening,), daemon=True)
        self._reader.start()
        assert listening.wait(PATIENCE_S), "".join(self.log)
        assert self.url, "".join(self.log)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        (self.worker,) = map(int, children.split())

    def _read(self, listening: threading.Event) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if "Listening on " in line:
                self.url = line.split("Listening on ")[1].strip()
                listening.set()
        listening.set()

    def wait(self) -> int:
        """The exit code, once it has ended."""
        return self.process.wait(PATIENCE_S)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE_S)

    def complete(self, **fields: Any) -> httpx.Response:
        return httpx.post(self.url + "/v1/completions", json=body(**fields), timeout=PATIENCE_S)


@contextmanager
def command_server(*flags: str) -> Iterator[Server]:
    """``headlong serve`` with the embedded model."""
    engine = (
        f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items() if name != "model"
    )
    arguments = ["serve", str(MODEL_DIR), "--port=0", "--served-model-name=demo", *engine, *flags]
    with _running([sys.executable, "-c", COMMAND, *arguments], "") as server:
        yield server


@contextmanager
def fault_server(
    faults: Mapping[str, object], server: Mapping[str, object], **engine: object
) -> Iterator[Server]:
    """A server whose engine goes wrong on purpose."""
    settings = {"faults": faults, "server": server, "engine": {**ENGINE, **engine}}
    script = Path(__file__).with_name("fault_server.py")
    with _running([sys.executable, "-P", str(script)], json.dumps(settings)) as running:
        yield running


@contextmanager
def _running(command: list[str], text: str) -> Iterator[Server]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.close()
    try:
        yield Server(process)
    finally:
        process.kill()
        process.wait()


def body(**fields: Any) -> dict[str, Any]:
    least = {"model": "demo", "prompt": "The", "temperature": 0, "ignore_eos": True}
    return {**least, **fields}


class Reader:
    """Reads one stream on a thread of its own.

    Attributes:
        events: The data of its events so far, or the lines of an error.
        status: Of the response.
        headers: Of the response.
        ended: Whether nothing more comes.
    """

    def __init__(self, server: Server, **fields: Any) -> None:
        self.events: list[str] = []
        self.status = 0
        self.headers = httpx.Headers()
        self.ended = False
        self._leaving = False
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read, args=(server, fields), daemon=True)
        self._thread.start()

    def _read(self, server: Server, fields: dict[str, Any]) -> None:
        url, data = server.url + "/v1/completions", body(stream=True, **fields)
        try:
            # A stream that is cut short lacks the last event that a test asks for.
            with (
                suppress(httpx.TransportError),
                httpx.stream("POST", url, json=data, timeout=PATIENCE_S) as response,
            ):
                self.status, self.headers = response.status_code, response.headers
                for line in response.iter_lines():
                    if self._leaving:
                        break
                    if line:
                        with self._news:
                            self.events.append(line.removeprefix("data: "))
                            self._news.notify_all()
        finally:
            with self._news:
                self.ended = True
                self._news.notify_all()

    def leave(self) -> None:
        """Closes the connection at the next event."""
        self._leaving = True

    def wait_events(self, count: int) -> None:
        """Returns when so many events have come."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.events) >= count, PATIENCE_S)

    def wait_end(self) -> str:
        """The last event."""
        with self._news:
            assert self._news.wait_for(lambda: self.ended, PATIENCE_S)
        return self.events[-1]

    def wait_error(self) -> dict[str, Any]:
        """The error that the last event holds."""
        error: dict[str, Any] = json.loads(self.wait_end())["error"]
        return error


def wait_gone(pid: int) -> None:
    """Returns when there is no such process."""
    deadline = time.monotonic() + PATIENCE_S
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    # A zombie has ended; whoever inherited it collects it when it likes.
    return stat.rpartition(")")[2].split()[0] != "Z"
