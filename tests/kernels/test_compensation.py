"""The entry that stands for what streaming heads dropped, on the PyTorch path."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headlong.cache.policy import RETRIEVAL, HeadPolicy
from headlong.kernels import reference
from headlong.kernels.torch_attention import TorchAttention
from headlong.kernels.torch_compensation import plan_dropped
from support.compare import TOLERANCES, relative_error
from support.summarised import Growing, Setting, by_reference

POLICIES = (None, HeadPolicy(5, 40), RETRIEVAL, HeadPolicy(20, 12), HeadPolicy(0, 2))
"""The setting's; a wider window; nothing dropped; sinks that end inside a block; no sinks."""

HISTORY = [3, 61, 70, 90, 8]
STEPS = {
    "decodes": [1, 1, 1, 1, 1],
    "chunks": [130, 9, 140, 150, 40],
    "both": [1, 30, 1, 2, 1],
    "from nothing dropped": [20, 1, 1, 200, 30],
}
GROUP_SIZE = 3
NUM_Q_HEADS = 9


def grown(setting: Setting, seed: int = 0) -> Growing:
    growing = Growing(setting, by_reference, POLICIES, seed=seed)
    for num_new in ([2, 50, 64, 20, 7], [1, 11, 6, 70, 1]):
        growing.step(num_new)
    return growing


def compare(
    growing: Growing,
    num_new: list[int],
    tolerance: float,
    *,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    loud: float = 1.0,
) -> None:
    """A step's attention beside the reference's, over the same pages."""
    rng = torch.Generator().manual_seed(7)
    batch = growing.step(num_new)
    attention = TorchAttention(growing.arena, growing.layout, NUM_Q_HEADS)
    plan = attention.plan(batch)
    head_dim, dtype = growing.layout.pages[0].head_dim, growing.layout.pages[0].dtype
    for layer in range(len(growing.layout.layers)):
        query = loud * torch.randn(sum(num_new), NUM_Q_HEADS, head_dim, generator=rng)
        query = query.to(dtype)
        options = {"sm_scale": head_dim**-0.5, "softcap": softcap, "sinks": sinks}
        found = attention.attend(layer, query.transpose(0, 1), plan, **options)  # type: ignore[arg-type]
        expected = reference.attend(
            query,
            growing.arena,
            growing.layout,
            layer,
            batch,
            **options,  # type: ignore[arg-type]
        )
        error = relative_error(found, expected)
        assert error <= tolerance, f"layer {layer} is off by {error:.1e}"


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_attention_is_the_reference_s(step: list[int], dtype: torch.dtype) -> None:
    compare(grown(Setting(dtype=dtype)), step, TOLERANCES[dtype])


@pytest.mark.parametrize("form", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("step", [STEPS["both"], STEPS["chunks"]])
def test_quantised_pages(form: str, step: list[int]) -> None:
    compare(grown(Setting(streaming_format=form)), step, TOLERANCES[torch.float32])


@pytest.mark.parametrize("step", [STEPS["both"], STEPS["chunks"]])
def test_layers_before_the_first_one_do_without(step: list[int]) -> None:
    compare(grown(Setting(compensated_from=1)), step, TOLERANCES[torch.float32])


def test_where_layers_do_without_what_was_dropped_is_gone() -> None:
    """No query of theirs sees it, so it may have been anything."""
    results: list[list[torch.Tensor]] = []
    for change in (0.0, 1.0):
        growing = Growing(Setting(compensated_from=1), by_reference)
        growing.tokens[0, :, :, 5:40] += change
        growing.step([60])
        batch = growing.step([1])
        attention = TorchAttention(growing.arena, growing.layout, NUM_Q_HEADS)
        plan = attention.plan(batch)
        query = torch.ones(NUM_Q_HEADS, 1, 16)
        # The middle KV head of layer 0 streams, and all of layer 1.
        results.append(
            [attention.attend(layer, query, plan, sm_scale=0.25)[0, 3:6] for layer in (0, 1)]
        )
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.allclose(results[0][1], results[1][1], atol=1e-2)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_softcap_and_learned_sinks(softcap: float | None, has_sinks: bool) -> None:
    sinks = torch.linspace(-2, 3, NUM_Q_HEADS) if has_sinks else None
    for step in (STEPS["decodes"], STEPS["both"]):
        compare(
            grown(Setting()), step, TOLERANCES[torch.float32], softcap=softcap, sinks=sinks, loud=4
        )


@given(
    sink_size=st.integers(0, 20),
    window_size=st.integers(2, 30),
    block_size=st.sampled_from([4, 8, 16]),
    cached=st.integers(0, 60),
    new=st.integers(1, 60),
)
@settings(max_examples=25)
def test_any_window(
    sink_size: int, window_size: int, block_size: int, cached: int, new: int
) -> None:
    setting = Setting(HeadPolicy(sink_size, window_size), block_size, head_dim=4)
    growing = Growing(setting, by_reference, longest=128)
    if cached:
        growing.step([cached])
    compare(growing, [new], TOLERANCES[torch.float32])


def test_equal_tokens_dropped_weigh_as_if_they_were_there() -> None:
    """The entry of N equal keys and values is exactly theirs, so the result is full attention's."""
    setting = Setting(HeadPolicy(4, 10))
    growing = Growing(setting, by_reference, longest=128)
    growing.tokens[0, :, :, 4:100] = growing.tokens[0, :, :, 4:5]
    growing.step([90])
    batch = growing.step([1])
    attention = TorchAttention(growing.arena, growing.layout, NUM_Q_HEADS)
    query = torch.randn(NUM_Q_HEADS, 1, 16, generator=torch.Generator().manual_seed(1))
    found = attention.attend(1, query, attention.plan(batch), sm_scale=0.25)
    key, value = growing.tokens[0, 1, :, :91]
    for head in range(NUM_Q_HEADS):
        weights = torch.softmax(key[:, head // 3] @ query[head, 0] * 0.25, 0)
        torch.testing.assert_close(found[0, head], weights @ value[:, head // 3])


def test_nothing_is_planned_where_nothing_is_dropped() -> None:
    growing = grown(Setting())
    page, tables = growing.layout.pages[1], growing.batch([0, 1, 2, 3, 4], HISTORY).groups[1]

    def biases(seqs: list[int], positions: list[list[int]]) -> list[float] | None:
        plan = plan_dropped(
            page, tables, torch.tensor(seqs), torch.tensor(positions), torch.device("cpu")
        )
        return None if plan is None else plan.biases.flatten().tolist()

    assert biases([0], [[16]]) is None
    assert biases([0], [[17]]) == [math.log(1)]
    assert biases([0], [[16, 17, 18]]) == pytest.approx([-math.inf, 0, math.log(2)])
    assert biases([2, 4], [[133], [7]]) == pytest.approx([-math.inf, math.log(6)])
    assert biases([2], [[133]]) is None
