"""One request inside the engine."""

from collections.abc import Sequence as TokenIds

import torch
from transformers import PreTrainedTokenizerBase

from headlong.cache.kv_cache import SequenceCache
from headlong.server.engine.detokenizer import Detokenizer, StopStrings
from headlong.server.engine.outputs import FinishReason
from headlong.server.engine.sampling_params import SamplingParams


class Sequence:
    """Tokens, progress and cache of one request.

    Args:
        request_id: The client's handle.
        prompt_token_ids: At least one.
        params: How to sample and when to stop.
        tokenizer: For the text.
        seed: Of its random numbers, if the request brings none.
        device: Where it samples.

    Attributes:
        token_ids: Prompt and completion.
        num_prompt_tokens: Length of the prompt.
        num_computed_tokens: Tokens whose K and V are in the cache.
        cache: Block tables while it runs, None while it waits.
        finish_reason: Set when it is done.
        stop_reason: The stop string or token that ended it.
        num_preemptions: Times its blocks were taken away.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: TokenIds[int],
        params: SamplingParams,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.cache: SequenceCache | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.num_preemptions = 0
        self.generator = torch.Generator(device)
        self.generator.manual_seed(seed if params.seed is None else params.seed)
        self._detokenizer = Detokenizer(
            tokenizer, self.token_ids, skip_special_tokens=params.skip_special_tokens
        )
        self._stop_strings = StopStrings(params.stop, include=params.include_stop_str_in_output)

    @property
    def output_token_ids(self) -> list[int]:
        """The completion so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        """Length of the completion so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens yet to be computed before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def decoding(self) -> bool:
        """Whether only its newest token is to be computed."""
        return self.num_pending_tokens == 1 and self.num_output_tokens > 0

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    def append(self, token_id: int, eos_token_ids: frozenset[int], max_model_len: int) -> str:
        """Add a sampled token and decide whether the completion ends.

        Args:
            token_id: The token.
            eos_token_ids: Tokens that end a completion of this model.
            max_model_len: Most tokens of prompt and completion.

        Returns:
            Text that it makes safe to show.
        """
        self.token_ids.append(token_id)
        params = self.params
        ends = token_id in eos_token_ids and not params.ignore_eos
        if ends or token_id in params.stop_token_ids:
            # What ends the text is not part of it. Before min_tokens it is never sampled.
            self.finish_reason = "stop"
            self.stop_reason = token_id if token_id in params.stop_token_ids else None
            return self._flush()
        text = self._detokenizer.push(token_id)
        if self.num_output_tokens >= params.min_tokens:
            text, stop = self._stop_strings.push(text)
            if stop is not None:
                self.finish_reason, self.stop_reason = "stop", stop
                return text
        full = len(self.token_ids) >= max_model_len
        if self.num_output_tokens >= params.max_tokens or full:
            self.finish_reason = "length"
            return text + self._flush()
        return text

    def _flush(self) -> str:
        """Text that waited for more, now that nothing more comes."""
        text, _ = self._stop_strings.push(self._detokenizer.finish())
        return text + self._stop_strings.finish()
