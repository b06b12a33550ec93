"""One pass of the model over the chunks of a step."""

import logging
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from headlong.kernels.batch import AttentionBatch
from headlong.server.engine.batch import build_attention_batch, packed_positions
from headlong.server.engine.runner import LocalRunner, Runner
from headlong.server.engine.scheduler import ScheduledChunk
from headlong.server.engine.selection import SelectionRule
from headlong.server.engine.token_reports import PromptRows, prompt_rows

if TYPE_CHECKING:
    from headlong.server.engine.decode_graphs import DecodeGraphs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepLogits:
    """What a pass computed.

    Attributes:
        next: float32 [num_complete, vocab_size], a row for each chunk that completes its sequence.
        prompts: Rows that predict tokens of prompts, with float32 [num_rows, vocab_size] of each.
    """

    next: torch.Tensor
    prompts: list[tuple[PromptRows, torch.Tensor]]


class PackedForward:
    """Runs chunks of many sequences at once.

    Args:
        runner: Computes them.
        rule: When tokens choose pages; None if all read everything.

    Attributes:
        graphs: The same for steps that only decode, or None.
    """

    def __init__(self, runner: Runner, rule: SelectionRule | None = None) -> None:
        self._runner = runner
        self._rule = rule
        self.graphs: DecodeGraphs | None = None

    def run(self, chunks: Many[ScheduledChunk]) -> StepLogits:
        """Compute K and V of the chunks' tokens, and the logits that are wanted.

        Running the same chunks again writes the same K and V to the same places.
        """
        counts = np.array([chunk.num_tokens for chunk in chunks])
        starts = np.array([chunk.sequence.num_computed_tokens for chunk in chunks])
        tokens: list[int] = []
        for chunk, start in zip(chunks, starts.tolist(), strict=True):
            tokens += chunk.sequence.token_ids[start : start + chunk.num_tokens]
        token_ids = torch.tensor(tokens)
        positions = torch.from_numpy(packed_positions(starts + counts, counts))
        batch = self._batch(chunks)
        ends = np.cumsum(counts).tolist()
        complete = [end - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.completes]
        scored = [
            each
            for chunk, end in zip(chunks, ends, strict=True)
            if (each := prompt_rows(chunk.sequence, end - chunk.num_tokens, chunk.num_tokens))
        ]
        if self.graphs is not None and len(complete) == len(tokens) and not scored:
            logits = self.graphs.forward(token_ids, positions, batch)
            if logits is not None:
                return StepLogits(logits, [])
        wanted = list(complete)
        for each in scored:
            wanted += range(each.first_row, each.first_row + len(each.targets))
        rows = torch.tensor(wanted, dtype=torch.int64)
        logits = self._runner.forward(token_ids, positions, batch, rows)
        sizes = [len(complete), *(len(each.targets) for each in scored)]
        parts = torch.split(logits, sizes)
        return StepLogits(parts[0], list(zip(scored, parts[1:], strict=True)))

    def _batch(self, chunks: Many[ScheduledChunk]) -> AttentionBatch:
        caches = [chunk.cache for chunk in chunks]
        counts = [chunk.num_tokens for chunk in chunks]
        if self._rule is None:
            return build_attention_batch(caches, counts)
        prompts = [chunk.sequence.num_prompt_tokens for chunk in chunks]
        return build_attention_batch(caches, counts, self._rule.batch(caches, counts, prompts))

    @torch.inference_mode()
    def capture_graphs(self, runner: LocalRunner, max_num_seqs: int) -> None:
        """Capture decodes as CUDA graphs; without them if that is not possible.

        Args:
            runner: The one that computes here, alone.
            max_num_seqs: Most sequences of a step.
        """
        # Both import Triton, which need not be there.
        from headlong.kernels.triton_attention import TritonAttention  # noqa: PLC0415
        from headlong.server.engine.decode_graphs import DecodeGraphs  # noqa: PLC0415

        assert isinstance(runner.attention, TritonAttention)
        try:
            self.graphs = DecodeGraphs(runner.model, runner.attention, max_num_seqs)
        except torch.OutOfMemoryError:
            logger.warning("CUDA graphs are off: there is no memory for them beside the KV cache")
        except RuntimeError as error:
            logger.warning("CUDA graphs are off, the model cannot be captured: %s", error)
