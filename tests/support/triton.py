"""The Triton kernels beside the reference: on a CUDA device, else in Triton's interpreter.

Nothing here imports triton before a test runs: the interpreter must be chosen before that, for the
whole process, and the ordinary suite goes without either.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch

from headlong.cache.policy import HeadPolicy
from headlong.kernels import reference
from headlong.kernels.batch import AttentionBatch
from headlong.kernels.layout import ArenaLayout
from headlong.server.engine.batch import build_attention_batch
from support.compare import TOLERANCES, relative_error
from support.paged import Geometry, PagedCase
from support.summarised import Append, Growing

if TYPE_CHECKING:
    from headlong.kernels.triton_attention import TritonAttention
    from headlong.kernels.triton_plan import TritonPlan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")

triton_suite = [
    pytest.mark.triton,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton package"),
    pytest.mark.skipif(
        not (ON_CUDA or INTERPRETED),
        reason="needs a CUDA device, or a process of its own for Triton's interpreter: "
        "TRITON_INTERPRET=1 python -m pytest -m triton tests/kernels",
    ),
]
"""Marks of a module whose tests launch kernels."""

SPLIT_KEYS = 64
"""For `short_splits`: the least that a split can be, so that small contexts have several."""


def geometry(**changes: object) -> Geometry:
    """Two KV heads in three layers: one of each kind, only streaming, only retrieval."""
    settings: dict[str, object] = {
        "retrieval": ((True, False), (False, False), (True, True)),
        "streaming": HeadPolicy(4, 24),
        "group_size": 2,
        "head_dim": 32,
        "block_size": 16,
    }
    settings |= changes
    settings.setdefault("native_windows", (None,) * len(settings["retrieval"]))  # type: ignore[arg-type]
    return Geometry(**settings)  # type: ignore[arg-type]


def short_splits(monkeypatch: pytest.MonkeyPatch, package: str = "headlong.kernels") -> None:
    """Make a split SPLIT_KEYS long, and have the merge read two at a time."""
    importlib.import_module(f"{package}.triton_attention")
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{package}.triton_"):
            for constant, value in (("SPLIT_KEYS", SPLIT_KEYS), ("MERGED_SPLITS", 2)):
                if hasattr(module, constant):
                    monkeypatch.setattr(module, constant, value)


def make_attention(case: PagedCase, package: str = "headlong.kernels") -> "TritonAttention":
    """The path under test, over a copy of the case's arena."""
    module = importlib.import_module(f"{package}.triton_attention")
    attention: TritonAttention = module.TritonAttention(
        case.arena.to(DEVICE, copy=True), case.layout, case.geometry.num_q_heads
    )
    return attention


def triton_append(
    package: str = "headlong.kernels",
) -> Callable[[torch.Tensor, ArenaLayout], Append]:
    """The kernels under test as what writes into an arena; see `support.summarised`."""

    def make(arena: torch.Tensor, layout: ArenaLayout) -> Append:
        module = importlib.import_module(f"{package}.triton_attention")
        num_kv_heads = sum(len(heads.kv_heads) for heads in layout.layers[0])
        attention = module.TritonAttention(arena.to(DEVICE), layout, num_kv_heads)

        def append(
            layer: int, key: torch.Tensor, value: torch.Tensor, batch: AttentionBatch
        ) -> None:
            key, value = (each.to(DEVICE).transpose(0, 1) for each in (key, value))
            attention.append(layer, key, value, attention.plan(batch))
            if ON_CUDA:
                arena.copy_(attention.arena)

        return append

    return make


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that is allocated begins as NaN."""
    # PyTorch fills what `empty` and its like return when algorithms are to be deterministic.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(4, device=DEVICE).new_empty(4).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def place(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the device with the same strides."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
    return copy.copy_(tensor)


def run(
    case: PagedCase,
    attention: "TritonAttention",
    plan: "TritonPlan | None" = None,
    *,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Append and attend in every layer, on memory that begins as NaN.

    Returns:
        For each layer [total_tokens, num_q_heads, head_dim], on the CPU.
    """
    outputs: list[torch.Tensor] = []
    with poisoned_memory():
        plan = plan or attention.plan(case.batch)
        for layer, tensors in enumerate(zip(case.query, case.key, case.value, strict=True)):
            query, key, value = (place(tensor).transpose(0, 1) for tensor in tensors)
            plan.partial.fill_(torch.nan)
            plan.lse.fill_(torch.nan)
            attention.append(layer, key, value, plan)
            output = attention.attend(
                layer,
                query,
                plan,
                sm_scale=case.geometry.head_dim**-0.5,
                softcap=softcap,
                sinks=None if sinks is None else sinks.to(DEVICE),
            )
            assert output.dtype == case.geometry.dtype
            outputs.append(output.cpu())
    return outputs


def check(
    case: PagedCase,
    attention: "TritonAttention | None" = None,
    plan: "TritonPlan | None" = None,
    *,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Every sequence in every layer is as the reference says, and so is every byte of the arena."""
    attention = attention or make_attention(case)
    outputs = run(case, attention, plan, softcap=softcap, sinks=sinks)
    arena, layout, batch = case.arena.clone(), case.layout, case.batch
    tolerance = TOLERANCES[case.geometry.dtype]
    for layer, output in enumerate(outputs):
        reference.append(arena, layout, layer, case.key[layer], case.value[layer], batch)
        expected = reference.attend(
            case.query[layer],
            arena,
            layout,
            layer,
            batch,
            sm_scale=case.geometry.head_dim**-0.5,
            softcap=softcap,
            sinks=sinks,
        )
        for sequence, rows in enumerate(sequence_rows(case)):
            error = relative_error(output[rows], expected[rows])
            assert error <= tolerance, (
                f"layer {layer}, sequence {sequence}: off the reference by {error:.1e}"
            )
    assert torch.equal(attention.arena.cpu(), arena)


def check_attention(
    growing: Growing,
    batch: AttentionBatch,
    *,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    package: str = "headlong.kernels",
    padded_to: int | None = None,
) -> None:
    """A step's attention beside the reference's, over the same pages."""
    module = importlib.import_module(f"{package}.triton_attention")
    rng = torch.Generator().manual_seed(7)
    page = growing.layout.pages[0]
    num_q_heads = 2 * sum(len(heads.kv_heads) for heads in growing.layout.layers[0])
    attention = module.TritonAttention(growing.arena.to(DEVICE), growing.layout, num_q_heads)
    num_tokens = int(batch.cu_seqlens_q[-1])
    for layer in range(len(growing.layout.layers)):
        query = torch.randn(num_tokens, num_q_heads, page.head_dim, generator=rng).to(page.dtype)
        given = query
        if padded_to is not None:
            given = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, padded_to - num_tokens))
        options = {"sm_scale": page.head_dim**-0.5, "softcap": softcap}
        with poisoned_memory():
            if padded_to is None:
                plan = attention.plan(batch)
            else:
                buffer = module.DecodeBuffer(attention, padded_to)
                plan = buffer.plan(padded_to)
                assert buffer.take(batch, padded_to)
            found = attention.attend(
                layer,
                given.to(DEVICE).transpose(0, 1),
                plan,
                sinks=None if sinks is None else sinks.to(DEVICE),
                **options,
            ).cpu()[:num_tokens]
        expected = reference.attend(
            query,
            growing.arena,
            growing.layout,
            layer,
            batch,
            sinks=sinks,
            **options,  # type: ignore[arg-type]
        )
        error = relative_error(found, expected)
        assert error <= TOLERANCES[page.dtype], f"layer {layer}: off the reference by {error:.1e}"


def sequence_rows(case: PagedCase) -> list[slice]:
    """The packed rows of each sequence."""
    return [slice(*bounds) for bounds in pairwise(case.batch.cu_seqlens_q.tolist())]


def pick(case: PagedCase, chosen: Sequence[int]) -> PagedCase:
    """The same step with only some of the sequences, in the given order."""
    rows = [sequence_rows(case)[sequence] for sequence in chosen]
    sequences = [case.sequences[sequence] for sequence in chosen]

    def take(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat([tensor[each] for each in rows]) for tensor in tensors]

    return replace(
        case,
        sequences=sequences,
        batch=build_attention_batch(sequences, [each.stop - each.start for each in rows]),
        query=take(case.query),
        key=take(case.key),
        value=take(case.value),
    )


def plant(folder: Path, name: str, module: str, right: str, wrong: str) -> str:
    """Copy the kernels into a package of their own with one line of source changed.

    Args:
        folder: Where the package is to lie.
        name: The package's, not imported before.
        module: The changed module, "triton_pages" for example.
        right: Text that stands in the module exactly once.
        wrong: What is to stand there.

    Returns:
        The package's name; its modules are to be forgotten with `forget`.
    """
    directory = Path(reference.__file__).parent
    for path in directory.glob("triton_*.py"):
        source = path.read_text(encoding="utf-8")
        if path.stem == module:
            assert source.count(right) == 1, f"{right!r} must stand once in {path.name}"
            source = source.replace(right, wrong)
        source = source.replace("headlong.kernels.triton_", f"{name}.triton_")
        source = source.replace('custom_op("headlong::', f'custom_op("{name}::')
        (folder / path.name).write_text(source, encoding="utf-8")
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    return name


def forget(package: str) -> None:
    """Undo `plant`."""
    for module in [each for each in sys.modules if each.split(".")[0] == package]:
        del sys.modules[module]
