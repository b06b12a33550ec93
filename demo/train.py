"""Trains the embedded model.

``python -m headlong.demo.train --out DIR`` makes the tokenizer, writes synthetic English, trains
and saves a checkpoint that transformers loads. Rows grow from 64 to 8192 tokens: copying what
followed the same token before is learned within minutes on short rows, and only stretched on long
ones. From 512 tokens on, positions also jump ahead, so that every distance up to the model's
context is seen.
"""

import argparse
import ctypes
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from headlong.demo.rows import WEIGHT_ANSWER, WEIGHT_COPY, RowWriter
from headlong.demo.tokenizer import END_OF_TEXT, TURN_END, token_id, train_tokenizer

ATTENTION = "demo_causal"
STATE_FILE = "training.pt"

# Up to this length, plain matrix products train faster on a CPU than its fused attention.
SHORT_ROW_TOKENS = 256

SHORTEST_ROW_TOKENS = 64

# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


@dataclass(frozen=True)
class Stage:
    """A stretch of training at one row length.

    Attributes:
        row_tokens: Tokens of a row; in a mixed stage, of the longest ones.
        steps: Optimizer steps.
        skip_positions: Whether positions jump ahead in most rows.
        mixed: Whether each step draws its row length, 64 doubled up to ``row_tokens``.
    """

    row_tokens: int
    steps: int
    skip_positions: bool
    mixed: bool = False


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, besides the machine's arithmetic."""

    stages: tuple[Stage, ...]
    hidden_size: int = 192
    intermediate_size: int = 384
    num_layers: int = 4
    num_q_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    vocab_size: int = 1536
    max_positions: int = 16384
    rope_theta: float = 1e8
    batch_tokens: int = 8192
    learning_rate: float = 2e-3
    final_rate: float = 0.05
    warmup_steps: int = 50
    weight_decay: float = 0.01
    seed: int = 0

    @property
    def num_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def decay_steps(self) -> int:
        """Steps while the learning rate falls; mixed stages go on at the final rate."""
        return sum(stage.steps for stage in self.stages if not stage.mixed)


FULL = Recipe(
    stages=(
        Stage(64, 700, False),
        Stage(128, 300, False),
        Stage(256, 300, False),
        Stage(512, 300, True),
        Stage(1024, 250, True),
        Stage(2048, 250, True),
        Stage(4096, 200, True),
        Stage(8192, 150, True),
        Stage(8192, 240, True, mixed=True),
    )
)
TINY = Recipe(
    stages=(Stage(64, 12, False), Stage(128, 8, True)),
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=16,
    batch_tokens=512,
    warmup_steps=4,
)
RECIPES = {"full": FULL, "tiny": TINY}


def causal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Plain causal attention that ignores positions.

    transformers' own mask code takes a jump in the positions for the border of a packed sequence,
    and would hide what lies before it.

    Args:
        module: The calling layer.
        query: ``[batch, num_q_heads, tokens, head_dim]``.
        key: ``[batch, num_kv_heads, tokens, head_dim]``.
        value: As ``key``.
        attention_mask: None: see `register_attention`.
        scaling: Factor of the logits.

    Returns:
        The output ``[batch, tokens, num_q_heads, head_dim]`` and no attention weights.
    """
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    query, key = query.to(value.dtype), key.to(value.dtype)
    tokens = query.shape[2]
    if tokens <= SHORT_ROW_TOKENS:
        logits = query @ key.transpose(2, 3) * (scaling or query.shape[3] ** -0.5)
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
        output = logits.masked_fill(hidden, float("-inf")).softmax(-1).to(value.dtype) @ value
        return output.transpose(1, 2), None
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling
    )
    return output.transpose(1, 2), None


def register_attention() -> None:
    """Makes `causal_attention` known to transformers, with no mask."""
    AttentionInterface.register(ATTENTION, causal_attention)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Builds the untrained model of a recipe, from its seed."""
    register_attention()
    torch.manual_seed(recipe.seed)
    config = Qwen3Config(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_q_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=token_id(tokenizer, END_OF_TEXT),
        eos_token_id=token_id(tokenizer, TURN_END),
        pad_token_id=token_id(tokenizer, END_OF_TEXT),
    )
    model = Qwen3ForCausalLM(config)
    model.set_attn_implementation(ATTENTION)
    return model


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Builds AdamW, with weight decay on matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine from ``learning_rate`` down to its ``final_rate`` part."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    progress = min(1.0, step / recipe.decay_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.learning_rate * warmup * (recipe.final_rate + (1 - recipe.final_rate) * cosine)


def stage_at(recipe: Recipe, step: int) -> Stage:
    """Returns the stage that a step belongs to."""
    end = 0
    for stage in recipe.stages:
        end += stage.steps
        if step < end:
            return stage
    raise ValueError(f"step {step} lies behind the last stage")


def row_tokens_at(recipe: Recipe, step: int) -> int:
    """Returns the row length of a step."""
    stage = stage_at(recipe, step)
    if not stage.mixed:
        return stage.row_tokens
    lengths = [SHORTEST_ROW_TOKENS]
    while lengths[-1] < stage.row_tokens:
        lengths.append(2 * lengths[-1])
    return random.Random(f"row length {recipe.seed} {step}").choice(lengths)


def train(
    recipe: Recipe,
    out: Path,
    device: str = "cpu",
    bf16: bool = True,
    save_every: int = 200,
    stop_after: int | None = None,
) -> list[float]:
    """Trains a model and saves it with its tokenizer.

    A run that finds the state of an earlier one in ``out`` goes on from there, and ends with the
    weights that it would have had without the stop.

    Args:
        recipe: What to train, and how.
        out: The checkpoint's directory.
        device: Where to train.
        bf16: Whether matrix products run in bfloat16 (weights stay float32).
        save_every: Steps between saves.
        stop_after: Leave early, after this many steps in all.

    Returns:
        The loss of every step of this call.
    """
    tokenizer = train_tokenizer(recipe.seed, recipe.vocab_size, recipe.max_positions)
    writer = RowWriter(tokenizer, recipe.seed, recipe.max_positions)
    model = build_model(recipe, tokenizer)
    nn.Module.to(model, device)
    optimizer = build_optimizer(recipe, model)
    out.mkdir(parents=True, exist_ok=True)
    first = load_state(out / STATE_FILE, recipe, model, optimizer)
    last = recipe.num_steps if stop_after is None else min(stop_after, recipe.num_steps)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters / 1e6:.2f}M parameters, {recipe.num_steps} steps", flush=True)
    losses: list[float] = []
    started = time.perf_counter()
    for step in range(first, last):
        stage = stage_at(recipe, step)
        row_tokens = row_tokens_at(recipe, step)
        num_rows = max(1, recipe.batch_tokens // row_tokens)
        tokens, weights, positions = (
            tensor.to(device)
            for tensor in writer.batch(step, num_rows, row_tokens, stage.skip_positions)
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=bf16):
            logits = model(tokens, position_ids=positions, use_cache=False).logits
        logits = logits[:, :-1].flatten(0, 1).float()
        targets, weights = tokens[:, 1:].flatten(), weights[:, 1:].flatten()
        per_token = nn.functional.cross_entropy(logits, targets, reduction="none")
        loss = (per_token * weights).sum() / weights.sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == last - 1:
            right = (logits.argmax(-1) == targets).float()
            seconds = time.perf_counter() - started
            print(
                f"step {step:5d}  row {row_tokens:5d}  loss {losses[-1]:.3f}"
                f"  copied {right[weights == WEIGHT_COPY].mean():.3f}"
                f"  answers {right[weights == WEIGHT_ANSWER].mean():.3f}"
                f"  {seconds:6.0f} s  {len(losses) * tokens.numel() / seconds:6.0f} tokens/s",
                flush=True,
            )
        if (step + 1) % save_every == 0 or step == last - 1:
            save(model, tokenizer, out)
            save_state(out / STATE_FILE, step + 1, recipe, model, optimizer)
    return losses


def load_state(
    path: Path, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Takes up a run that was left, if there is one.

    Returns:
        The step to go on with; 0 for a new run.

    Raises:
        ValueError: If the run that was left follows another recipe.
    """
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["recipe"] != repr(recipe):
        raise ValueError(f"{path} belongs to another recipe: {state['recipe']}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def save_state(
    path: Path, step: int, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Saves what a run needs to go on with ``step``."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "recipe": repr(recipe),
        "step": step,
    }
    torch.save(state, path)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Saves a checkpoint in float32 that loads with transformers' own attention."""
    model.generation_config = GenerationConfig(
        bos_token_id=token_id(tokenizer, END_OF_TEXT),
        eos_token_id=token_id(tokenizer, TURN_END),
        pad_token_id=token_id(tokenizer, END_OF_TEXT),
        do_sample=False,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def keep_freed_memory() -> None:
    """Stops glibc from handing big blocks back to the system, and paging them in again each step.

    It makes training on a CPU nearly twice as fast, and does nothing elsewhere.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**27)


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--scale", choices=sorted(RECIPES), default="full", help="which recipe")
    parser.add_argument("--seed", type=int, default=0, help="of the text and the first weights")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 in matrix products")
    parser.add_argument("--save-every", type=int, default=200, help="steps between saves")
    parser.add_argument("--stop-after", type=int, help="leave early, to go on later")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    train(
        replace(RECIPES[arguments.scale], seed=arguments.seed),
        arguments.out,
        arguments.device,
        bf16=not arguments.float32,
        save_every=arguments.save_every,
        stop_after=arguments.stop_after,
    )


if __name__ == "__main__":
    main()
