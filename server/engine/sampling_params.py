"""What a request may ask of the sampler and of the end of its text."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from headlong.server.errors import InvalidRequestError

GREEDY_TEMPERATURE = 1e-5
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 1024
MAX_STRUCTURE_CHARS = 1 << 16


StructureKind = Literal["json_object", "json_schema", "regex", "grammar"]


@dataclass(frozen=True, slots=True)
class Structure:
    """The form that a completion must have.

    Attributes:
        kind: What `text` is: any JSON object, a JSON Schema, a regular expression that the whole
            text matches, or a context-free grammar in Lark's or GBNF's notation.
        text: The schema as JSON, the expression or the grammar; "" for "json_object".
        param: The request's field that it comes from, for errors.
    """

    kind: StructureKind
    text: str = ""
    param: str = field(default="structure", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request, checked when made.

    Attributes:
        max_tokens: Most tokens to generate.
        temperature: 0 is greedy, and so is what is nearly 0.
        top_p: Keep the smallest set of tokens whose probability reaches this.
        top_k: Keep this many tokens; 0 keeps all.
        min_p: Keep tokens at least this probable relative to the most probable one.
        seed: Makes sampling repeatable.
        repetition_penalty: Divides positive and multiplies negative logits of tokens seen in the
            prompt or the completion (CTRL, arXiv 1909.05858, section 4.1).
        presence_penalty: Subtracted once from the logits of tokens seen in the completion.
        frequency_penalty: Subtracted per occurrence in the completion.
        logit_bias: Added to the logits of these token ids.
        stop: Strings that end the completion.
        stop_token_ids: Token ids that end the completion, beside the model's own.
        include_stop_str_in_output: Keep the stop string in the text.
        ignore_eos: Go on after the model's end-of-sequence tokens.
        min_tokens: No end-of-sequence or stop token before this many tokens.
        skip_special_tokens: Leave special tokens out of the text.
        logprobs: Number of most probable alternatives to report for each token; 0 reports only
            the chosen one, None reports nothing.
        prompt_logprobs: The same for the tokens of the prompt, whose K and V are then computed
            anew and not taken from the prefix cache.
        structure: What the completion must look like.

    Raises:
        InvalidRequestError: A value is out of range, NaN or infinite; `param` names it.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structure: Structure | None = None

    def __post_init__(self) -> None:
        check_param(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        check_param(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            "in 0 to max_tokens",
        )
        check_param(
            0.0 <= self.temperature <= 100.0, "temperature", self.temperature, "in 0 to 100"
        )
        check_param(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "over 0 and at most 1")
        check_param(0 <= self.top_k < 2**31, "top_k", self.top_k, "0 (off) or more, under 2**31")
        check_param(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "in 0 to 1")
        penalty = self.repetition_penalty
        check_param(0.01 <= penalty <= 100.0, "repetition_penalty", penalty, "in 0.01 to 100")
        for name in ("presence_penalty", "frequency_penalty"):
            check_param(-2.0 <= getattr(self, name) <= 2.0, name, getattr(self, name), "in -2 to 2")
        seed_fits = self.seed is None or -(2**63) <= self.seed < 2**64
        check_param(seed_fits, "seed", self.seed, "a 64-bit integer")
        count = len(self.logit_bias)
        check_param(
            count <= MAX_LOGIT_BIAS, "logit_bias", f"{count} entries", f"{MAX_LOGIT_BIAS} or fewer"
        )
        for bias in self.logit_bias.values():
            check_param(-100.0 <= bias <= 100.0, "logit_bias", bias, "in -100 to 100")
        check_param(
            len(self.stop) <= MAX_STOP_STRINGS,
            "stop",
            f"{len(self.stop)} strings",
            f"{MAX_STOP_STRINGS} or fewer",
        )
        check_param(all(self.stop), "stop", "an empty string", "non-empty")
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(self, name)
            check_param(
                asked is None or 0 <= asked <= MAX_LOGPROBS, name, asked, f"in 0 to {MAX_LOGPROBS}"
            )

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE


def check_param(holds: bool, param: str, value: object, want: str) -> None:
    """Raise `InvalidRequestError` unless `holds`.

    Args:
        holds: Whether the value is in range.
        param: The field's name.
        value: What was given; NaN and infinities are never in range.
        want: What it must be, to follow "must be".
    """
    # NaN fails every comparison above, so it arrives here as out of range.
    if isinstance(value, float) and not math.isfinite(value):
        holds = False
    if not holds:
        raise InvalidRequestError(f"{param} must be {want}, got {value}", param=param)
