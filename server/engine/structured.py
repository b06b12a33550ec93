"""Keeps completions to a structure: a JSON Schema, a regular expression or a grammar.

llguidance follows the structure through the tokenizer's vocabulary and says before each token which
ones may come. Structures are the client's, so everything about them is bounded: the text, what it
takes to compile it, what it takes to find the tokens of one step and of all, and the states in
memory.
"""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from headlong.server.engine.device import to_device
from headlong.server.engine.sampling_params import Structure
from headlong.server.engine.structured_budget import FollowingBudget
from headlong.server.engine.structured_grammar import llguidance_grammar
from headlong.server.errors import InvalidRequestError

COMPILE_THREADS = 2
# llguidance descends into what a structure nests and refers to, as deep as its text is long: what
# overflows a stack ends the process. Only what is touched of a stack takes memory.
COMPILE_STACK_BYTES = 256 << 20
# About 1 kB each.
MAX_LEXER_STATES = 50_000
# An object of 400 optional properties takes under 5,000.
MAX_STEP_ITEMS = 10_000
MAX_REASON_CHARS = 300
# llguidance's words for a structure of which no text can be the beginning.
DEAD_END = "NoExtensionBias"


class StructureMatcher:
    """Follows one completion through its structure. Not thread-safe.

    Args:
        matcher: llguidance's, at the beginning.
        vocab_size: Width of the logits.
        budget: The request's, which its completions share.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, budget: FollowingBudget) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._budget = budget

    @property
    def finished(self) -> bool:
        """Whether the completion is complete, and nothing but its end may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self, logits: torch.Tensor) -> None:
        """Forbid what may not follow, in place. The end may follow what is complete.

        Args:
            logits: float32 [vocab_size].

        Raises:
            InvalidRequestError: The last token, or those that may follow, take more than a step
                may take to work out, all until now took more than the request may take, or no
                token of the vocabulary may follow.
        """
        self._budget.check()
        with self._budget.spend():
            bitmask = self._matcher.compute_bitmask()
        words = torch.frombuffer(bytearray(bitmask), dtype=torch.int32)
        if self._matcher.is_error():
            raise InvalidRequestError(
                f"the structure cannot be followed: {reason_of(self._matcher)}"
            )
        words = to_device(words, logits.device)
        bits = words[:, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = (bits & 1).flatten()[: self._vocab_size].bool()
        logits.masked_fill_(~allowed, -torch.inf)

    def accept(self, token_id: int) -> None:
        """Go on by the token that was chosen. If that fails, the next `mask` says so."""
        with self._budget.spend():
            self._matcher.consume_token(token_id)
        self._budget.add_token()


class CompiledStructure:
    """A structure, ready to be followed by the completions of one request.

    Args:
        matcher: llguidance's, which stays at the beginning.
        vocab_size: Width of the logits.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._budget = FollowingBudget()

    def matcher(self) -> StructureMatcher:
        """Begin a completion."""
        return StructureMatcher(self._matcher.deep_copy(), self._vocab_size, self._budget)


class StructureCompiler:
    """Compiles structures for one model, in threads of its own.

    Nothing compiled is kept for the next request: matchers of one compilation share the states
    that they find, and with them the bound, so that one request could use up another's.

    Args:
        tokenizer: The model's.
        vocab_size: Width of the logits, which may be more or fewer than the tokenizer's tokens.
        eos_token_ids: Tokens that end a completion; there may be none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._limits = LLParserLimits(
            max_lexer_states=MAX_LEXER_STATES,
            step_max_items=MAX_STEP_ITEMS,
            verbose_errors=False,
        )
        self._pool = ThreadPoolExecutor(COMPILE_THREADS, thread_name_prefix="structures")
        self._lock = threading.Lock()

    def submit(self, structure: Structure) -> "Future[CompiledStructure]":
        """Compile a structure.

        Returns:
            What comes of it; `InvalidRequestError` if the structure is wrong, asks for what is
            not supported, is more than the bounds allow, or does not go with the model's
            tokenizer. `param` names the request's field.
        """
        # The pool starts its threads when there is work for them.
        usual = threading.stack_size(COMPILE_STACK_BYTES)
        try:
            return self._pool.submit(self._compile, structure)
        finally:
            threading.stack_size(usual)

    def _compile(self, structure: Structure) -> CompiledStructure:
        grammar = llguidance_grammar(structure)
        try:
            with self._lock:
                tokenizer = self._llguidance_tokenizer
        except ValueError as error:
            raise InvalidRequestError(
                f"{structure.param} is not supported with this model's tokenizer: {error}",
                structure.param,
            ) from error
        matcher = LLMatcher(tokenizer, grammar, limits=self._limits, log_level=0)
        if not matcher.is_error():
            # What shows at once is refused before it runs, and costs this thread and not a step.
            first = matcher.deep_copy()
            first.compute_bitmask()
            matcher = first if first.is_error() else matcher
        if matcher.is_error():
            raise InvalidRequestError(
                f"{structure.param} cannot be used: {reason_of(matcher)}", structure.param
            )
        return CompiledStructure(matcher, self._vocab_size)

    @cached_property
    def _llguidance_tokenizer(self) -> LLTokenizer:
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
            raise ValueError("it is not one of the tokenizers library")
        # A model that names no end has one in its tokenizer, or some token that is no text either.
        own = self._tokenizer.eos_token_id
        known = [own] if isinstance(own, int) else []
        ends = self._eos_token_ids or known or self._tokenizer.all_special_ids[:1]
        if not ends:
            raise ValueError("it has no token to end with")
        width = max(self._vocab_size, len(self._tokenizer))
        return from_tokenizer(self._tokenizer, n_vocab=width, eos_token=ends)


def reason_of(matcher: LLMatcher) -> str:
    """Why a matcher failed as one short line, in llguidance's own words where they say it."""
    line = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())
    # A bug of the library's comes with the stack of its threads.
    line = line.partition("<backtrace>")[0]
    if line.strip() == DEAD_END:
        return "it refers to itself without end, or asks for what no text is"
    return line[:MAX_REASON_CHARS]
