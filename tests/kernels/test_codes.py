import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headlong.kernels.codes import dequantise, quantise, unpack
from headlong.kernels.layout import QUANTISATIONS, Quantisation

STEPS = {"int8": 127, "fp8": 448, "int4": 15}
HALF = torch.finfo(torch.float16)

formats = st.sampled_from(list(QUANTISATIONS.values()))
within_float16 = st.floats(-6e4, 6e4, width=32)


@st.composite
def vectors(draw: st.DrawFn) -> torch.Tensor:
    """[tokens, head_dim] of numbers of one magnitude, some of them far from 0."""
    head_dim = draw(st.sampled_from([2, 6, 80]))
    tokens = draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**32))
    x = torch.randn(tokens, head_dim, generator=torch.Generator().manual_seed(seed))
    scaled = x * 10.0 ** draw(st.integers(-9, 4)) + draw(within_float16)
    return scaled.clamp(-6e4, 6e4)


@given(vectors(), formats)
def test_what_comes_back_is_within_half_a_step(x: torch.Tensor, quantisation: Quantisation) -> None:
    codes = quantise(x, quantisation)
    error = (dequantise(codes, quantisation) - x).abs()
    scale = codes.scales.float()[:, None]
    half_a_step = scale / 2
    if quantisation.name == "fp8":
        # Three bits of mantissa; below the least normal number, 2 ** -6, steps of 2 ** -9.
        half_a_step = torch.maximum(x.abs() / 2**4, scale / 2**10)
    # A float16 minimum is off by this much, and what lies below it is cut off.
    minimum = 0.0 if codes.minima is None else codes.minima.float().abs()[:, None] * HALF.eps / 2
    # The least float16 is no fine scale: rounded to it, the last step is off by many halves.
    coarse = STEPS[quantisation.name] * HALF.smallest_normal * HALF.eps / 2
    assert (error <= (half_a_step + minimum) * 1.001 + coarse).all()


@given(vectors(), formats)
def test_a_vector_is_quantised_alone(x: torch.Tensor, quantisation: Quantisation) -> None:
    together = quantise(x, quantisation)
    for row, vector in enumerate(x):
        alone = quantise(vector, quantisation)
        assert torch.equal(alone.packed, together.packed[row])
        assert torch.equal(alone.scales, together.scales[row])
        if alone.minima is not None and together.minima is not None:
            assert torch.equal(alone.minima, together.minima[row])


@pytest.mark.parametrize("name", list(QUANTISATIONS))
def test_codes_have_the_shapes_that_pages_hold(name: str) -> None:
    quantisation = QUANTISATIONS[name]
    x = torch.randn(2, 3, 5, 8, dtype=torch.bfloat16)
    codes = quantise(x, quantisation)
    assert codes.packed.shape == (2, 3, 5, quantisation.packed_bytes(8))
    assert codes.packed.dtype == torch.uint8
    assert codes.scales.shape == (2, 3, 5)
    assert codes.scales.dtype == torch.float16
    assert (codes.minima is None) == (not quantisation.has_minimum)
    assert dequantise(codes, quantisation).shape == x.shape


@pytest.mark.parametrize("name", list(QUANTISATIONS))
@pytest.mark.parametrize("largest", [7e4, 1e10, 3e38])
def test_beyond_float16_it_saturates(name: str, largest: float) -> None:
    """Scales and minima stay finite, signs stay, and what is small beside the largest is lost."""
    x = torch.tensor([largest, -largest, largest / 2, 0.0])
    codes = quantise(x, QUANTISATIONS[name])
    back = dequantise(codes, QUANTISATIONS[name])
    assert back.isfinite().all()
    assert codes.scales.isfinite()
    assert back[0] > 6e4
    assert back[1] < -6e4


@pytest.mark.parametrize("name", list(QUANTISATIONS))
def test_vectors_of_zeros_are_zeros(name: str) -> None:
    codes = quantise(torch.zeros(3, 8), QUANTISATIONS[name])
    assert not codes.packed.any()
    assert not codes.scales.any()
    assert not dequantise(codes, QUANTISATIONS[name]).any()


def test_int8_by_hand() -> None:
    codes = quantise(torch.tensor([127.0, -127.0, 0.5, 1.5, -2.5, 3.49]), QUANTISATIONS["int8"])
    assert codes.scales == 1
    assert codes.packed.view(torch.int8).tolist() == [127, -127, 0, 2, -2, 3]


def test_fp8_by_hand() -> None:
    """S.EEEE.MMM: 448 is 0.1111.110, 1 is 0.0111.000, and ties go to the even one."""
    x = torch.tensor([448.0, -1.0, 1.0625, 1.1875, 2.0**-9, 2.0**-10])
    codes = quantise(x, QUANTISATIONS["fp8"])
    assert codes.scales == 1
    assert codes.packed.tolist() == [0b01111110, 0b10111000, 0b00111000, 0b00111010, 1, 0]


def test_int4_by_hand() -> None:
    """The minimum is code 0, the even element of each pair is the low nibble."""
    x = torch.tensor([-3.0, 12.0, 0.0, 1.5])
    codes = quantise(x, QUANTISATIONS["int4"])
    assert codes.minima == -3
    assert codes.scales == 1
    # 4.5 is half way and goes to 4.
    assert codes.packed.tolist() == [0xF0, 0x43]
    assert unpack(codes.packed, QUANTISATIONS["int4"]).tolist() == [0, 15, 3, 4]
    assert dequantise(codes, QUANTISATIONS["int4"]).tolist() == [-3, 12, 0, 1]


def test_codes_are_made_with_the_rounded_scale() -> None:
    """8.3 / 127 is no float16: with the exact scale, the third element would be code 100."""
    exact = 8.3 / 127
    rounded = float(torch.tensor(exact).half())
    x = torch.tensor([8.3, 0.0, 99.51 * min(exact, rounded), 0.0])
    codes = quantise(x, QUANTISATIONS["int8"])
    expected = round(float(x[2]) / rounded)
    assert float(codes.scales) == rounded
    assert int(codes.packed.view(torch.int8)[2]) == expected != round(float(x[2]) / exact)
