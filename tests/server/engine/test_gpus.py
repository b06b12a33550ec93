import pytest

from headlong.server.engine.gpus import GPUS, Gpu, find_gpu, known_names
from headlong.server.errors import ConfigError

GIB = 1 << 30


@pytest.mark.parametrize(
    "text", ["a100-80g", "A100 80GB", "nvidia_a100_80gib", "NVIDIA-A100-80G", " a100-80g "]
)
def test_a_name_is_read_as_people_write_it(text: str) -> None:
    assert find_gpu(text) is GPUS["a100-80g"]


@pytest.mark.parametrize("text", ["rtx-4090", "RTX4090", "GeForce RTX 4090"])
def test_so_is_a_name_without_memory(text: str) -> None:
    assert find_gpu(text) is GPUS["rtx-4090"]


@pytest.mark.parametrize(
    ("text", "total_bytes"),
    [
        ("80GiB", 80 * GIB),
        ("80 gb", 80 * 10**9),
        ("1.5GiB", 3 * GIB // 2),
        ("512MiB", GIB // 2),
        (str(GIB), GIB),
    ],
)
def test_bytes_are_a_gpu_too(text: str, total_bytes: int) -> None:
    assert find_gpu(text) == Gpu(text, total_bytes)


def test_a_card_has_less_than_its_name_says() -> None:
    for name in known_names():
        assert find_gpu(name).total_bytes < 192 * GIB
    assert 79 * GIB < GPUS["a100-80g"].total_bytes < 80 * 10**9 * 1.0737
    assert GPUS["a100-40g"].total_bytes < 40 * GIB
    assert 139 * GIB < GPUS["h200"].total_bytes < 141 * GIB


@pytest.mark.parametrize("text", ["", "h800", "a100", "80 elephants", "-5GiB", "a100-80g;", "1e9"])
def test_what_is_not_known_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(ConfigError, match=r"known are .*a100-80g, .*rtx-4090") as caught:
        find_gpu(text)
    assert caught.value.param == "gpu"
    assert "t4" not in known_names()


@pytest.mark.parametrize("text", ["80", "0", "8.5"])
def test_a_bare_number_that_can_only_be_meant_otherwise(text: str) -> None:
    with pytest.raises(ConfigError, match="needs a unit"):
        find_gpu(text)


@pytest.mark.parametrize("text", ["9" * 400 + "GiB", "9" * 5000, "x" * 5000])
def test_what_is_too_long_is_told_in_short(text: str) -> None:
    with pytest.raises(ConfigError, match="is not known") as caught:
        find_gpu(text)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["0GiB", "999999999TiB", "9" * 18])
def test_sizes_out_of_range(text: str) -> None:
    with pytest.raises(ConfigError, match="at most"):
        find_gpu(text)


@pytest.mark.parametrize("text", ["t4", "Tesla-T4", "v100-16g", "V100 32GB"])
def test_a_card_that_the_kernels_do_not_run_on(text: str) -> None:
    with pytest.raises(ConfigError, match=r"compute capability 7\.\d, and the kernels need 8\.0"):
        find_gpu(text)
