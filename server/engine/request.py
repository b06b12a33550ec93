"""What the engine is asked for."""

import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

from headlong.server.engine.sampling_params import SamplingParams, check_param

MAX_PRIORITY = 2**31 - 1
MAX_TIMEOUT_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPolicy:
    """What the streaming heads of one request are to keep, in place of the profile's.

    Attributes:
        sink_size: First tokens; None is the profile's.
        window_size: Recent tokens; None is the profile's. Left alone by `full`.
        full: Keep every token of every head that the model itself does not window.

    Raises:
        InvalidRequestError: A size is out of range, or is given beside `full`.
    """

    sink_size: int | None = None
    window_size: int | None = None
    full: bool = False

    def __post_init__(self) -> None:
        sizes = (self.sink_size, self.window_size)
        check_param(
            not self.full or sizes == (None, None), "kv_policy", sizes, "'full' or sizes, not both"
        )
        for name, least in (("sink_size", 0), ("window_size", 1)):
            size = getattr(self, name)
            check_param(
                size is None or least <= size < 2**31, f"kv_policy.{name}", size, f"{least} or more"
            )


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One prompt and what to make of it.

    Attributes:
        request_id: Unlike that of any request in progress.
        prompt_token_ids: The prompt, at least one token.
        params: How to sample and when to stop.
        n: Completions of the prompt; they share its cache.
        asked_max_tokens: Whether the client chose `params.max_tokens` itself. What it chose is
            reserved as a whole when the request is admitted.
        priority: Lower runs first among the requests of one tenant.
        tenant: Whose share of the engine it takes.
        cache_salt: Prefixes are only found by requests with the same salt.
        kv_policy: What streaming heads keep; None is the profile's.
        timeout_s: Seconds after `arrived` at which the request is given up.
        arrived: When it arrived, in seconds of `time.monotonic`, which all processes share.

    Raises:
        InvalidRequestError: A value is out of range; `param` names it.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    _: KW_ONLY
    n: int = 1
    asked_max_tokens: bool = True
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    kv_policy: KVPolicy | None = None
    timeout_s: float | None = None
    arrived: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        check_param(self.n >= 1, "n", self.n, "at least 1")
        check_param(
            abs(self.priority) <= MAX_PRIORITY, "priority", self.priority, "a 32-bit integer"
        )
        timeout = self.timeout_s
        check_param(
            timeout is None or 0.0 < timeout <= MAX_TIMEOUT_S,
            "timeout",
            timeout,
            f"over 0 and at most {MAX_TIMEOUT_S:.0f} seconds",
        )
