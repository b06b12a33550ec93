"""Counts what the completions of one HTTP request took."""

from collections.abc import Mapping, Sequence

from headlong.server.api.schemas_common import KVCacheUsage, PromptTokensDetails, Usage
from headlong.server.engine.outputs import RequestOutput
from headlong.server.engine.request import EngineRequest

_OTHER_SALT = "salt"
_NEVER_SEEN = "never_seen"


class UsageTally:
    """Adds up the engine's reports.

    Args:
        requests: Each is one prompt and its completions.
        with_misses: Tell why prompt tokens were not cached.
        only_scores: Completion tokens are the engine's alone and count for nothing.
    """

    def __init__(
        self, requests: Sequence[EngineRequest], *, with_misses: bool, only_scores: bool
    ) -> None:
        self._num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self._num_open = sum(request.n for request in requests)
        self._with_misses = with_misses
        self._only_scores = only_scores
        self._num_completion_tokens: dict[tuple[int, int], int] = {}
        self._num_cached_tokens: dict[int, int] = {}
        self._misses: dict[str, int] = {}
        self._peak_bytes = 0
        self._full_bytes = 0

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        """Takes in what a step says of a completion."""
        if not self._only_scores:
            count = output.num_completion_tokens
            self._num_completion_tokens[prompt_index, output.index] = count
        # The other completions of a prompt share what the first one computed.
        if output.index == 0:
            self._num_cached_tokens[prompt_index] = output.num_cached_tokens
        if output.finish_reason is None:
            return
        self._num_open -= 1
        self._peak_bytes += output.kv_bytes_peak
        self._full_bytes += output.kv_bytes_full
        if output.index == 0:
            for reason, count in hide_salts(output.cache_misses).items():
                self._misses[reason] = self._misses.get(reason, 0) + count

    @property
    def usage(self) -> Usage:
        """What all completions took so far."""
        prompt = self._num_prompt_tokens
        completion = sum(self._num_completion_tokens.values())
        usage = Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(self._num_cached_tokens.values())
            ),
        )
        if not self._num_open:
            usage.kv_cache = KVCacheUsage(peak_bytes=self._peak_bytes, full_bytes=self._full_bytes)
            if self._with_misses:
                usage.cache_misses = self._misses
        return usage


def hide_salts(misses: Mapping[str, int]) -> dict[str, int]:
    """Returns the misses as the client may know them.

    A salt keeps tenants from learning of each other's prefixes. "Cached under another salt" would
    tell exactly that, so it is told as never seen.
    """
    shown = {reason: count for reason, count in misses.items() if reason != _OTHER_SALT}
    if _OTHER_SALT in misses:
        shown[_NEVER_SEEN] = shown.get(_NEVER_SEEN, 0) + misses[_OTHER_SALT]
    return shown
