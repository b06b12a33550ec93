"""The engine's loop: commands first, then a step, for ever."""

import logging
import queue
from collections.abc import Callable
from typing import TYPE_CHECKING

from headlong.server.engine.faults import Faults
from headlong.server.engine.messages import (
    Abort,
    Add,
    Command,
    Event,
    Failed,
    Fault,
    Refused,
    Report,
    Stop,
)
from headlong.server.engine.outputs import RequestOutput
from headlong.server.errors import EngineDeadError, HeadlongError

if TYPE_CHECKING:
    from headlong.server.engine.engine import Engine

logger = logging.getLogger(__name__)

CommandQueue = queue.SimpleQueue[Command]


class EngineLoop:
    """Drives an engine by commands and reports every step.

    Args:
        engine: Driven by the caller of `run` alone.
        commands: What is asked; read until it is empty before every step.
        send: Takes what happens, in order. May block, and then holds the engine up.
        faults: What is to go wrong.
    """

    def __init__(
        self,
        engine: "Engine",
        commands: CommandQueue,
        send: Callable[[Event], None],
        faults: Faults | None = None,
    ) -> None:
        self._engine = engine
        self._commands = commands
        self._send = send
        self._faults = faults
        self._num_steps = 0
        self._unreported = True
        if faults is not None and faults.out_of_memory_request is not None:
            engine.before_forward = faults.before_forward

    def run(self) -> bool:
        """Run until `Stop`, or until the engine fails, which is reported and logged.

        Returns:
            Whether it stopped because it was asked to.
        """
        resting = False
        try:
            while self._obey(wait=resting):
                resting = not (self._step() if self._engine.has_work else self._idle())
        except Exception as error:
            logger.exception("the engine died")
            death = EngineDeadError("the engine stopped on an unexpected error")
            if isinstance(error, EngineDeadError):
                death = error
            self._send(Failed(Fault.of(death)))
            return False
        return True

    def _obey(self, *, wait: bool) -> bool:
        """Carry out what was asked; False to stop.

        Args:
            wait: Until something is asked.
        """
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            match command:
                case Stop():
                    return False
                case Abort(request_id):
                    self._engine.abort(request_id)
                    self._unreported = True
                case Add():
                    self._add(command)

    def _add(self, command: Add) -> None:
        request_id = command.request.request_id
        try:
            self._engine.add_request(command.request)
        except HeadlongError as error:
            self._send(Refused(request_id, Fault.of(error)))
        except Exception:
            # One request that nobody foresaw must not end the others.
            logger.exception("request %s could not be queued", request_id)
            self._engine.abort(request_id)
            unforeseen = HeadlongError("the engine could not take the request")
            self._send(Refused(request_id, Fault.of(unforeseen)))

    def _step(self) -> bool:
        self._num_steps += 1
        if self._faults is not None:
            self._faults.before_step(self._num_steps)
        # Sent even without outputs: that a long prompt makes progress is seen by it.
        self._report(self._engine.step())
        return True

    def _idle(self) -> bool:
        """Do background work, if there is some; False if there is none."""
        if self._engine.idle_step():
            self._report([])
            return True
        if self._unreported:
            self._report([])
        return False

    def _report(self, outputs: list[RequestOutput]) -> None:
        self._send(Report(outputs, self._engine.stats()))
        self._unreported = False
