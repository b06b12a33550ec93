"""The engine: a model, its cache and its scheduler, advanced one step at a time."""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from headlong.cache.kv_cache import KVCache
from headlong.cache.tiered_cache import TieredCache
from headlong.server.engine.canary import Canary
from headlong.server.engine.counters import Counters
from headlong.server.engine.describe import engine_info
from headlong.server.engine.device import (
    choose_attention,
    choose_device,
    current,
    free_memory,
    is_out_of_memory,
)
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.follower_link import OnDeath
from headlong.server.engine.head_plan import prefix_namespace
from headlong.server.engine.model import LoadedModel, load_model
from headlong.server.engine.outputs import RequestOutput
from headlong.server.engine.packed_forward import PackedForward
from headlong.server.engine.rank_loading import open_model
from headlong.server.engine.ranks import Ranks
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.request_plan import RequestPlanner
from headlong.server.engine.requests import Requests
from headlong.server.engine.runner import LocalRunner, Runner
from headlong.server.engine.sampler import SampledToken, sample
from headlong.server.engine.scheduler import ScheduledChunk, Scheduler
from headlong.server.engine.selection import SelectionRule
from headlong.server.engine.sequence import Sequence
from headlong.server.engine.status import EngineInfo, EngineStats
from headlong.server.engine.tiers import OpenTiers, check_folder, open_tiers
from headlong.server.engine.token_reports import TokenReporter
from headlong.server.engine.token_scores import PagedForward
from headlong.server.engine.warm_up import warm_up
from headlong.server.errors import ConfigError, InvalidRequestError

logger = logging.getLogger(__name__)


class Engine:
    """Runs requests over a head-aware KV cache. Not thread-safe: one thread drives it.

    Args:
        config: What to load and how.
        model: Loaded already, from the same settings, if engines are to share it.
        on_rank_death: Called on another thread when another rank ends; see `Ranks`.

    Attributes:
        model: The loaded model.
        attention_backend: What computes attention, "triton" or "torch".
        groups: Its head groups.
        plan: What was sized.
        max_model_len: Most tokens of prompt and completion of a request.
        cache: Owner of all blocks.
        scheduler: Who runs next.
        before_forward: Called with the request ids of each batch before the model runs over it;
            what it raises is treated as the model's own failure.

    Raises:
        ConfigError: The checkpoint, the profile or the memory do not allow a start.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: LoadedModel | None = None,
        on_rank_death: OnDeath | None = None,
    ) -> None:
        self.config = config
        check_folder(config)
        device = choose_device(config)
        if model is not None and model.device != device:
            raise ConfigError(f"the model is on {model.device}, and not on {device}", "device")
        if model is not None and config.tensor_parallel_size > 1:
            raise ConfigError(
                "a model that is loaded already runs on one device", "tensor_parallel_size"
            )
        self.attention_backend: Literal["triton", "torch"] = choose_attention(config, device)
        self._tiers: OpenTiers | None = None
        self._ranks = None if config.tensor_parallel_size == 1 else Ranks(config, on_rank_death)
        try:
            self._open(model)
        except BaseException:
            if self._tiers is not None:
                self._tiers.close()
            if self._ranks is not None:
                self._ranks.close(by_force=True)
            raise

    def _open(self, model: LoadedModel | None) -> None:
        config = self.config
        opened = (
            open_model(config, load_model(config) if model is None else model)
            if self._ranks is None
            else self._ranks.open()
        )
        runner: Runner = opened.runner if self._ranks is None else self._ranks
        self.model = opened.runner.model
        self.arena = opened.runner.arena
        self.groups, self.plan = opened.groups, opened.plan
        self.max_model_len = self.plan.max_sequence_tokens
        # With the ranks' arenas apart, blocks have no one place to be copied from.
        make_cache = KVCache if config.host_cache_bytes == 0 else TieredCache
        self.cache = make_cache(
            self.groups,
            opened.layout,
            prefix_caching=config.enable_prefix_caching,
            namespace=prefix_namespace(config, self.model, self.groups),
            copy_blocks=runner.copy_blocks,
            wide_tokens=self.plan.shape.wide_tokens,
        )
        assert self.cache.fits(self.max_model_len), "a sequence that cannot run would wait for ever"
        self.scheduler = Scheduler(self.cache, config)
        self.before_forward: Callable[[Many[str]], None] | None = None
        self._runner = runner
        self._rule = SelectionRule.of(config)
        self._forward = PackedForward(runner, self._rule)
        self._canary = Canary(
            self.reader(), self.cache, self._rule, rate=config.canary_rate, seed=config.seed
        )
        planner = RequestPlanner(self.cache, config, self.max_model_len, self.model.vocab_size)
        self._requests = Requests(planner, self.scheduler, self.model, config.seed)
        self._reporter = TokenReporter(self.tokenizer)
        self._counters = Counters()
        self._tiers = open_tiers(config, self.arena)
        warm_up(self)
        self._forget()
        if self._tiers is not None:
            assert isinstance(self.cache, TieredCache)
            self.cache.attach(self._tiers.blocks)
        self._capture_graphs()

    def close(self) -> None:
        """End the other ranks and threads, if there are any. No step runs after this."""
        if self._tiers is not None:
            self._tiers.close()
        if self._ranks is not None:
            self._ranks.close()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.model.tokenizer

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return len(self._requests) > 0 or self.scheduler.prefixes.loads

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether steps that only decode run as CUDA graphs."""
        return self._forward.graphs is not None

    def info(self) -> EngineInfo:
        """What does not change any more."""
        return engine_info(self)

    def stats(self) -> EngineStats:
        """How it does now."""
        return self._counters.stats(
            self.scheduler, self.plan, self._canary.stats, self._requests.num_preparing
        )

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request.

        Args:
            request: Its id must be unlike that of any request in progress.

        Raises:
            InvalidRequestError: The prompt is empty, a token id is not in the vocabulary, or what
                is asked for is not to be had here.
            ContextLengthError: The prompt leaves no room for a token.
        """
        self._requests.add(request)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks; one that is not known is no error."""
        self._requests.drop(request_id)

    def reader(self) -> PagedForward:
        """What reads one text at a time over the cache, as long as nothing runs."""
        return PagedForward(self._runner, self.cache, self.max_model_len, rule=self._rule)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Run one batch.

        Returns:
            What it added to the completions that got a token, and what else happened to requests;
            empty without work.
        """
        self._canary.make_way()
        start = time.perf_counter()
        with current(self.model.device):
            outputs = self._step()
        self._counters.note_time(time.perf_counter() - start)
        return outputs

    @torch.inference_mode()
    def idle_step(self) -> bool:
        """Do a piece of the work that can wait; False if there is none, or if requests run."""
        if self.has_work:
            return False
        with current(self.model.device):
            return self._canary.step() or self.scheduler.prefixes.copy_ahead()

    def _step(self) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        for failure in self._requests.collect():
            outputs += self._fail(*failure)
        chunks = self.scheduler.schedule()
        if not chunks:
            self.scheduler.prefixes.wait()
            return outputs
        self._counters.note_chunks(chunks)
        outputs += [self._started(sequence) for sequence in self.scheduler.take_started()]
        start = time.perf_counter()
        outputs += self._run(chunks)
        self.scheduler.prefixes.note_step(
            self._counters.step_prefill_tokens,
            self._counters.step_decode_tokens,
            time.perf_counter() - start,
        )
        return outputs

    def _run(self, chunks: list[ScheduledChunk]) -> list[RequestOutput]:
        """Run the model over all chunks at once, or half by half if there is no memory for that.

        A part gets its tokens before the next one is computed. A chunk for which there is no memory
        even alone fails its request.
        """
        # A request that failed in another part of the step has lost its blocks.
        chunks = [chunk for chunk in chunks if chunk.sequence.cache is not None]
        if not chunks:
            return []
        try:
            if self.before_forward is not None:
                self.before_forward([chunk.sequence.request_id for chunk in chunks])
            with self._counters.in_model():
                logits = self._forward.run(chunks)
                scores = [
                    (rows.sequence, self._reporter.score_prompt(rows, each))
                    for rows, each in logits.prompts
                ]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            for sequence, positions in scores:
                sequence.prompt_logprobs += positions
            return self._advance(chunks, logits.next)
        free_memory(self.model.device)
        if len(chunks) > 1:
            half = len(chunks) // 2
            return self._run(chunks[:half]) + self._run(chunks[half:])
        request_id = chunks[0].sequence.request_id
        logger.error("request %s was aborted: out of memory in its step", request_id)
        return self._fail(request_id, "there was no memory for a step of this request")

    def _advance(self, chunks: list[ScheduledChunk], logits: torch.Tensor) -> list[RequestOutput]:
        """Make tokens of what was computed.

        Args:
            chunks: What was computed.
            logits: float32 [num_complete, vocab_size], a row for each chunk that completes.
        """
        complete = [chunk.sequence for chunk in chunks if chunk.completes]
        self.scheduler.advance(chunks)
        rows: list[int] = []
        sequences: list[Sequence] = []
        for row, sequence in enumerate(complete):
            forked = self.scheduler.fork(sequence)
            sequences += (sequence, *forked)
            rows += [row] * (1 + len(forked))
        if not sequences:
            return []
        return self._sample(logits if len(rows) == len(complete) else logits[rows], sequences)

    def _sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> list[RequestOutput]:
        try:
            with self._counters.in_model():
                tokens = sample(logits, sequences, self.model.eos_token_ids)
        except Exception:
            # One request's parameters must not end the others: find whose they are.
            return [
                output
                for row, sequence in zip(logits, sequences, strict=True)
                for output in self._sample_alone(row[None], sequence)
            ]
        return [
            self._extend(sequence, token) for sequence, token in zip(sequences, tokens, strict=True)
        ]

    def _sample_alone(self, logits: torch.Tensor, sequence: Sequence) -> list[RequestOutput]:
        """Sample for one sequence; if that fails, its request alone is aborted."""
        if sequence.cache is None:
            return []
        try:
            (token,) = sample(logits, [sequence], self.model.eos_token_ids)
        except InvalidRequestError as error:
            # All else was checked before: what shows only now is that of its structure.
            return self._fail(sequence.request_id, error.message, "invalid_structure")
        except Exception as error:
            logger.exception("request %s failed and was aborted", sequence.request_id)
            return self._fail(sequence.request_id, f"sampling failed: {error}")
        return [self._extend(sequence, token)]

    def _extend(self, sequence: Sequence, token: SampledToken) -> RequestOutput:
        text = sequence.append(token.token_id, self.model.eos_token_ids)
        self._counters.generation_tokens += 1
        if sequence.finished:
            self._canary.offer(sequence)
            self._requests.finish(sequence)
        return self._output(sequence, text, token)

    def _fail(
        self, request_id: str, error: str, code: str = "request_aborted"
    ) -> list[RequestOutput]:
        """End all completions of a request."""
        failed = self._requests.drop(request_id)
        for sequence in failed:
            sequence.finish_reason = "abort"
        return [replace(self._output(each), error=error, error_code=code) for each in failed]

    def _started(self, sequence: Sequence) -> RequestOutput:
        self._counters.note_started(sequence)
        assert sequence.started is not None
        queued_s = max(0.0, sequence.started - sequence.request.arrived)
        return replace(self._output(sequence), queued_s=queued_s)

    def _output(
        self, sequence: Sequence, text: str = "", token: SampledToken | None = None
    ) -> RequestOutput:
        logprobs = prompt_logprobs = None
        if token is not None and token.logprob is not None:
            logprobs = (self._reporter.position(token),)
        if sequence.num_output_tokens == 1 and sequence.has_prompt_logprobs:
            prompt_logprobs = tuple(sequence.prompt_logprobs)
        output = RequestOutput(
            request_id=sequence.request_id,
            index=sequence.index,
            text=text,
            token_ids=() if token is None else (token.token_id,),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached_tokens,
            num_completion_tokens=sequence.num_output_tokens,
            prefill_chunks=sequence.take_prefill_chunks(),
        )
        if not sequence.finished:
            return output
        return replace(
            output,
            cache_misses=dict(sequence.cache_misses),
            kv_bytes_peak=sequence.kv_bytes_peak,
            kv_bytes_full=self.plan.full_sequence_bytes(len(sequence.token_ids))
            - self.plan.full_sequence_bytes(sequence.num_shared_tokens),
        )

    def _forget(self) -> None:
        """Leave no trace of the warm-up in the prefix cache and in the figures."""
        self.cache.forget_prefixes()
        self._canary.forget()
        self.scheduler.prefixes.forget_rates()
        self._counters = Counters()

    def _capture_graphs(self) -> None:
        """Capture decodes as CUDA graphs where that is possible and wanted."""
        device, runner = self.model.device, self._runner
        if device.type != "cuda" or self.config.enforce_eager:
            return
        if not isinstance(runner, LocalRunner):
            # What a graph replays, the other ranks would have to replay at the same time.
            return
        if self.attention_backend == "triton":
            with current(device):
                self._forward.capture_graphs(runner, self.config.max_num_seqs)
