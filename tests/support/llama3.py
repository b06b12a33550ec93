"""Llama-3-8B, as its configuration describes it."""

import json
from pathlib import Path

LLAMA3_8B: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def write_config(folder: Path, **changes: object) -> Path:
    """Write it as a file, some fields changed, and those that are None left out."""
    fields = {name: value for name, value in (LLAMA3_8B | changes).items() if value is not None}
    path = folder / "llama-3-8b.json"
    path.write_text(json.dumps(fields), encoding="utf-8")
    return path
