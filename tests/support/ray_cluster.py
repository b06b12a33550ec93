"""A model behind Ray Serve on this machine, as ``headlong serve-ray`` runs it."""

import asyncio
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from headlong.demo.paths import MODEL_DIR
from support.servers import COMMAND, ENGINE, body

PATIENCE_S = 120
API_KEY = "sesame"


class RayServer:
    """A process of ``headlong serve-ray``.

    Attributes:
        url: Where.
        log: Lines of its standard error so far.
    """

    def __init__(self, process: subprocess.Popen[str], folder: str) -> None:
        self.process = process
        self.log: list[str] = []
        self.url = ""
        self._folder = folder
        self._listening = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def wait_listening(self) -> None:
        """Returns when it serves."""
        assert self._listening.wait(PATIENCE_S), "".join(self.log)
        assert self.url, "".join(self.log)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if "Listening on " in line:
                self.url = line.split("Listening on ")[1].strip()
                self._listening.set()
        self._listening.set()

    def client(self, **headers: str) -> httpx.AsyncClient:
        """A client with the API key."""
        return httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {API_KEY}", **headers},
            timeout=PATIENCE_S,
            limits=httpx.Limits(max_connections=None),
        )

    def processes(self, part: str = "") -> list[int]:
        """Processes of this cluster whose command line has `part`."""
        found: list[int] = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                environment = (folder / "environ").read_bytes()
                if self._folder.encode() in environment and command and part in command:
                    found.append(int(folder.name))
        return sorted(found)


@contextmanager
def ray_server(*flags: str) -> Iterator[RayServer]:
    """Two replicas with the embedded model; nothing is left of them afterwards."""
    # Ray's sockets lie there, and their paths may not be long.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    engine = (
        f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items() if name != "model"
    )
    arguments = [
        "serve-ray", str(MODEL_DIR), "--port=0", "--served-model-name=demo", *engine,
        "--num-replicas=2", "--num-cpus-per-replica=0.25", *flags,
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RAY_TMPDIR": folder,
            # One in the environment leaves no file.
            "RAY_AUTH_TOKEN": secrets.token_hex(),
            "HEADLONG_API_KEY": API_KEY,
        },
        start_new_session=True,
    )
    server = RayServer(process, folder)
    try:
        server.wait_listening()
        yield server
    finally:
        with suppress(subprocess.TimeoutExpired):
            process.terminate()
            process.wait(PATIENCE_S)
        for pid in server.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


class Stream:
    """Reads one streamed completion, in a task of its own.

    Attributes:
        status: Of the response.
        headers: Of the response.
        events: The data of its events so far, or an error's body.
    """

    def __init__(self, client: httpx.AsyncClient, **fields: Any) -> None:
        self.status = 0
        self.headers = httpx.Headers()
        self.events: list[str] = []
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._read(client, fields))

    async def _read(self, client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
        data = body(stream=True, **fields)
        async with client.stream("POST", "/v1/completions", json=data) as response:
            self.status, self.headers = response.status_code, response.headers
            async for line in response.aiter_lines():
                if line:
                    self.events.append(line.removeprefix("data: "))
                    self._news.set()

    @property
    def text(self) -> str:
        """The text of its one completion."""
        return "".join(json.loads(each)["choices"][0]["text"] for each in self.events[:-1])

    async def wait_events(self, count: int) -> None:
        """Returns when so many events have come."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.events) < count and not self._task.done():
                self._news.clear()
                await self._news.wait()
        assert len(self.events) >= count, self.events

    async def leave(self) -> None:
        """Closes the connection."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def wait_end(self) -> str:
        """The last event."""
        await asyncio.wait_for(self._task, PATIENCE_S)
        return self.events[-1]

    async def wait_error(self) -> dict[str, Any]:
        """The error that the last event holds."""
        error: dict[str, Any] = json.loads(await self.wait_end())["error"]
        return error


Samples = dict[tuple[str, tuple[str, ...]], float]


async def scrape(client: httpx.AsyncClient) -> Samples:
    """All samples of `/metrics`, by name and values of the labels but the model's."""
    text = (await client.get("/metrics")).text
    return {
        (
            sample.name.removeprefix("headlong:"),
            tuple(value for name, value in sorted(sample.labels.items()) if name != "model_name"),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scrape_until(client: httpx.AsyncClient, holds: Callable[[Samples], bool]) -> Samples:
    """The first samples for which something holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds(samples := await scrape(client)):
            await asyncio.sleep(0.1)
    return samples
