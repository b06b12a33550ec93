"""Loads a checkpoint's tokenizer, in the engine and wherever its prompts are encoded."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.weights import first_line, source_of
from headlong.server.errors import ConfigError


def load_tokenizer(config: EngineConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint.

    Args:
        config: Which one.

    Raises:
        ConfigError: The checkpoint is missing, or has no tokenizer that transformers can load.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**source_of(config))
    except Exception as error:  # transformers raises many kinds
        raise ConfigError(f"cannot load model {config.model!r}: {first_line(error)}") from error
    return tokenizer
