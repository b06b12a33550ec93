"""A model's own tokenizer, from a local folder or the hub."""

import re
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from headlong.profiling.prompts import token_counter

# What no name on the hub can be: those have one slash at most, between letters or digits.
_PATH = re.compile(r"$|[./~]|.*/.*/|.*/$")
_LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError)


class HubTokenizer:
    """The tokenizer of a model; see `tokens.Tokenizer`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @property
    def approximate(self) -> bool:
        """Always false."""
        return False

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without special tokens."""
        # Without verbose=False it warns of texts longer than the model's context.
        token_ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return token_ids

    def prompt_counter(self, *, chat: bool) -> Callable[[str], int]:
        """Makes the function that counts a whole prompt with its template and special tokens.

        Raises:
            ValueError: If a chat is asked for and the tokenizer has no chat template.
        """
        if chat and not self._tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {self._tokenizer.name_or_path!r} has no chat template; ask for "
                "completions instead"
            )
        return token_counter(self._tokenizer, chat=chat)


def load_tokenizer(model: str) -> HubTokenizer:
    """Loads the tokenizer of a model; code that comes with it does not run.

    Args:
        model: A folder or a name on the hub.

    Raises:
        ValueError: If it cannot be loaded; in one line.
    """
    # Else it is asked for on the hub, and the error speaks of names there.
    is_folder = Path(model).is_dir()
    if not is_folder and _PATH.match(model):
        raise ValueError(f"{model}: the tokenizer cannot be loaded: there is no such folder")
    try:
        return HubTokenizer(AutoTokenizer.from_pretrained(model, local_files_only=is_folder))
    except _LOADING_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{model}: the tokenizer cannot be loaded: {reason}") from error
