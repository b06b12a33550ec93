"""The way from the event loop to an engine's loop, on a thread here or in a process of its own."""

import asyncio
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from headlong.server.engine.faults import Faults
from headlong.server.engine.loop import CommandQueue, EngineLoop
from headlong.server.engine.messages import Command, Event, Stop
from headlong.server.engine.status import EngineInfo

if TYPE_CHECKING:
    from headlong.server.engine.engine import Engine


class EngineLink(ABC):
    """An engine that is ready, seen from the event loop, which no method ever blocks.

    Attributes:
        info: What the engine is.
        tokenizer: The model's tokenizer.
    """

    info: EngineInfo
    tokenizer: PreTrainedTokenizerBase

    @abstractmethod
    async def start(self, on_event: Callable[[Event], None]) -> None:
        """Let the engine run.

        Args:
            on_event: Called in the running event loop with all that happens, in order. After
                `Failed` nothing that matters follows; `close` and `kill` cause no event.
        """

    @abstractmethod
    def send(self, command: Command) -> None:
        """Pass a command on; it is lost if the engine has died.

        Raises:
            UnicodeEncodeError: A string in it has a lone surrogate.
            OverflowError: An integer in it does not fit 64 bits.
        """

    @abstractmethod
    async def close(self) -> None:
        """Stop the engine after its current step, and wait for that."""

    @abstractmethod
    def kill(self) -> None:
        """Give the engine up, whatever it does; without waiting, and possible at any time."""


class EngineThread(EngineLink):
    """An engine on a thread of this process.

    Args:
        engine: Driven by that thread alone once started.
        faults: What is to go wrong.
    """

    def __init__(self, engine: "Engine", faults: Faults | None = None) -> None:
        self.info = engine.info()
        self.tokenizer = engine.tokenizer
        self._engine = engine
        self._faults = faults
        self._commands: CommandQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def start(self, on_event: Callable[[Event], None]) -> None:
        """Start the thread."""
        event_loop = asyncio.get_running_loop()

        def send(event: Event) -> None:
            event_loop.call_soon_threadsafe(on_event, event)

        loop = EngineLoop(self._engine, self._commands, send, self._faults)
        self._thread = threading.Thread(target=loop.run, name="headlong-engine", daemon=True)
        self._thread.start()

    def send(self, command: Command) -> None:
        """Pass a command on."""
        self._commands.put(command)

    async def close(self) -> None:
        """Stop the thread after its current step, unless it was given up."""
        self._commands.put(Stop())
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def kill(self) -> None:
        """Give the thread up: it cannot be ended from outside, but nobody waits for it."""
        self._commands.put(Stop())
        self._thread = None
