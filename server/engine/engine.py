"""The engine: a model, its cache and its scheduler, advanced one step at a time."""

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from headlong.cache.arena import Arena
from headlong.cache.capacity import MemoryPlan
from headlong.cache.groups import HeadGroup
from headlong.cache.kv_cache import KVCache
from headlong.kernels.backend import AttentionBackend, make_backend
from headlong.kernels.layout import ArenaLayout
from headlong.server.engine.attention import PagedStep
from headlong.server.engine.batch import build_attention_batch, packed_positions
from headlong.server.engine.device import choose_attention, choose_device, current, to_device
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.head_plan import plan_heads
from headlong.server.engine.memory import arena_param, plan_arena
from headlong.server.engine.model import LoadedModel, load_model
from headlong.server.engine.outputs import PositionLogprobs, RequestOutput, TokenLogprob
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampler import SampledToken, sample
from headlong.server.engine.sampling_params import SamplingParams
from headlong.server.engine.scheduler import ScheduledChunk, Scheduler
from headlong.server.engine.sequence import Sequence
from headlong.server.engine.weights import first_line
from headlong.server.errors import ConfigError, ContextLengthError, InvalidRequestError

if TYPE_CHECKING:
    from headlong.server.engine.decode_graphs import DecodeGraphs

logger = logging.getLogger(__name__)


class Engine:
    """Runs requests over a head-aware KV cache. Not thread-safe: one thread drives it.

    Args:
        config: What to load and how.
        model: Loaded already, from the same settings, if engines are to share it.

    Attributes:
        model: The loaded model.
        attention_backend: What computes attention, "triton" or "torch".
        groups: Its head groups.
        plan: What was sized.
        max_model_len: Most tokens of prompt and completion of a request.
        cache: Owner of all blocks.
        scheduler: Who runs next.

    Raises:
        ConfigError: The checkpoint, the profile or the memory do not allow a start.
    """

    def __init__(self, config: EngineConfig, model: LoadedModel | None = None) -> None:
        self.config = config
        device = choose_device(config)
        if model is not None and model.device != device:
            raise ConfigError(f"the model is on {model.device}, and not on {device}", "device")
        self.attention_backend = choose_attention(config, device)
        self.model = load_model(config) if model is None else model
        self.groups: tuple[HeadGroup, ...] = plan_heads(config, self.model)
        self.plan: MemoryPlan
        layout: ArenaLayout
        self.plan, layout = plan_arena(config, self.model, self.groups)
        self.max_model_len = self.plan.max_sequence_tokens
        self.cache = KVCache(self.groups, layout)
        assert self.cache.fits(self.max_model_len), "a sequence that cannot run would wait for ever"
        try:
            self.arena = Arena(layout, device)
        except (RuntimeError, MemoryError) as error:
            raise ConfigError(
                f"cannot allocate {layout.total_bytes} bytes of KV cache",
                arena_param(config, device),
            ) from error
        num_q_heads = self.model.geometry.num_q_heads
        try:
            self._attention: AttentionBackend[Any] = make_backend(
                self.attention_backend, self.arena.memory, layout, num_q_heads
            )
        except ValueError as error:
            # A kernel may lack the model's head size or dtype.
            raise ConfigError(
                f"{error}; attention_backend 'torch' does without", "attention_backend"
            ) from error
        self.scheduler = Scheduler(self.cache, config.max_num_seqs, config.max_num_batched_tokens)
        self._sequences: dict[str, Sequence] = {}
        self._num_requests = 0
        self._token_texts: dict[int, str] = {}
        self._graphs: DecodeGraphs | None = None
        self._warm_up()
        with current(device):
            self._graphs = self._capture_graphs()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.model.tokenizer

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether steps that only decode run as CUDA graphs."""
        return self._graphs is not None

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request.

        Args:
            request: Its id must be unlike that of any request in progress.

        Raises:
            InvalidRequestError: The prompt is empty, or a token id is not in the vocabulary.
            ContextLengthError: The prompt leaves no room for a token.
        """
        request_id, params = request.request_id, request.params
        prompt_token_ids = request.prompt_token_ids
        if request_id in self._sequences:
            raise InvalidRequestError(f"request id {request_id!r} is in use")
        if not prompt_token_ids:
            raise InvalidRequestError("the prompt is empty", "prompt")
        vocab_size = self.model.vocab_size
        named = (*prompt_token_ids, *params.logit_bias, *params.stop_token_ids)
        for token in named:
            if not 0 <= token < vocab_size:
                raise InvalidRequestError(f"token id {token} is not in 0 to {vocab_size - 1}")
        if len(prompt_token_ids) >= self.max_model_len:
            raise ContextLengthError(
                f"the prompt has {len(prompt_token_ids)} tokens; the longest context is "
                f"{self.max_model_len} tokens, prompt and completion together",
                "prompt",
            )
        sequence = Sequence(
            request_id,
            prompt_token_ids,
            params,
            self.tokenizer,
            seed=(self.config.seed + self._num_requests) % 2**63,
            device=self.model.device,
        )
        self._num_requests += 1
        self._sequences[request_id] = sequence
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks; one that is not known is no error."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self.scheduler.remove(sequence)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Run one batch.

        Returns:
            What it added to the requests that got a token; empty without work.
        """
        with current(self.model.device):
            return self._step()

    def _step(self) -> list[RequestOutput]:
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        ready = [chunk for chunk in chunks if chunk.num_tokens == chunk.sequence.num_pending_tokens]
        logits = self._forward(chunks, ready)
        self.scheduler.advance(chunks)
        sequences = [chunk.sequence for chunk in ready]
        if not sequences:
            return []
        try:
            tokens = sample(logits, sequences, self.model.eos_token_ids)
        except Exception:
            # One request's parameters must not end the others: find whose they are.
            return [
                self._advance_alone(row[None], sequence)
                for row, sequence in zip(logits, sequences, strict=True)
            ]
        return [
            self._extend(sequence, token) for sequence, token in zip(sequences, tokens, strict=True)
        ]

    def _advance_alone(self, logits: torch.Tensor, sequence: Sequence) -> RequestOutput:
        """Sample for one sequence; if that fails, it alone is aborted."""
        try:
            (token,) = sample(logits, [sequence], self.model.eos_token_ids)
        except Exception as error:
            logger.exception("request %s failed and was aborted", sequence.request_id)
            sequence.finish_reason = "abort"
            self._forget(sequence)
            return self._output(sequence, error=f"sampling failed: {error}")
        return self._extend(sequence, token)

    def _forward(self, chunks: list[ScheduledChunk], ready: list[ScheduledChunk]) -> torch.Tensor:
        """Logits of the last token of each ready chunk, [len(ready), vocab_size]."""
        counts = np.array([chunk.num_tokens for chunk in chunks])
        starts = np.array([chunk.sequence.num_computed_tokens for chunk in chunks])
        tokens: list[int] = []
        for chunk, start in zip(chunks, starts.tolist(), strict=True):
            tokens += chunk.sequence.token_ids[start : start + chunk.num_tokens]
        token_ids = torch.tensor(tokens)
        positions = torch.from_numpy(packed_positions(starts + counts, counts))
        batch = build_attention_batch([chunk.cache for chunk in chunks], counts.tolist())
        if self._graphs is not None and len(ready) == len(chunks) == len(tokens):
            logits = self._graphs.forward(token_ids, positions, batch)
            if logits is not None:
                return logits
        wanted = {id(chunk) for chunk in ready}
        last_rows = np.cumsum(counts) - 1
        rows = [row for row, chunk in zip(last_rows, chunks, strict=True) if id(chunk) in wanted]
        plan = self._attention.plan(batch)
        device = self.model.device
        return self.model.forward(
            to_device(token_ids, device),
            to_device(positions, device),
            to_device(torch.tensor(rows, dtype=torch.int64), device),
            PagedStep(self._attention, plan),
        )

    def _extend(self, sequence: Sequence, token: SampledToken) -> RequestOutput:
        text = sequence.append(token.token_id, self.model.eos_token_ids, self.max_model_len)
        if sequence.finished:
            self._forget(sequence)
        return self._output(sequence, text, token)

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        self.scheduler.remove(sequence)

    def _output(
        self,
        sequence: Sequence,
        text: str = "",
        token: SampledToken | None = None,
        error: str | None = None,
    ) -> RequestOutput:
        reported = token is not None and token.logprob is not None
        return RequestOutput(
            request_id=sequence.request_id,
            text=text,
            token_ids=() if token is None else (token.token_id,),
            logprobs=(self._logprobs(token),) if token is not None and reported else None,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=0,
            num_completion_tokens=sequence.num_output_tokens,
            error=error,
        )

    def _logprobs(self, token: SampledToken) -> PositionLogprobs:
        def named(token_id: int, logprob: float) -> TokenLogprob:
            return TokenLogprob(token_id, self._token_text(token_id), logprob)

        assert token.logprob is not None
        return PositionLogprobs(
            chosen=named(token.token_id, token.logprob),
            top=tuple(named(*each) for each in token.top),
        )

    def _token_text(self, token_id: int) -> str:
        if token_id not in self._token_texts:
            text = self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
            assert isinstance(text, str)
            self._token_texts[token_id] = text
        return self._token_texts[token_id]

    def _warm_up(self) -> None:
        """Run the largest step once, so that memory peaks at start and not while serving."""
        prompt_len = min(self.config.max_num_batched_tokens, self.max_model_len - 1)
        params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        self.add_request(EngineRequest("warm-up", [0] * prompt_len, params))
        try:
            while self.has_work:
                self.step()
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                "the memory that is left beside the KV cache is too small for a step: give the "
                "cache less",
                arena_param(self.config, self.model.device),
            ) from error
        except Exception as error:
            if self.attention_backend != "triton":
                raise
            # Triton compiles at the first launch, with the machine's C compiler.
            raise ConfigError(
                f"the first step with Triton's kernels failed: {first_line(error)}; "
                "attention_backend 'torch' does without them",
                "attention_backend",
            ) from error

    @torch.inference_mode()
    def _capture_graphs(self) -> "DecodeGraphs | None":
        """Capture decodes as CUDA graphs where that is possible and wanted."""
        if self.model.device.type != "cuda" or self.config.enforce_eager:
            return None
        if self.attention_backend != "triton":
            return None
        # Both import Triton, which need not be there.
        from headlong.kernels.triton_attention import TritonAttention  # noqa: PLC0415
        from headlong.server.engine.decode_graphs import DecodeGraphs  # noqa: PLC0415

        assert isinstance(self._attention, TritonAttention)
        try:
            return DecodeGraphs(self.model, self._attention, self.config.max_num_seqs)
        except torch.OutOfMemoryError:
            logger.warning("CUDA graphs are off: there is no memory for them beside the KV cache")
        except RuntimeError as error:
            logger.warning("CUDA graphs are off, the model cannot be captured: %s", error)
        return None
