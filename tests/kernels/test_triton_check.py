"""The ahead-of-time check: it compiles for GPUs that are not there, and it finds bad kernels."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING

import pytest
import torch

from support.triton import INTERPRETED

if TYPE_CHECKING:
    from headlong.kernels.triton_variant import Variant

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton package"),
    pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter compiles nothing"),
]

CAPABILITIES = [(8, 0), (9, 0)]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9 warns where this is not said."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def _names(capability: tuple[int, int]) -> set[str]:
    from headlong.kernels.triton_check import all_variants

    names = [variant.name for variant in all_variants(capability)]
    assert len(set(names)) == len(names)
    return set(names)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_head_size_of_plain_pages(capability: tuple[int, int]) -> None:
    from headlong.kernels.triton_variant import HEAD_DIMS

    kernels = ["append", "merge", "decode", "prefill", "drift"]
    heads = [*(f"bf16 {head_dim}" for head_dim in HEAD_DIMS), "fp16 128", "fp32 128"]
    names = _names(capability)
    assert {f"{kernel} {head}" for kernel, head in product(kernels, heads)} <= names
    assert {f"score {head} {of}" for head, of in product(heads, ["spans", "pages"])} <= names
    capped = {f"{kernel} {head} softcap" for kernel in ("decode", "prefill") for head in heads[-1:]}
    assert capped | {"prefill bf16 128 softcap", "prefill bf16 256 softcap"} <= names


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_size_of_tile_of_plain_pages(capability: tuple[int, int]) -> None:
    from headlong.kernels.triton_check import all_variants
    from headlong.kernels.triton_decode import decode_variant
    from headlong.kernels.triton_prefill import prefill_variant
    from headlong.kernels.triton_variant import DTYPES, HEAD_DIMS

    def sizes(variant: "Variant") -> tuple[object, ...]:
        """Float16 and bfloat16 are as large."""
        tile = (variant.constants[name] for name in ("DIM", "ROWS", "KEYS", "ITEMSIZE"))
        return (variant.kernel, *tile, variant.num_warps, variant.num_stages)

    compiled = {
        sizes(variant)
        for variant in all_variants(capability)
        if variant.constants.get("FORMATS") == 1 and "KEYS" in variant.constants
    }
    for make, dtype, head_dim in product((decode_variant, prefill_variant), DTYPES, HEAD_DIMS):
        variant = make(dtype, head_dim, softcap=False, formats=1, capability=capability)
        assert sizes(variant) in compiled, variant.name


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_format_and_sets_of_them(capability: tuple[int, int]) -> None:
    names = _names(capability)
    for kernel, formats in product(
        ["append", "decode", "prefill"],
        ["64 int8", "64 fp8", "64 int4", "80 int4", "128 int8", "128 fp8", "128 int4", "256 int4"],
    ):
        assert f"{kernel} bf16 {formats}" in names
    for kernel, formats in product(
        ["append", "decode", "prefill"],
        ["fp16 128 fp8", "bf16 128 none+int4", "bf16 128 int8+int4"],
    ):
        assert f"{kernel} {formats}" in names


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_all_that_chooses_pages_or_compensates(capability: tuple[int, int]) -> None:
    names = _names(capability)
    assert {"choose spans", "choose pages", "decode bf16 128 choosing"} <= names
    for formats in ("int8", "fp8", "int4", "none+int4", "int8+int4", "fp8+int4"):
        assert f"decode bf16 128 {formats} choosing" in names
    assert "decode bf16 128 int8+int4 choosing compensated int8" in names
    for formats in ("fp8", "int4", "none+int4"):
        assert f"decode bf16 128 {formats} choosing compensated {formats}" in names
    for kernel, formats in product(["decode", "prefill"], ["int8", "fp8", "int4", "none+int4"]):
        assert f"{kernel} bf16 128 {formats} compensated {formats}" in names
    for kernel, formats in product(["decode", "prefill"], ["64", "128 softcap", "128 none+int4"]):
        assert f"{kernel} bf16 {formats} compensated" in names


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_bounds_and_sums_of_every_dtype_and_format(capability: tuple[int, int]) -> None:
    names = _names(capability)
    heads = ["bf16 16", "bf16 64", "bf16 80", "bf16 128", "bf16 256", "fp16 128", "fp32 256"]
    coded = ["bf16 128 int8", "bf16 128 fp8", "bf16 128 int4", "bf16 80 int4"]
    assert {f"{kernel} {of}" for kernel in ("bounds", "sums") for of in heads + coded} <= names


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_variant_takes_every_argument_of_its_kernel(capability: tuple[int, int]) -> None:
    """No constant and no type is said of an argument that there is not."""
    from headlong.kernels.triton_check import all_variants

    for variant in all_variants(capability):
        signature = variant.signature()
        assert set(variant.constants).isdisjoint(variant.types)
        assert {*variant.constants, *variant.types} <= set(signature)
        pointers = {name for name in signature if name.endswith("_ptr")}
        assert pointers == {name for name, kind in signature.items() if kind.startswith("*")}


@pytest.mark.parametrize("formats", [1, 2], ids=["none", "int8"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiled_variants_fit(capability: tuple[int, int], formats: int) -> None:
    from headlong.kernels.triton_check import compile_variant
    from headlong.kernels.triton_decode import decode_variant
    from headlong.kernels.triton_prefill import prefill_variant

    dtype = torch.bfloat16
    decode = decode_variant(dtype, 64, softcap=False, formats=formats, capability=capability)
    prefill = prefill_variant(dtype, 64, softcap=False, formats=formats, capability=capability)
    for variant in (decode, prefill):
        taken = compile_variant(variant, capability)
        assert taken.problems(capability) == []
        assert 32 <= taken.registers <= 255
        # At the least one tile of K and one of V, of which each stage has its own.
        kind = "KEYS" if formats == 1 else "CODE_KEYS"
        keys, head_dim = (variant.constants[name] for name in (kind, "HEAD_DIM"))
        assert isinstance(keys, int)
        assert isinstance(head_dim, int)
        tiles = 2 * keys * head_dim * (dtype.itemsize if formats == 1 else 1)
        assert tiles <= taken.shared_bytes <= (variant.num_stages + 1) * tiles + 64 * 1024


def test_a_variant_that_spills_is_bad() -> None:
    from headlong.kernels.triton_check import MAX_SPILL_BYTES, compile_variant
    from headlong.kernels.triton_decode import decode_variant

    variant = decode_variant(torch.float16, 128, softcap=False, formats=1, capability=(8, 0))
    large = replace(
        variant,
        constants={**variant.constants, "KEYS": 256},
        num_warps=2,
        num_stages=1,
        max_registers=None,
    )
    taken = compile_variant(large, (8, 0))
    assert taken.spill_bytes > MAX_SPILL_BYTES
    assert taken.problems((8, 0)) == [f"spills {taken.spill_bytes} bytes"]


def test_a_variant_without_room_is_bad() -> None:
    from headlong.kernels.triton_check import compile_variant
    from headlong.kernels.triton_decode import decode_variant

    variant = decode_variant(torch.float16, 128, softcap=False, formats=1, capability=(8, 0))
    taken = compile_variant(replace(variant, num_stages=12), (8, 0))
    assert 163 * 1024 < taken.shared_bytes < 227 * 1024
    assert taken.problems((8, 0)) == ["more shared memory than 166912 bytes"]
    assert taken.problems((9, 0)) == []


def test_the_command_prints_a_table() -> None:
    command = [sys.executable, "-m", "headlong.kernels.triton_check", "--jobs", "1"]
    done = subprocess.run(
        [*command, "--only", "append fp32 64"],
        env={**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    head, *lines, last = done.stdout.splitlines()
    assert head.split()[:2] == ["arch", "variant"]
    assert [line.split()[:4] for line in lines] == [
        [arch, "append", "fp32", "64"] for arch in ("sm_80", "sm_90")
    ]
    assert last == "2 variants compiled, 0 of them bad"
    assert done.stderr == ""


def test_the_command_fails_for_a_bad_variant(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one process, because a pool's would not know of the limit set here."""
    from headlong.kernels import triton_check

    class Pool:
        def __init__(self, jobs: int, mp_context: object) -> None:
            self.map = map

        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(triton_check, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(triton_check, "SHARED_BYTES", {(8, 0): 64})
    assert triton_check.main(["--only", "merge fp16 128"]) == 1
    *_, line, last = capsys.readouterr().out.splitlines()
    assert line.endswith("more shared memory than 64 bytes")
    assert last == "1 variants compiled, 1 of them bad"
