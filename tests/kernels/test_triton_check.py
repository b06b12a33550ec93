"""The ahead-of-time check: it compiles for GPUs that are not there, and it finds bad kernels."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import product

import pytest
import torch

from support.triton import INTERPRETED

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton package"),
    pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter compiles nothing"),
]

CAPABILITIES = [(8, 0), (9, 0)]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9 warns where this is not said."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_of_plain_pages_all_that_launchers_choose(capability: tuple[int, int]) -> None:
    from headlong.kernels.triton_check import all_variants
    from headlong.kernels.triton_variant import DTYPES, HEAD_DIMS, TRITON_DTYPES

    names = [variant.name for variant in all_variants(capability)]
    assert len(set(names)) == len(names)
    kernels = ["append", "merge", "decode", "prefill"]
    expected = {
        f"{kernel} {TRITON_DTYPES[dtype]} {head_dim}{softcap}"
        for kernel, dtype, head_dim in product(kernels, DTYPES, HEAD_DIMS)
        for softcap in (("", " softcap") if kernel in ("decode", "prefill") else ("",))
    }
    assert expected <= set(names)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_format_and_sets_of_them(capability: tuple[int, int]) -> None:
    from headlong.kernels.triton_check import all_variants

    names = {variant.name for variant in all_variants(capability)}
    kernels, formats = ["append", "decode", "prefill"], ["int8", "fp8", "int4"]
    heads = [*product(["bf16"], [64, 80, 128, 256]), ("fp16", 128)]
    for kernel, name, (dtype, head_dim) in product(kernels, formats, heads):
        assert f"{kernel} {dtype} {head_dim} {name}" in names
    for kernel, name in product(kernels, ["none+int4", "int8+int4"]):
        assert f"{kernel} bf16 128 {name}" in names
        assert kernel == "append" or f"{kernel} bf16 128 {name} softcap" in names


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_all_that_chooses_pages(capability: tuple[int, int]) -> None:
    from headlong.kernels.triton_check import all_variants
    from headlong.kernels.triton_variant import DTYPES, HEAD_DIMS, TRITON_DTYPES

    names = {variant.name for variant in all_variants(capability)}
    for dtype, head_dim in product(DTYPES, HEAD_DIMS):
        heads = f"{TRITON_DTYPES[dtype]} {head_dim}"
        assert {f"drift {heads}", f"score {heads} spans", f"score {heads} pages"} <= names
    assert {"choose spans", "choose pages", "decode bf16 128 choosing"} <= names
    assert {f"decode fp16 128 {form} choosing" for form in ("int8", "fp8", "int4")} <= names


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
        def __init__(self, jobs: int) -> None:
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
