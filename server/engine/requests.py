"""The requests that an engine knows: those that wait, those that run, those being prepared."""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, NamedTuple

from headlong.server.engine.model import LoadedModel
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.request_plan import RequestPlanner
from headlong.server.engine.sampling_params import Structure
from headlong.server.engine.scheduler import Scheduler
from headlong.server.engine.sequence import Sequence
from headlong.server.errors import HeadlongError, InvalidRequestError

if TYPE_CHECKING:
    from headlong.server.engine.structured import CompiledStructure, StructureCompiler

logger = logging.getLogger(__name__)

COMPILE_WAIT_S = 0.02
"""A step without other work waits this long for a structure, so as not to spin."""


class Failure(NamedTuple):
    """Why a request ends before its time."""

    request_id: str
    error: str
    code: str


class Requests:
    """Adds requests to the scheduler once they can run, and ends those whose time is over.

    Args:
        planner: Checks requests.
        scheduler: Runs their sequences.
        model: The model.
        seed: Of requests that bring none of their own.
    """

    def __init__(
        self, planner: RequestPlanner, scheduler: Scheduler, model: LoadedModel, seed: int
    ) -> None:
        self._planner = planner
        self._scheduler = scheduler
        self._model = model
        self._seed = seed
        self._num_requests = 0
        self._live: dict[str, list[Sequence]] = {}
        self._deadlines: dict[str, float] = {}
        self._compiler: StructureCompiler | None = None
        self._compiling: dict[str, Future[CompiledStructure]] = {}

    def __len__(self) -> int:
        return len(self._live)

    @property
    def num_preparing(self) -> int:
        """Completions whose structure is being compiled."""
        return sum(len(self._live[each]) for each in self._compiling)

    def add(self, request: EngineRequest) -> None:
        """Take a request in.

        Raises:
            InvalidRequestError: Its id is in use, or the planner refuses it.
        """
        if request.request_id in self._live:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use")
        plan = self._planner.plan(request)
        structure = request.params.structure
        compiling = None if structure is None else self._compile(structure)
        seed = request.params.seed
        if seed is None:
            seed = (self._seed + self._num_requests) % 2**63
        self._num_requests += 1
        sequences = [
            Sequence(
                request,
                index,
                plan,
                self._model.tokenizer,
                # Python's integers do not wrap around, the generator's 64 bits do.
                seed=(seed + index) % 2**64,
                device=self._model.device,
            )
            for index in range(request.n)
        ]
        sequences[0].park(sequences[1:])
        self._live[request.request_id] = sequences
        if request.timeout_s is not None:
            self._deadlines[request.request_id] = request.arrived + request.timeout_s
        if compiling is None:
            self._scheduler.add(sequences[0])
        else:
            self._compiling[request.request_id] = compiling

    def _compile(self, structure: Structure) -> "Future[CompiledStructure]":
        if self._compiler is None:
            # Only for those who ask for it.
            from headlong.server.engine.structured import StructureCompiler  # noqa: PLC0415

            model = self._model
            self._compiler = StructureCompiler(
                model.tokenizer, model.vocab_size, model.eos_token_ids
            )
        return self._compiler.submit(structure)

    def drop(self, request_id: str) -> list[Sequence]:
        """Forget a request and free its blocks.

        Returns:
            Its completions that had not ended; none if it is not known.
        """
        sequences = self._live.pop(request_id, [])
        self._deadlines.pop(request_id, None)
        compiling = self._compiling.pop(request_id, None)
        if compiling is not None:
            compiling.cancel()
            return sequences
        parked = {id(other) for each in sequences for other in each.take_parked()}
        for sequence in sequences:
            if id(sequence) not in parked:
                self._scheduler.remove(sequence)
        return sequences

    def finish(self, sequence: Sequence) -> None:
        """Forget one completion and free its blocks."""
        left = self._live[sequence.request_id]
        left.remove(sequence)
        if not left:
            del self._live[sequence.request_id]
            self._deadlines.pop(sequence.request_id, None)
        self._scheduler.remove(sequence)

    def collect(self) -> Iterator[Failure]:
        """Queue the requests that can run by now.

        Yields:
            Those that have to be failed: their time is over, or their structure is wrong.
        """
        now = time.monotonic()
        for request_id in [each for each, end in self._deadlines.items() if end <= now]:
            yield Failure(request_id, "the request ran out of time", "deadline_exceeded")
        if self._compiling:
            yield from self._collect_compiled()

    def _collect_compiled(self) -> Iterator[Failure]:
        if not self._scheduler.has_work:
            wait(self._compiling.values(), timeout=COMPILE_WAIT_S, return_when="FIRST_COMPLETED")
        done = [each for each, future in self._compiling.items() if future.done()]
        for request_id in done:
            future = self._compiling[request_id]
            try:
                structure = future.result()
            except HeadlongError as error:
                yield Failure(request_id, error.message, "invalid_structure")
                continue
            except Exception as error:
                # The compiler is other people's, and a request must not end the engine.
                logger.exception("the structure of request %s broke the compiler", request_id)
                yield Failure(request_id, f"its structure failed: {error}", "request_aborted")
                continue
            del self._compiling[request_id]
            first, *_ = sequences = self._live[request_id]
            for sequence in sequences:
                sequence.matcher = structure.matcher()
            self._scheduler.add(first)
