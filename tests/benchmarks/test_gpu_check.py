"""The check of benchmarks/gpu.py passes right kernels, and catches wrong ones."""

from collections.abc import Callable
from dataclasses import replace

import gpu_check
import pytest
import torch
from gpu_check_choices import check_choices
from gpu_paged import Chunk

from headlong.kernels.layout import view_pages
from headlong.kernels.reference_selection import Choices
from support.triton import DEVICE, triton_suite

pytestmark = triton_suite

CASE = gpu_check.Case(
    torch.float32, 16, 16, 3, sink_size=3, window_size=18, decodes=(1, 33), prefills=(Chunk(4, 5),)
)

CHOOSING = gpu_check.Case(
    torch.float32, 16, 8, 2, sink_size=3, window_size=18, formats=(("retrieval", "int4"),),
    compensated=True, budget=40, min_similarity=0.9, decodes=(100,), prefills=(),
)  # fmt: skip


def plant(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[..., object]) -> None:
    """Replace a method of the kernels' launcher by one that is given the right one first."""
    from headlong.kernels.triton_attention import TritonAttention

    right = getattr(TritonAttention, name)
    monkeypatch.setattr(
        TritonAttention, name, lambda *args, **options: wrong(right, *args, **options)
    )


def test_right_kernels_pass() -> None:
    entry = gpu_check.check(DEVICE.type, CASE)
    assert (entry["status"], entry["why"]) == ("ok", "")
    assert 0 < entry["error"] <= 2e-6


def test_an_output_that_is_not_written_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave_out(
        right: object, self: object, layer: int, query: torch.Tensor, plan: object, **_: object
    ) -> torch.Tensor:
        return query.new_empty(query.shape[1], query.shape[0], query.shape[2])

    plant(monkeypatch, "attend", leave_out)
    entry = gpu_check.check(DEVICE.type, CASE)
    assert entry["status"] == "failed"
    assert "error nan" in entry["why"]


def test_a_small_error_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(
        monkeypatch,
        "attend",
        lambda right, *args, **options: right(*args, **options) * (1 + 1e-5),
    )
    entry = gpu_check.check(DEVICE.type, CASE)
    assert entry["status"] == "failed"
    assert entry["error"] == pytest.approx(1e-5, rel=0.1)


def test_a_token_that_is_not_appended_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_less(
        right: Callable[..., None],
        self: object,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: object,
    ) -> None:
        plan.slots[:, 0] = -1  # type: ignore[attr-defined]
        right(self, layer, key, value, plan)

    plant(monkeypatch, "append", one_less)
    entry = gpu_check.check(DEVICE.type, CASE)
    assert entry["why"].startswith("append differs from the reference")


def test_a_result_that_depends_on_batch_mates_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def shift(
        right: Callable[..., torch.Tensor],
        self: object,
        layer: int,
        query: torch.Tensor,
        plan: object,
        **options: object,
    ) -> torch.Tensor:
        return right(self, layer, query, plan, **options) * (1 + 1e-7 * query.shape[1])

    plant(monkeypatch, "attend", shift)
    entry = gpu_check.check(DEVICE.type, CASE)
    assert entry["status"] == "failed"
    assert "other bits alone" in entry["why"]


def test_a_distant_arena_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(gpu_check.DRY, cases=(CASE,))
    entry = gpu_check.check_distance(DEVICE.type, settings)
    assert entry["status"] == "ok"
    assert entry["bytes"] > 4 * settings.distant_elements
    once: list[int] = []

    def later(right: Callable[..., torch.Tensor], *args: object, **options: object) -> torch.Tensor:
        once.append(1)
        return right(*args, **options) + len(once)

    plant(monkeypatch, "attend", later)
    assert gpu_check.check_distance(DEVICE.type, settings)["status"] == "failed"


def test_chosen_quantised_and_compensated_pages_pass() -> None:
    entry = gpu_check.check(DEVICE.type, CHOOSING)
    assert (entry["status"], entry["why"]) == ("ok", "")
    assert entry["tolerance"] == 4e-6


def test_another_page_than_the_best_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from headlong.kernels.triton_selection import TritonSelection

    right = TritonSelection.choose

    def worse(
        self: TritonSelection, layer: int, query: torch.Tensor, *rest: torch.Tensor
    ) -> torch.Tensor:
        return right(self, layer, -query, *rest)

    monkeypatch.setattr(TritonSelection, "choose", worse)
    entry = gpu_check.check(DEVICE.type, CHOOSING)
    assert "other pages are better" in entry["why"]


@pytest.mark.parametrize(("error", "passes"), [(1e-6, True), (1e-3, False)])
def test_sums_may_be_rounded_and_no_more(
    error: float, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = gpu_check.Made(DEVICE, replace(CHOOSING, decodes=(97,)))

    def shift(right: Callable[..., None], self: object, *args: object) -> None:
        right(self, *args)
        sums = view_pages(made.paged.layout, made.paged.arena, 1).sums
        assert sums is not None
        sums += error

    plant(monkeypatch, "append", shift)
    assert made.appends_like_reference() is passes


def test_either_of_two_pages_that_are_nearly_equal_may_be_chosen() -> None:
    made = gpu_check.Made(DEVICE, CHOOSING)
    paged, query = made.paged, made.query.transpose(0, 1).cpu()
    bounds = view_pages(paged.layout, paged.arena, 0).bounds
    assert bounds is not None
    bounds[:, :, 0], bounds[:, :, 1] = -1.0, 1.0
    choices = Choices()
    for wanted, kept in (([], [0, 3, 7]), (["other"], [0, 3, 99]), (["other"], [0, 3, 3])):
        choices.pages[1, gpu_check.LAYER, 1] = kept
        found = check_choices(
            choices, query, paged.arena.cpu(), paged.layout, gpu_check.LAYER, paged.batch
        )
        assert len(found) == len(wanted)
    bounds[paged.sequences[0].tables[0].find(5), :, :2] *= 1.01
    choices.pages[1, gpu_check.LAYER, 1] = [0, 3, 7]
    (problem,) = check_choices(
        choices, query, paged.arena.cpu(), paged.layout, gpu_check.LAYER, paged.batch
    )
    assert problem == "sequence 0, head 1: other pages are better"
