"""Measures how exactly the embedded model answers questions about facts in long prompts.

``python -m headlong.demo.evaluate`` runs plain transformers: no cache policy of ours, every head
sees everything. The last line is JSON.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from headlong.demo.paths import MODEL_DIR
from headlong.profiling.needles import NeedlePrompt, is_answered, needle_prompts

MAX_NEW_TOKENS = 16


class Generates(Protocol):
    """The part of a transformers model that continues prompts."""

    def generate(self, inputs: torch.Tensor, **options: object) -> torch.Tensor:
        """Continues ``[batch, tokens]`` ids and returns them with what follows."""
        ...


@dataclass(frozen=True)
class Accuracy:
    """Exact answers among prompts of one length.

    Attributes:
        context_tokens: Length of the rendered chat prompt.
        prompts: How many prompts were asked in each way.
        chat: Part answered exactly through the chat template, 0 to 1.
        completion: Part answered exactly as a plain completion, 0 to 1.
    """

    context_tokens: int
    prompts: int
    chat: float
    completion: float


def render_chat(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> list[int]:
    """Returns the token ids of a conversation that the assistant is to go on with."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer.encode(str(text), add_special_tokens=False)
    return ids


def count_chat_tokens(tokenizer: PreTrainedTokenizerFast, content: str) -> int:
    """Counts the tokens of a chat prompt whose one message is ``content``."""
    return len(render_chat(tokenizer, [{"role": "user", "content": content}]))


@torch.inference_mode()
def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Continues a prompt greedily by at most `MAX_NEW_TOKENS` tokens."""
    tokens = torch.tensor([ids], device=model.device)
    output = cast(Generates, model).generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
    )
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    context_tokens: int,
    num_prompts: int,
    seed: int,
) -> tuple[Accuracy, list[tuple[str, NeedlePrompt, str]]]:
    """Asks held-out questions through the chat template and as completions.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer, with a chat template.
        context_tokens: Length of the chat prompts.
        num_prompts: How many facts are asked for, at depths from 0 to 1.
        seed: Which set of held-out prompts.

    Returns:
        The accuracy, and of each failure the way of asking, the prompt and the text generated.
    """
    prompts = needle_prompts(
        lambda content: count_chat_tokens(tokenizer, content), context_tokens, num_prompts, seed
    )
    failures: list[tuple[str, NeedlePrompt, str]] = []
    right = {"chat": 0, "completion": 0}
    for prompt in prompts:
        asked = {
            "chat": render_chat(tokenizer, prompt.chat),
            "completion": tokenizer.encode(prompt.completion, add_special_tokens=False),
        }
        for way, ids in asked.items():
            text = complete(model, tokenizer, ids)
            if is_answered(prompt.fact, text):
                right[way] += 1
            else:
                failures.append((way, prompt, text))
    accuracy = Accuracy(
        context_tokens,
        num_prompts,
        right["chat"] / num_prompts,
        right["completion"] / num_prompts,
    )
    return accuracy, failures


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description="Measure needle accuracy with plain transformers.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="directory of the checkpoint")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--prompts", type=int, default=200, help="prompts of each length")
    parser.add_argument("--seed", type=int, default=0, help="which set of held-out prompts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--failures", action="store_true", help="print what was answered wrongly")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="sdpa"
    ).to(arguments.device)
    results: list[Accuracy] = []
    print("tokens  prompts   chat  completion  seconds", flush=True)
    for length in arguments.lengths:
        started = time.perf_counter()
        result, failures = evaluate(model, tokenizer, length, arguments.prompts, arguments.seed)
        seconds = time.perf_counter() - started
        results.append(result)
        print(
            f"{length:6d}  {result.prompts:7d}  {result.chat:5.1%}  {result.completion:10.1%}"
            f"  {seconds:7.0f}",
            flush=True,
        )
        if arguments.failures:
            for way, prompt, text in failures:
                print(f"  {way} at {prompt.depth:.2f}: {prompt.fact.statement!r} -> {text!r}")
    print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
