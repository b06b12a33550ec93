"""A chat of ten turns over a long document: time to first token, with the prefix cache and without.

    python benchmarks/prefix_chat.py

One client talks to the embedded model over HTTP: a system message of about 8192 tokens, then ten
short questions, each turn with all turns before it. The same chat runs on a server with the prefix
cache and on one without; both must answer with the same tokens. Medians of all rounds.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from transformers import AutoTokenizer

from headlong.demo.paths import MODEL_DIR
from headlong.profiling.needles import filler
from local_server import BIN, serving

QUESTIONS = [
    "What is the document about?",
    "Name one place in it.",
    "Is there a number?",
    "Who is speaking?",
    "What comes first?",
    "What comes last?",
    "Say it in other words.",
    "Is that all?",
    "Which part is the longest?",
    "Thank you. Anything else?",
]


@dataclass(frozen=True)
class Turn:
    ttft_s: float
    token_ids: list[int]
    prompt_tokens: int
    cached_tokens: int


def ask(client: httpx.Client, messages: list[dict[str, str]], new_tokens: int) -> tuple[Turn, str]:
    body = {
        "model": "demo",
        "messages": messages,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
    }
    begin = time.perf_counter()
    ttft_s = 0.0
    text = ""
    token_ids: list[int] = []
    usage: dict[str, int] = {}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if chunk.get("usage"):
                usage = chunk["usage"]
            for choice in chunk["choices"]:
                tokens = choice.get("token_ids") or []
                if tokens and not token_ids:
                    ttft_s = time.perf_counter() - begin
                token_ids += tokens
                text += choice["delta"].get("content") or ""
    cached = usage["prompt_tokens_details"]["cached_tokens"]  # type: ignore[index]
    return Turn(ttft_s, token_ids, usage["prompt_tokens"], cached), text


def chat(url: str, document: str, new_tokens: int) -> list[Turn]:
    messages = [{"role": "system", "content": document}]
    turns: list[Turn] = []
    with httpx.Client(base_url=url, timeout=600) as client:
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            turn, text = ask(client, messages, new_tokens)
            turns.append(turn)
            messages.append({"role": "assistant", "content": text})
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_log = Path(tempfile.gettempdir()) / "headlong-prefix-chat.log"
    parser.add_argument("--tokens", type=int, default=8192, help="of the document (default 8192)")
    parser.add_argument("--new-tokens", type=int, default=24, help="of each answer (default 24)")
    parser.add_argument("--rounds", type=int, default=3, help="documents (default 3)")
    parser.add_argument("--log", type=Path, default=default_log, help="of the servers")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    documents = [
        tokenizer.decode(
            tokenizer.encode(filler(random.Random(seed), options.tokens))[: options.tokens]
        )
        for seed in range(options.rounds)
    ]
    command = (*(str(BIN / "headlong"), "serve", str(MODEL_DIR)), "--served-model-name", "demo")
    found: dict[str, list[list[Turn]]] = {}
    for name, flags in (("on", ()), ("off", ("--no-enable-prefix-caching",))):
        with serving((*command, *flags), options.log) as url:
            chat(url, documents[0][:200], 2)
            found[name] = [chat(url, document, options.new_tokens) for document in documents]
    if not report(found, options):
        raise SystemExit("the answers differ with the prefix cache")


def report(found: dict[str, list[list[Turn]]], options: argparse.Namespace) -> bool:
    """Prints the table; whether the tokens are the same."""
    print(f"{'turn':>4}{'prompt':>9}{'cached':>9}{'TTFT on':>11}{'TTFT off':>11}{'of turn 1':>11}")
    ratios: list[float] = []
    medians: dict[str, list[float]] = {
        name: [
            statistics.median(turn.ttft_s for turn in turns) for turns in zip(*chats, strict=True)
        ]
        for name, chats in found.items()
    }
    for place, turn in enumerate(found["on"][0]):
        on, off = medians["on"][place], medians["off"][place]
        ratios.append(on / medians["on"][0])
        print(
            f"{place + 1:>4}{turn.prompt_tokens:>9}{turn.cached_tokens:>9}"
            f"{1e3 * on:>9.1f}ms{1e3 * off:>9.1f}ms{ratios[-1]:>10.3f}x"
        )
    same = all(
        [turn.token_ids for turn in on] == [turn.token_ids for turn in off]
        for on, off in zip(found["on"], found["off"], strict=True)
    )
    print(f"same tokens with the cache and without: {'yes' if same else 'NO'}")
    print(f"largest TTFT of turns 2 to {len(QUESTIONS)} over turn 1: {max(ratios[1:]):.3f}")
    print(
        json.dumps(
            {
                "benchmark": "prefix_chat",
                "document_tokens": options.tokens,
                "rounds": options.rounds,
                "ttft_s": {name: [round(each, 5) for each in row] for name, row in medians.items()},
                "largest_later_over_first": round(max(ratios[1:]), 4),
                "same_tokens": same,
                "cores": os.cpu_count(),
            }
        )
    )
    return same


if __name__ == "__main__":
    main()
