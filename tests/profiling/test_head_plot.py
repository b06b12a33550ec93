from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from headlong.profiling.errors import ProfileFileError
from headlong.profiling.head_plot import plot_head_map
from headlong.profiling.head_profile import HeadProfile, ModelIdentity


def profile_of(num_layers: int, num_kv_heads: int, **changes: object) -> HeadProfile:
    scores = np.linspace(0, 1, num_layers * num_kv_heads).reshape(num_layers, num_kv_heads)
    values: dict[str, object] = {
        "model": ModelIdentity(num_layers=num_layers, num_kv_heads=num_kv_heads),
        "method": "retrieval",
        "scores": scores.tolist(),
        "sink_size": 4,
        "window_size": 32,
        "sparsity": 0.5,
    }
    return HeadProfile(**(values | changes))


@pytest.mark.parametrize(("num_layers", "num_kv_heads"), [(1, 1), (8, 2), (32, 32), (80, 8)])
def test_draws_a_picture(tmp_path: Path, num_layers: int, num_kv_heads: int) -> None:
    path = tmp_path / "heads.png"
    plot_head_map(profile_of(num_layers, num_kv_heads), path)
    picture = image.imread(path)
    height, width = picture.shape[:2]
    assert 150 < height < 3000
    assert 150 < width < 3000
    assert len(np.unique(picture[..., 0])) > 10


def test_labels_show(tmp_path: Path) -> None:
    plot_head_map(profile_of(4, 4), tmp_path / "half.png")
    plot_head_map(profile_of(4, 4, sparsity=1.0), tmp_path / "none.png")

    def orange(name: str) -> int:
        red, _, blue = np.moveaxis(image.imread(tmp_path / name)[..., :3], -1, 0)
        return int((red > blue + 0.3).sum())

    assert orange("half.png") > 100
    assert orange("none.png") == 0


def test_equal_and_negative_scores(tmp_path: Path) -> None:
    plot_head_map(profile_of(1, 2, scores=[[0.0, 0.0]]), tmp_path / "a.png")
    plot_head_map(profile_of(1, 2, scores=[[-1.0, -3.0]]), tmp_path / "b.png")


def test_says_where_it_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(ProfileFileError, match="cannot be written"):
        plot_head_map(profile_of(1, 1), tmp_path / "missing" / "heads.png")
