"""Prompts as their completions repeat them."""

from collections.abc import Sequence
from dataclasses import dataclass

from headlong.server.api.logprobs import TokenOffsets, completion_logprobs, joined_logprobs
from headlong.server.api.prompts import EncodedPrompt, PromptEncoder
from headlong.server.api.schemas_completions import CompletionLogprobs
from headlong.server.engine.outputs import PositionLogprobs
from headlong.server.errors import InvalidRequestError

MAX_ECHO_LOGPROBS = 2**20
"""Most log probabilities of prompts in one response: a short request must not become gigabytes."""


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as a choice begins with it.

    Attributes:
        text: What the client wrote, or the text of its token ids.
        first_token: Text of the first token.
        offsets: Where in `text` each token begins; empty if nobody asks.
    """

    text: str
    first_token: str
    offsets: tuple[int, ...]

    def logprobs(self, positions: Sequence[PositionLogprobs]) -> CompletionLogprobs:
        """Shapes the log probabilities of the prompt's tokens.

        Args:
            positions: One entry for each token but the first, which nothing predicts.
        """
        first = CompletionLogprobs(
            tokens=[self.first_token],
            token_logprobs=[None],
            top_logprobs=[None],
            text_offset=list(self.offsets[:1]),
        )
        return joined_logprobs([first, completion_logprobs(positions, self.offsets[1:])])


def make_echo(
    encoder: PromptEncoder,
    prompt: EncodedPrompt,
    *,
    skip_special_tokens: bool,
    with_offsets: bool,
) -> Echo:
    """Finds the text of a prompt; slow, for a thread.

    Args:
        encoder: What encoded it.
        prompt: The prompt.
        skip_special_tokens: Leave special tokens out of the text of token ids.
        with_offsets: Find out where the tokens begin.
    """
    token_ids = prompt.token_ids
    # Special tokens that the client wrote into a text are part of it.
    skip = skip_special_tokens and prompt.text is None
    decoded = encoder.decode(token_ids, skip_special_tokens=skip)
    text = decoded if prompt.text is None else prompt.text
    offsets: tuple[int, ...] = ()
    if with_offsets:
        # Those that the tokenizer put before it are not.
        before = max(decoded.find(text), 0)
        places = TokenOffsets(encoder.tokenizer, [], -before, skip_special_tokens=skip)
        offsets = tuple(min(max(places.push(each), 0), len(text)) for each in token_ids)
    first_token = encoder.decode(token_ids[:1], skip_special_tokens=False)
    return Echo(text, first_token, offsets)


def check_echo_size(prompts: Sequence[EncodedPrompt], n: int, logprobs: int) -> None:
    """Checks that the prompts' log probabilities may be told.

    Args:
        prompts: All prompts of a request.
        n: Completions of each, which all repeat it.
        logprobs: Alternatives of each token.

    Raises:
        InvalidRequestError: There would be too many.
    """
    count = sum(len(prompt.token_ids) for prompt in prompts) * n * (1 + logprobs)
    if count > MAX_ECHO_LOGPROBS:
        raise InvalidRequestError(
            f"echo with logprobs would give {count} log probabilities of prompts, and no more "
            f"than {MAX_ECHO_LOGPROBS} are given: ask for fewer prompts, completions or logprobs",
            "logprobs",
        )
