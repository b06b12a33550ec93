"""The entry that stands for what streaming heads dropped, in the Triton kernels."""

import pytest
import torch

from headlong.cache.policy import RETRIEVAL, HeadPolicy
from support.compare import TOLERANCES
from support.summarised import Growing, Setting, by_reference
from support.triton import check_attention, short_splits, triton_suite

pytestmark = triton_suite

POLICIES = (None, HeadPolicy(5, 40), RETRIEVAL, HeadPolicy(20, 12), HeadPolicy(0, 2))
"""The setting's; a wider window; nothing dropped; sinks that end inside a block; no sinks."""

DECODES = [1, 1, 1, 1, 1]
CHUNKS = [20, 3, 5, 12, 9]
BOTH = [1, 20, 1, 2, 1]
NUM_Q_HEADS = 6


def grown(setting: Setting) -> Growing:
    growing = Growing(setting, by_reference, POLICIES)
    for num_new in ([2, 50, 7, 20, 7], [1, 11, 6, 30, 1]):
        growing.step(num_new)
    return growing


@pytest.mark.parametrize("step", [DECODES, CHUNKS, BOTH], ids=["decodes", "chunks", "both"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_attention_is_the_reference_s(step: list[int], dtype: torch.dtype) -> None:
    growing = grown(Setting(block_size=16, dtype=dtype))
    check_attention(growing, growing.step(step))


@pytest.mark.parametrize("form", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantised_pages(form: str, dtype: torch.dtype) -> None:
    growing = grown(
        Setting(block_size=16, dtype=dtype, streaming_format=form, retrieval_format=None)
    )
    check_attention(growing, growing.step(BOTH))


@pytest.mark.parametrize(
    "setting",
    [
        Setting(HeadPolicy(4, 9), block_size=8, head_dim=80),
        Setting(HeadPolicy(17, 33), block_size=64, head_dim=64, dtype=torch.float16),
        Setting(HeadPolicy(0, 2), block_size=16, head_dim=32, streaming_format="int4"),
        Setting(block_size=16, compensated_from=1),
    ],
    ids=str,
)
def test_other_shapes(setting: Setting) -> None:
    growing = grown(setting)
    check_attention(growing, growing.step(BOTH))


@pytest.mark.parametrize("step", [DECODES, CHUNKS], ids=["decodes", "chunks"])
def test_softcap_and_learned_sinks(step: list[int]) -> None:
    growing = grown(Setting(block_size=16))
    sinks = torch.linspace(-2, 3, NUM_Q_HEADS)
    check_attention(growing, growing.step(step), softcap=0.5, sinks=sinks)


def test_it_belongs_to_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    short_splits(monkeypatch)
    growing = Growing(Setting(HeadPolicy(5, 150), block_size=16), by_reference)
    growing.step([220])
    check_attention(growing, growing.step([1]))


def test_padding_of_a_graph_s_size() -> None:
    growing = grown(Setting(block_size=16))
    check_attention(growing, growing.step(DECODES), padded_to=8)
