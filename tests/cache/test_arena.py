import pytest
import torch

from headlong.cache.arena import Arena
from headlong.cache.block_copy import BlockCopy
from headlong.kernels.layout import QUANTISATIONS, ArenaLayout, PageLayout, build_arena_layout

CPU = torch.device("cpu")


@pytest.fixture
def layout() -> ArenaLayout:
    return build_arena_layout(
        members=(((0, 0), (1, 1)), ((0, 1), (1, 0))),
        pages=(
            PageLayout(4, 6, torch.float32),
            PageLayout(
                2,
                6,
                torch.bfloat16,
                QUANTISATIONS["int4"],
                summarised=True,
                compensated=True,
            ),
        ),
        num_blocks=(3, 5),
    )


def test_it_is_one_allocation_of_zeros(layout: ArenaLayout) -> None:
    arena = Arena(layout, CPU)
    assert arena.memory.dtype == torch.uint8
    assert arena.memory.shape == (layout.total_bytes,)
    assert not arena.memory.any()


def test_a_copy_moves_every_page_of_a_block_and_nothing_else(layout: ArenaLayout) -> None:
    arena = Arena(layout, CPU)
    views = [layout.view_group(arena.memory, group) for group in range(2)]
    arena.memory.random_(generator=torch.Generator().manual_seed(0))
    expected = [view.clone() for view in views]
    expected[0][2] = expected[0][0]
    expected[1][4] = expected[1][1]
    arena.copy_blocks([BlockCopy(0, source=0, target=2), BlockCopy(1, source=1, target=4)])
    for view, wanted in zip(views, expected, strict=True):
        assert torch.equal(view, wanted)
    for copied, other in ((views[0][2], views[0][1]), (views[1][4], views[1][0])):
        assert not torch.equal(copied, other)


def test_no_copies_change_nothing(layout: ArenaLayout) -> None:
    arena = Arena(layout, CPU)
    arena.memory.fill_(7)
    arena.copy_blocks([])
    assert (arena.memory == 7).all()
