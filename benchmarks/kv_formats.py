"""By token or by channel? What formats of quantised K and V cost the embedded model's answers.

    python benchmarks/kv_formats.py

Needle prompts with the model's own answers run through transformers' own code, with K and V after
RoPE turned into codes and back before attention: the cache's own formats (a scale for each token
and head), and keys by channel within a page as in KIVI (arXiv 2402.02750), values by token in both.
What is compared is the next token's distribution over the answers' tokens: KL(unquantised ||
quantised) in nats, the share of tokens whose most probable one stays, and that of prompts for which
all stay. Bytes are those of K and V of a token in one head, scales included. The second table is
about keys alone, of random directions with a few channels 20 times as large, as large language
models have them: the error of the attention logits in parts of their spread.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from headlong.demo.paths import MODEL_DIR
from headlong.kernels.codes import dequantise, quantise
from headlong.kernels.layout import QUANTISATIONS, PageLayout, Quantisation
from headlong.profiling.attention_interface import own_attention
from headlong.profiling.needles import needle_prompts
from headlong.profiling.prompts import encode_prompt, token_counter

OUTLIER = 20.0
NUM_OUTLIERS = 4

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """One way to store K and V.

    Attributes:
        name: For people.
        keys: K of one layer, [num_kv_heads, context, head_dim], as it comes back.
        values: V, likewise.
        entry_bytes: Bytes of one token in one head, K and V.
    """

    name: str
    keys: Change
    values: Change
    entry_bytes: float


class Quantised:
    """Attention over K and V that went through a format."""

    def __init__(self, form: Format) -> None:
        self._form = form

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> Tensor:
        keys, values = self._form.keys(key), self._form.values(value)
        shape = (*query.shape[:2], -1, -1)
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            keys[:, None].expand(shape),
            values[:, None].expand(shape),
            is_causal=True,
            scale=scaling,
        )


def by_token(quantisation: Quantisation) -> Change:
    return lambda x: dequantise(quantise(x, quantisation), quantisation)


def by_channel(quantisation: Quantisation, page_tokens: int) -> Change:
    """Each channel of a page has a scale of its own, and a page that is not full yet, too."""

    def there_and_back(page: Tensor) -> Tensor:
        # Two codes of four bits share a byte: a page of an odd length gets its last token twice.
        even = torch.cat([page, page[:, -1:]], dim=1) if page.shape[1] % 2 else page
        codes = quantise(even.transpose(1, 2), quantisation)
        return dequantise(codes, quantisation).transpose(1, 2)[:, : page.shape[1]]

    def change(x: Tensor) -> Tensor:
        return torch.cat([there_and_back(page) for page in x.split(page_tokens, dim=1)], dim=1)

    return change


def formats(head_dim: int, page_sizes: list[int]) -> list[Format]:
    found = [
        Format(
            "bfloat16",
            lambda x: x.bfloat16().float(),
            lambda x: x.bfloat16().float(),
            4.0 * head_dim,
        )
    ]
    for name, quantisation in QUANTISATIONS.items():
        own = by_token(quantisation)
        page = PageLayout(16, head_dim, torch.bfloat16, quantisation)
        found.append(Format(f"{name} by token", own, own, page.entry_bytes))
        for page_tokens in page_sizes:
            scales = quantisation.scale_bytes * head_dim / page_tokens
            own_bytes = quantisation.packed_bytes(head_dim)
            entry = 2 * own_bytes + quantisation.scale_bytes + scales
            keys = by_channel(quantisation, page_tokens)
            found.append(Format(f"{name} K by channel of {page_tokens}", keys, own, entry))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=4096, help="tokens (default 4096)")
    parser.add_argument("--prompts", type=int, default=40, help="questions (default 40)")
    parser.add_argument("--pages", type=int, nargs="+", default=[16, 64], metavar="TOKENS")
    parser.add_argument("--seed", type=int, default=2026, help="of the questions (default 2026)")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    count_tokens = token_counter(tokenizer, chat=True)
    samples = []
    for prompt in needle_prompts(count_tokens, options.context, options.prompts, options.seed, 4):
        question = list(encode_prompt(tokenizer, prompt, chat=True).token_ids)
        with torch.inference_mode():
            whole = model.generate(torch.tensor([question]), max_new_tokens=16, do_sample=False)
        samples.append((question, whole[0, len(question) :].tolist()))
    wanted = formats(model.config.head_dim, options.pages)
    with torch.inference_mode(), own_attention(model):
        plain = Format("float32", lambda x: x, lambda x: x, 8.0 * model.config.head_dim)
        truth = [logits(model, sample, plain) for sample in samples]
        rows = [measure(model, samples, truth, form) for form in wanted]
    print(f"\n{options.prompts} needle questions of {options.context} tokens, answers' tokens")
    print(f"{'format':<28}{'bytes':>8}{'KL, nats':>12}{'same token':>12}{'all same':>10}")
    for row in rows:
        print(
            f"{row['format']:<28}{row['entry_bytes']:>8.1f}{row['kl']:>12.2e}"
            f"{row['same_token']:>12.1%}{row['all_same']:>10.1%}"
        )
    keys = outlier_errors(model.config.head_dim, wanted)
    print(
        f"\nlogits of keys with {NUM_OUTLIERS} channels {OUTLIER:g} times as large: relative error"
    )
    for name, error in keys.items():
        print(f"{name:<28}{error:>12.2e}")
    print(
        json.dumps(
            {
                "benchmark": "kv_formats",
                "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
                "context_tokens": options.context,
                "prompts": options.prompts,
                "seed": options.seed,
                "rows": rows,
                "logit_errors_with_outlier_channels": keys,
            }
        )
    )


def logits(model: torch.nn.Module, sample: tuple[list[int], list[int]], form: Format) -> Tensor:
    """Log probabilities at the positions that predict the answer's tokens, [answer, vocab]."""
    question, answer = sample
    ids = torch.tensor([question + answer[:-1]])
    output = model(
        input_ids=ids,
        use_cache=False,
        logits_to_keep=len(answer),
        headlong_attention=Quantised(form),
    )
    return torch.log_softmax(output.logits[0].float(), dim=-1)


def measure(
    model: torch.nn.Module,
    samples: list[tuple[list[int], list[int]]],
    truth: list[Tensor],
    form: Format,
) -> dict[str, float | str]:
    distances, same = [], []
    for sample, full in zip(samples, truth, strict=True):
        own = logits(model, sample, form)
        distances.append((full.exp() * (full - own)).sum(-1))
        same.append(own.argmax(-1) == full.argmax(-1))
    print(f"{form.name} measured", flush=True)
    return {
        "format": form.name,
        "entry_bytes": form.entry_bytes,
        "kl": float(torch.cat(distances).mean()),
        "same_token": float(torch.cat(same).float().mean()),
        "all_same": sum(bool(each.all()) for each in same) / len(same),
    }


def outlier_errors(head_dim: int, wanted: list[Format]) -> dict[str, float]:
    """Root mean square error of q.k by format, in parts of the logits' standard deviation."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 4096, head_dim, generator=generator)
    keys[..., :NUM_OUTLIERS] *= OUTLIER
    query = torch.randn(256, head_dim, generator=generator)
    products = query @ keys[0].T
    return {
        form.name: float((query @ form.keys(keys)[0].T - products).square().mean().sqrt())
        / float(products.std())
        for form in wanted
    }


if __name__ == "__main__":
    main()
