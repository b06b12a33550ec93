"""Where the embedded model lies."""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""The checkpoint's directory: config, weights, tokenizer and head profile."""
