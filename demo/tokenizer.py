"""The embedded model's tokenizer: a byte-level BPE over the synthetic English.

Any UTF-8 text round-trips, since all 256 bytes are in the vocabulary. Numbers are split into
groups of two digits, with the space before a number in its first group: in ``Alice 4821`` the
name's token is directly followed by the value's first token.
"""

import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from headlong.profiling.lexicon import NAMES, PHRASE_WORDS
from headlong.profiling.needles import distinct_facts, filler

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

SPLIT_PATTERN = r" ?\p{L}+| ?\p{N}{1,2}|\n| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def train_tokenizer(
    seed: int, vocab_size: int = 1536, max_positions: int = 16384
) -> PreTrainedTokenizerFast:
    """Trains the tokenizer on text that it generates.

    Args:
        seed: Of the generated text.
        vocab_size: All tokens: bytes, merges and the three special ones.
        max_positions: The model's context, which the tokenizer reports.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Returns the id of one token of the vocabulary."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary[token]


def _corpus(seed: int) -> list[str]:
    rng = random.Random(f"tokenizer {seed}")
    texts = [filler(rng, 400) for _ in range(300)]
    for _ in range(30):
        texts += [f"{fact.statement}\n{fact.question}" for fact in distinct_facts(rng, len(NAMES))]
    # Every two-digit group, name and phrase word often enough to earn a token of its own.
    for _ in range(40):
        texts += [f" {pair:02d}{pair:02d}" for pair in range(100)]
        texts += [f" {word}" for word in (*NAMES, *PHRASE_WORDS)]
    texts += ["user\n", "assistant\n", "system\n"] * 100
    return texts
