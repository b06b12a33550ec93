"""The engine as an evaluation sees it: prompts in, texts out, with whatever cache is asked for.

All prompts go through the engine's own steps, so that the compressed cache is used in prefill and
in decode. Published figures often prefill with full attention and compress afterwards, which is
easier.
"""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from headlong.profiling.errors import ScoringError
from headlong.profiling.evaluation_tasks import Answer
from headlong.profiling.evaluation_variants import Variant
from headlong.profiling.progress import Progress, no_progress
from headlong.server.engine.engine import Engine
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.model import LoadedModel
from headlong.server.engine.outputs import RequestOutput
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams
from headlong.server.engine.token_scores import PagedForward, open_paged_forward

_Key = tuple[tuple[str, ...], int, int]
"""Labels, sink size and window size: what makes one cache another."""

_COMPRESSION = (
    "profile",
    "sparsity",
    "threshold",
    "sink_size",
    "window_size",
    "kv_cache_dtype",
    "compensation",
    "compensation_from_layer",
    "retrieval_budget",
    "selection_reuse_steps",
    "selection_min_similarity",
)
"""Settings of what heads keep, store and read."""


def without_compression(config: EngineConfig) -> EngineConfig:
    """The settings of an engine whose heads all keep and read everything, as the layers make it."""
    defaults: dict[str, Any] = {each.name: each.default for each in fields(config)}
    return replace(config, **{name: defaults[name] for name in _COMPRESSION})


class EngineAnswers:
    """Answers prompts greedily, all of a call in one continuous batch.

    Args:
        engine: Without requests in progress.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        progress: Progress = no_progress,
    ) -> list[Answer]:
        """Continues prompts.

        Args:
            prompts: Token ids of each.
            max_new_tokens: The longest continuation.
            progress: Is told how many prompts are done.

        Returns:
            The texts, and the bytes of the blocks that each sequence owned after its prefill.

        Raises:
            HeadlongError: A prompt is empty or too long.
            ScoringError: The model's logits are not finite, or a request failed.
        """
        # The log probability of the chosen token shows whether the logits were numbers.
        params = SamplingParams(max_tokens=max_new_tokens, temperature=0.0, logprobs=0)
        texts = [""] * len(prompts)
        kv_bytes = [0] * len(prompts)
        done = 0
        progress(done, len(prompts))
        try:
            for index, prompt in enumerate(prompts):
                self._engine.add_request(EngineRequest(str(index), prompt, params))
            while self._engine.has_work:
                for output in self._engine.step():
                    _check(output)
                    index = int(output.request_id)
                    texts[index] += output.text
                    if output.num_completion_tokens == 1:
                        kv_bytes[index] = self._owned_bytes(output)
                    if output.finish_reason is not None:
                        done += 1
                        progress(done, len(prompts))
        finally:
            for index in range(len(prompts)):
                self._engine.abort(str(index))
        return [Answer(text, held) for text, held in zip(texts, kv_bytes, strict=True)]

    def _owned_bytes(self, output: RequestOutput) -> int:
        """Bytes of the blocks of a sequence that has just got its first token."""
        for sequence in self._engine.scheduler.running:
            if sequence.request_id == output.request_id and sequence.cache is not None:
                return self._engine.cache.sequence_bytes(sequence.cache)
        # It ended with this token and has given its blocks back; the plan says what they were.
        return self._engine.plan.sequence_bytes(output.num_prompt_tokens)


def _check(output: RequestOutput) -> None:
    if output.error is not None:
        raise ScoringError(f"a prompt of {output.num_prompt_tokens} tokens failed: {output.error}")
    if output.logprobs and not math.isfinite(output.logprobs[0].chosen.logprob):
        position = output.num_prompt_tokens + output.num_completion_tokens - 2
        raise ScoringError(
            f"the model's logits at position {position} of a prompt are not finite numbers"
        )


class EngineCaches:
    """One loaded model with whatever cache a labelling gives, one at a time.

    Args:
        config: Everything but the labelling; its ``max_model_len`` holds the longest prompt.
        model: Loaded from these settings.
    """

    def __init__(self, config: EngineConfig, model: LoadedModel) -> None:
        self._config = config
        self._model = model
        self._folder = TemporaryDirectory(prefix="headlong-eval-")
        self._answers: dict[_Key, EngineAnswers] = {}
        self._readers: dict[_Key, PagedForward] = {}

    def answering(self, variant: Variant) -> EngineAnswers:
        """Opens an engine with a labelling, in the place of what was open before."""
        key = _key(variant)
        if key not in self._answers:
            self._close()
            self._answers[key] = EngineAnswers(Engine(self._config_of(variant), self._model))
        return self._answers[key]

    def reading(self, full: Variant, variant: Variant) -> tuple[PagedForward, PagedForward]:
        """Opens what reads texts with two labellings, in the place of what was open before."""
        wanted = {_key(each): each for each in (full, variant)}
        if not wanted.keys() <= self._readers.keys():
            self._close()
            longest = self._config.max_model_len or self._model.max_context
            for key, each in wanted.items():
                config = self._config_of(each)
                self._readers[key] = open_paged_forward(config, self._model, longest)
        return self._readers[_key(full)], self._readers[_key(variant)]

    def _close(self) -> None:
        """Lets go of all arenas: two would not fit a device that one is made to fill."""
        self._answers.clear()
        self._readers.clear()

    def _config_of(self, variant: Variant) -> EngineConfig:
        if variant.profile is None:
            return self._config
        path = Path(self._folder.name) / "profile.json"
        variant.profile.save(path)
        return replace(self._config, profile=str(path), sparsity=variant.sparsity)


def _key(variant: Variant) -> _Key:
    return variant.labels, *variant.sizes
