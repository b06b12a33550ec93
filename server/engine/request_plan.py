"""Checks a request against the model and the cache, and decides what its heads keep."""

from bisect import bisect_left

from headlong.cache.kv_cache import KVCache
from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.server.engine.engine_config import UNBOUNDED, EngineConfig
from headlong.server.engine.request import EngineRequest, KVPolicy
from headlong.server.engine.selection import SelectionRule
from headlong.server.engine.sequence import SequencePlan
from headlong.server.errors import ContextLengthError, InvalidRequestError


class RequestPlanner:
    """Decides for requests of one engine.

    Args:
        cache: Where they will run.
        config: Bounds.
        max_model_len: Most tokens of prompt and completion.
        vocab_size: Token ids are under it.
    """

    def __init__(
        self, cache: KVCache, config: EngineConfig, max_model_len: int, vocab_size: int
    ) -> None:
        self._cache = cache
        self._config = config
        self._rule = SelectionRule.of(config)
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._streaming = next(
            (group.policy for group in cache.groups if group.name == "streaming"), None
        )

    def plan(self, request: EngineRequest) -> SequencePlan:
        """Decide.

        Raises:
            InvalidRequestError: The prompt is empty, a token id is not in the vocabulary, `n` is
                over what runs at once, or the policy is not to be had.
            ContextLengthError: The prompt leaves no room for a token.
        """
        self._check_tokens(request)
        most = self._config.max_num_seqs
        if request.n > most:
            raise InvalidRequestError(f"n must be at most {most}, got {request.n}", "n")
        length = len(request.prompt_token_ids)
        if length >= self._max_model_len:
            raise ContextLengthError(
                f"the prompt has {length} tokens; the longest context is "
                f"{self._max_model_len} tokens, prompt and completion together",
                "prompt",
            )
        policies = self._cache.policies(self._wider(request.kv_policy))
        dense_tokens = None if self._rule is None else self._rule.dense_tokens(length)
        return SequencePlan(
            policies=policies,
            keys=self._cache.keys(policies, request.cache_salt, dense_tokens),
            max_len=self._max_len(request, policies),
            dense_tokens=dense_tokens,
        )

    def _check_tokens(self, request: EngineRequest) -> None:
        if not request.prompt_token_ids:
            raise InvalidRequestError("the prompt is empty", "prompt")
        params = request.params
        named = (request.prompt_token_ids, params.logit_bias, params.stop_token_ids)
        for tokens in filter(None, named):
            if not 0 <= min(tokens) <= max(tokens) < self._vocab_size:
                wrong = next(each for each in tokens if not 0 <= each < self._vocab_size)
                raise InvalidRequestError(f"token id {wrong} is not in 0 to {self._vocab_size - 1}")

    def _wider(self, asked: KVPolicy | None) -> HeadPolicy | None:
        """The policy that a request asks for, if it changes anything."""
        own = self._streaming
        if asked is None or own is None:
            return None
        most = self._config.kv_policy_max_window_size
        if most == 0:
            raise InvalidRequestError(
                "this server leaves kv_policy to the model's profile", "kv_policy"
            )
        if asked.full:
            if most < UNBOUNDED:
                raise InvalidRequestError(
                    f"kv_policy may ask for a window_size of at most {most}", "kv_policy"
                )
            return RETRIEVAL
        sink = self._size("sink_size", asked.sink_size, own.sink_size, self._most_sink)
        window = self._size("window_size", asked.window_size, own.window_size, most)
        return RETRIEVAL if window >= UNBOUNDED else HeadPolicy(sink, window)

    @property
    def _most_sink(self) -> int:
        return self._config.kv_policy_max_sink_size

    @staticmethod
    def _size(name: str, asked: int | None, own: int, most: int) -> int:
        if asked is None or asked == own:
            return own
        if not own <= asked <= most:
            raise InvalidRequestError(
                f"kv_policy.{name} must be in {own}, which is the profile's, to {max(own, most)}, "
                f"got {asked}",
                f"kv_policy.{name}",
            )
        return asked

    def _max_len(self, request: EngineRequest, policies: tuple[HeadPolicy, ...]) -> int:
        """Most tokens that the request can reach, which may be fewer where it keeps more."""
        if self._cache.fits(self._max_model_len, policies):
            return self._max_model_len
        # The first length that does not fit, less one.
        longest = bisect_left(
            range(self._max_model_len + 1),
            True,
            key=lambda length: not self._cache.fits(length, policies),
        )
        longest -= 1
        needed = len(request.prompt_token_ids)
        needed += request.params.max_tokens if request.asked_max_tokens else 1
        if needed > longest:
            raise InvalidRequestError(
                f"with this kv_policy the cache holds {max(longest, 0)} tokens of a request, and "
                f"it needs {needed}: ask for a narrower one, or start the server with more memory, "
                "or with --kv-policy-tokens if --arena-balance is fixed",
                "kv_policy",
            )
        return longest
