"""The first step, so that memory peaks and kernels compile at start and not while serving."""

from typing import Protocol

import torch

from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine.memory import arena_param
from headlong.server.engine.model import LoadedModel
from headlong.server.engine.outputs import RequestOutput
from headlong.server.engine.request import EngineRequest
from headlong.server.engine.sampling_params import SamplingParams
from headlong.server.engine.weights import first_line
from headlong.server.errors import ConfigError, EngineDeadError


class Warmed(Protocol):
    """What of an engine is needed."""

    @property
    def config(self) -> EngineConfig:
        """What was loaded and how."""
        ...

    @property
    def model(self) -> LoadedModel:
        """The loaded model."""
        ...

    @property
    def attention_backend(self) -> str:
        """What computes attention."""
        ...

    @property
    def max_model_len(self) -> int:
        """Most tokens of a request."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        ...

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request."""
        ...

    def step(self) -> list[RequestOutput]:
        """Run one batch."""
        ...


def warm_up(engine: Warmed) -> None:
    """Run the largest step once.

    Args:
        engine: Without requests.

    Raises:
        ConfigError: There is no memory for it, or Triton cannot compile.
    """
    prompt_len = min(engine.config.max_num_batched_tokens, engine.max_model_len - 1)
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    engine.add_request(EngineRequest("warm-up", [0] * prompt_len, params))
    try:
        while engine.has_work:
            engine.step()
    except EngineDeadError:
        # Another rank ended: it says why.
        raise
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "the memory that is left beside the KV cache is too small for a step: give the cache "
            "less",
            arena_param(engine.config, engine.model.device),
        ) from error
    except Exception as error:
        if engine.attention_backend != "triton":
            raise
        # Triton compiles at the first launch, with the machine's C compiler.
        raise ConfigError(
            f"the first step with Triton's kernels failed: {first_line(error)}; "
            "attention_backend 'torch' does without them",
            "attention_backend",
        ) from error
