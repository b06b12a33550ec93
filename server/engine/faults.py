"""Faults on purpose, for tests: there is no flag and no variable that asks for one."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What is to go wrong.

    Attributes:
        hang_at_step: This step, counted from 1 after the start, never ends.
        crash_at_step: This step raises.
        slow_step_s: Seconds that every step takes longer.
        out_of_memory_request: Every step that computes this request runs out of memory.
    """

    hang_at_step: int | None = None
    crash_at_step: int | None = None
    slow_step_s: float = 0.0
    out_of_memory_request: str | None = None

    def before_step(self, step: int) -> None:
        """Goes wrong in a step.

        Raises:
            RuntimeError: It is the step that crashes.
        """
        if step == self.hang_at_step:
            threading.Event().wait()
        if step == self.crash_at_step:
            raise RuntimeError(f"step {step} was to crash")
        time.sleep(self.slow_step_s)

    def before_forward(self, request_ids: Sequence[str]) -> None:
        """Goes wrong in the forward pass of a batch.

        Raises:
            torch.OutOfMemoryError: The batch has the request that runs out of memory.
        """
        # This module is read before anything slow is imported.
        import torch  # noqa: PLC0415

        if self.out_of_memory_request in request_ids:
            raise torch.OutOfMemoryError("a request was to run out of memory")
