"""Models of random weights in the shapes of Llama-3-8B and Llama-2-7B, and engines around them."""

import random
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import gpu_checkout  # noqa: F401
from gpu_device import Device
from gpu_paged import DUO_ATTENTION, Labels
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from headlong.cache.policy import HeadPolicy
from headlong.profiling.head_profile import HeadProfile
from headlong.profiling.model_identity import ModelIdentity
from headlong.server.engine.engine import Engine
from headlong.server.engine.engine_config import (
    AttentionBackendName,
    DType,
    EngineConfig,
    Quantization,
)
from headlong.server.engine.model import LoadedModel, load_model

MAX_CONTEXT = (1 << 20) + (1 << 16)
SEED = 0
LOAD_S = 15.0
"""About what loading a model takes."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama without weights.

    Attributes:
        name: For people.
        heads: "gqa" or "mha".
        config: What `LlamaConfig` takes.
    """

    name: str
    heads: str
    config: dict[str, int | float] = field(hash=False)

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def num_kv_heads(self) -> int:
        return int(self.config["num_key_value_heads"])

    @property
    def num_weights(self) -> int:
        """Of the matrices of all layers."""
        hidden, inner = self.config["hidden_size"], self.config["intermediate_size"]
        head_dim = hidden / self.config["num_attention_heads"]
        projections = 2 * hidden + 2 * head_dim * self.num_kv_heads
        return int(self.num_layers * hidden * (projections + 3 * inner))


LLAMA_3_8B = ModelShape(
    "Llama-3-8B",
    "gqa",
    {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
)
LLAMA_2_7B = ModelShape(
    "Llama-2-7B",
    "mha",
    {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "rope_theta": 10000.0,
    },
)
DRY_SHAPE = ModelShape(
    "tiny",
    "gqa",
    {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "rope_theta": 10000.0,
    },
)


@dataclass(frozen=True, slots=True)
class EngineKind:
    """What all engines of a part have in common.

    Attributes:
        dtype: Of weights and cache.
        backend: What computes attention.
        streaming: What heads keep that are not retrieval heads.
        max_num_batched_tokens: Most tokens of a step.
    """

    max_num_batched_tokens: int
    dtype: DType = "bfloat16"
    backend: AttentionBackendName = "triton"
    streaming: HeadPolicy = DUO_ATTENTION


DRY_ENGINES = EngineKind(
    max_num_batched_tokens=32, dtype="float32", streaming=HeadPolicy(sink_size=4, window_size=8)
)


def write_shape(shape: ModelShape, folder: Path) -> None:
    """Write what an engine reads of a checkpoint but its weights."""
    values = dict(shape.config)
    rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    config = LlamaConfig(**values, rope_parameters=rope, max_position_embeddings=MAX_CONTEXT)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    words = {f"w{index}": index for index in range(int(shape.config["vocab_size"]))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@dataclass(frozen=True)
class Model:
    """A loaded model and what its engines are made of."""

    shape: ModelShape
    kind: EngineKind
    loaded: LoadedModel
    config: EngineConfig

    def engine(self, retrieval: float, context: int, *, eager: bool, **settings: object) -> Engine:
        """An engine whose cache holds one sequence of `context` tokens and no more.

        Args:
            retrieval: Share of retrieval heads.
            context: Tokens.
            eager: Whether it goes without CUDA graphs.
            settings: Others of `EngineConfig`.
        """
        config = replace(
            self.config,
            enforce_eager=eager,
            max_model_len=context,
            max_num_batched_tokens=min(self.kind.max_num_batched_tokens, context - 1),
            **settings,  # type: ignore[arg-type]
        )
        with tempfile.TemporaryDirectory() as folder:
            profile = Path(folder) / "profile.json"
            self._profile(retrieval).save(profile)
            return Engine(replace(config, profile=str(profile)), self.loaded)

    def _profile(self, retrieval: float) -> HeadProfile:
        labels = random_labels(self.shape, retrieval)
        return HeadProfile(
            model=ModelIdentity.from_config(self.loaded.config),
            method="random",
            scores=tuple(tuple(map(float, row)) for row in labels),
            sink_size=self.kind.streaming.sink_size,
            window_size=self.kind.streaming.window_size,
            threshold=0.5,
        )


class Models:
    """The model that was asked for last: a device may not hold two.

    Args:
        kind: Of its engines.
        device: Where it goes.
    """

    def __init__(self, kind: EngineKind, device: Device) -> None:
        self._kind = kind
        self._device = device
        self._model: Model | None = None

    def has(self, shape: ModelShape, quantization: Quantization | None = None) -> bool:
        """Whether it is there already."""
        model = self._model
        return (
            model is not None and model.shape is shape and model.config.quantization == quantization
        )

    def take(self, shape: ModelShape, quantization: Quantization | None = None) -> Model:
        """The model, which takes the last one's place.

        Args:
            shape: Its shape.
            quantization: Of its weights; see `EngineConfig`.
        """
        if self._model is None or not self.has(shape, quantization):
            self._model = None
            self._device.release()
            self._model = self._load(shape, quantization)
        return self._model

    def _load(self, shape: ModelShape, quantization: Quantization | None) -> Model:
        # The folder is read once: engines are made of what was loaded.
        with tempfile.TemporaryDirectory() as folder:
            write_shape(shape, Path(folder))
            config = EngineConfig(
                model=folder,
                load_format="dummy",
                device=self._device.torch_device.type,
                dtype=self._kind.dtype,
                attention_backend=self._kind.backend,
                quantization=quantization,
                # The cache takes what its one sequence needs, and no more: slabs would make room
                # for one that keeps everything for every head.
                kv_cache_memory_bytes=1 << 60,
                arena_balance="fixed",
                max_num_seqs=1,
                seed=SEED,
            )
            return Model(shape, self._kind, load_model(config), config)


def random_labels(shape: ModelShape, retrieval: float) -> Labels:
    """Retrieval heads anywhere in the model, of an exact number in all."""
    heads = [
        (layer, head) for layer in range(shape.num_layers) for head in range(shape.num_kv_heads)
    ]
    chosen = set(random.Random(SEED).sample(heads, round(retrieval * len(heads))))
    return tuple(
        tuple((layer, head) in chosen for head in range(shape.num_kv_heads))
        for layer in range(shape.num_layers)
    )
