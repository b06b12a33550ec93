"""The engine over the Triton kernels, and its decodes over fixed addresses, as graphs have them.

In the interpreter there is nothing to capture: a captured computation is the computation itself,
run anew over the same addresses.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from headlong.server.engine.engine import Engine
from headlong.server.engine.runner import LocalRunner
from headlong.server.errors import ConfigError
from support.engines import build_engine, greedy, random_profile, random_prompts, run
from support.tiny_models import VOCAB_SIZE
from support.triton import INTERPRETED, triton_suite

if TYPE_CHECKING:
    from headlong.server.engine.decode_graphs import DecodeGraphs, Forward

pytestmark = [
    *triton_suite,
    pytest.mark.skipif(not INTERPRETED, reason="on a CUDA device, tests/gpu has the real graphs"),
]

PROMPTS = random_prompts([1, 40, 17], VOCAB_SIZE)


def run_again(forward: "Forward") -> "Forward":
    return forward


def with_graphs(engine: Engine) -> "DecodeGraphs":
    from headlong.kernels.triton_attention import TritonAttention
    from headlong.server.engine.decode_graphs import DecodeGraphs

    runner = engine._runner
    assert isinstance(runner, LocalRunner)
    assert isinstance(runner.attention, TritonAttention)
    graphs = DecodeGraphs(engine.model, runner.attention, engine.config.max_num_seqs, run_again)
    engine._forward.graphs = graphs
    return graphs


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_tokens_are_those_of_the_torch_backend(
    tiny_model: Callable[[str], Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(name)
    profile = str(random_profile(folder, tmp_path / "profile.json", seed=2))
    settings: dict[str, object] = {"profile": profile, "max_num_seqs": 4, "max_model_len": 64}
    expected = run(build_engine(folder, **settings), PROMPTS, greedy(4))
    engine = build_engine(folder, attention_backend="triton", **settings)
    assert not engine.uses_cuda_graphs
    assert run(engine, PROMPTS, greedy(4)) == expected

    graphs = with_graphs(engine)
    assert graphs.sizes == (1, 2, 4)
    taken: list[int] = []
    forward = graphs.forward

    def noted(tokens: torch.Tensor, *rest: object) -> torch.Tensor | None:
        taken.append(len(tokens))
        return forward(tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(graphs, "forward", noted)
    assert run(engine, PROMPTS, greedy(4)) == expected
    # Three sequences in the graph of four, and never a step with a prompt in it.
    assert set(taken) == {3}


def test_pages_are_chosen_inside_a_graph(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama")
    profile = str(random_profile(folder, tmp_path / "profile.json", seed=2))
    settings: dict[str, object] = {
        "profile": profile,
        "block_size": 8,
        "max_num_seqs": 2,
        "max_model_len": 128,
        "enable_prefix_caching": False,
        "retrieval_budget": 64,
        "selection_reuse_steps": 2,
        "selection_min_similarity": 0.5,
    }
    prompts = random_prompts([75, 12], VOCAB_SIZE)
    expected = run(build_engine(folder, **settings), prompts, greedy(6))
    settings["attention_backend"] = "triton"
    engine = build_engine(folder, **settings)
    assert run(engine, prompts, greedy(6)) == expected
    graphs = with_graphs(engine)
    taken: list[bool] = []
    forward = graphs.forward

    def noted(*arguments: torch.Tensor) -> torch.Tensor | None:
        logits = forward(*arguments)  # type: ignore[arg-type]
        taken.append(logits is not None)
        return logits

    monkeypatch.setattr(graphs, "forward", noted)
    assert run(engine, prompts, greedy(6)) == expected
    assert all(taken)
    assert len(taken) == 5


def test_a_batch_that_does_not_fit_is_run_without_a_graph(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(tiny_model("llama"), attention_backend="triton", max_model_len=64)
    expected = run(engine, PROMPTS, greedy(3))
    graphs = with_graphs(engine)
    monkeypatch.setattr(graphs._buffer, "take", lambda batch, num_seqs: False)
    assert run(engine, PROMPTS, greedy(3)) == expected


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("called a synchronizing CUDA operation"), "cannot be captured: called a"),
        (torch.OutOfMemoryError("CUDA out of memory"), "no memory for them"),
    ],
)
def test_a_model_that_cannot_be_captured_runs_without_graphs(
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: RuntimeError,
    said: str,
) -> None:
    engine = build_engine(tiny_model("llama"), attention_backend="triton", max_model_len=64)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("headlong.server.engine.decode_graphs.DecodeGraphs", fail)
    monkeypatch.setattr(engine, "model", replace(engine.model, device=torch.device("cuda")))
    monkeypatch.setattr("headlong.server.engine.engine.current", nullcontext)
    engine._capture_graphs()
    assert not engine.uses_cuda_graphs
    assert said in caplog.text


def test_a_first_step_that_fails_is_the_backends_fault(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr("headlong.kernels.triton_attention.append_kv", fail)
    with pytest.raises(ConfigError, match=r"find C compiler.*'torch' does without") as caught:
        build_engine(tiny_model("llama"), attention_backend="triton")
    assert caught.value.param == "attention_backend"


def test_sizes() -> None:
    from headlong.server.engine.decode_graphs import batch_sizes

    assert batch_sizes(1) == (1,)
    assert batch_sizes(3) == (1, 2, 3)
    assert batch_sizes(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert batch_sizes(100)[-4:] == (64, 80, 96, 100)
    assert batch_sizes(500)[-3:] == (384, 448, 500)


def test_a_head_size_without_a_kernel_is_refused_by_name(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headlong.kernels.triton_variant.HEAD_DIMS", (32, 64))
    with pytest.raises(ConfigError, match="head_dim must be one of") as caught:
        build_engine(tiny_model("llama"), attention_backend="triton")
    assert caught.value.param == "attention_backend"
