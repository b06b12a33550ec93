"""Two ranks on two CUDA devices, over NCCL: the tokens of one."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from support.engines import build_engine, greedy, random_profile, random_prompts, run
from support.tiny_models import VOCAB_SIZE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

PROMPTS = random_prompts([1, 15, 33, 200, 700], VOCAB_SIZE)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_greedy_tokens_are_those_of_one_device(
    tiny_model: Callable[[str], Path], tmp_path: Path, name: str, backend: str
) -> None:
    folder = tiny_model(name)
    settings: dict[str, object] = {
        "device": "cuda",
        "dtype": "float32",
        "attention_backend": backend,
        "profile": str(random_profile(folder, tmp_path / "profile.json", seed=1)),
        "kv_cache_memory_bytes": None,
        "gpu_memory_utilization": 0.3,
    }
    one = build_engine(folder, **settings)
    expected = run(one, PROMPTS, greedy(24))
    with closing(build_engine(folder, tensor_parallel_size=2, **settings)) as two:
        assert [rank.device for rank in two.info().ranks] == ["cuda:0", "cuda:1"]
        assert not two.uses_cuda_graphs
        assert run(two, PROMPTS, greedy(24)) == expected
