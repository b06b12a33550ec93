"""Random-weight models of every supported architecture, small enough to compare token by token."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 320

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Wide enough that no two logits nearly tie.
    "initializer_range": 0.2,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        **_COMMON,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    ),
    "mistral": MistralConfig(**_COMMON, sliding_window=None),
    "mistral_sliding": MistralConfig(**_COMMON, sliding_window=40),
    "qwen2": Qwen2Config(**_COMMON),
    "qwen3": Qwen3Config(**_COMMON),
    "phi3": Phi3Config(**_COMMON),
    "gemma2": Gemma2Config(**_COMMON, sliding_window=40, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(
        **_COMMON,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention"] * 1 + ["sliding_attention"],
        query_pre_attn_scalar=16,
    ),
    "gpt_oss": GptOssConfig(
        **_COMMON,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


def save_tiny_model(folder: Path, name: str, seed: int = 0) -> Path:
    """Write a random checkpoint with a byte-level tokenizer; returns its folder."""
    target = folder / name
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(target)
    save_byte_tokenizer(target)
    return target


def save_byte_tokenizer(target: Path) -> None:
    """A tokenizer with one token a byte: ids 3 to 258, after pad, bos and eos."""
    specials = ["<pad>", "<bos>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    fast.save_pretrained(target)
