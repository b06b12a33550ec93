"""Settings that do not go together, or say nothing, are refused; none is quietly ignored."""

import pytest

from headlong.server.engine.engine_config import EngineConfig
from headlong.server.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "param", "message"),
    [
        ({"kv_cache_dtype": "int3"}, "kv_cache_dtype", "int3"),
        ({"retrieval_budget": 47}, "retrieval_budget", "at least [0-9]+ blocks of 16 tokens"),
        ({"selection_reuse_steps": 2}, "selection_reuse_steps", "without retrieval_budget"),
        (
            {"retrieval_budget": 128, "selection_reuse_steps": 17},
            "selection_reuse_steps",
            "in 1 to 16",
        ),
        ({"selection_min_similarity": 0.5}, "selection_min_similarity", "without retrieval_budget"),
        (
            {"retrieval_budget": 128, "selection_min_similarity": 0.5},
            "selection_min_similarity",
            "while selection_reuse_steps is 1",
        ),
        (
            {
                "retrieval_budget": 128,
                "selection_reuse_steps": 2,
                "selection_min_similarity": 1.5,
            },
            "selection_min_similarity",
            "in -1 to 1",
        ),
        ({"compensation_from_layer": 0}, "compensation_from_layer", "without compensation"),
        ({"disk_cache_bytes": 1 << 20}, "disk_cache_bytes", "without disk_cache_dir"),
        ({"disk_cache_dir": "/tmp"}, "disk_cache_dir", "without host_cache_bytes"),
        (
            {"host_cache_bytes": 1 << 20, "enable_prefix_caching": False},
            "host_cache_bytes",
            "0 without a prefix cache",
        ),
        (
            {"host_cache_bytes": 1 << 20, "tensor_parallel_size": 2},
            "host_cache_bytes",
            "0 when tensor_parallel_size is more than 1",
        ),
        (
            {"quantization": "int8wo", "tensor_parallel_size": 2},
            "quantization",
            "None when tensor_parallel_size is more than 1",
        ),
    ],
)
def test_what_is_refused(settings: dict[str, object], param: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        EngineConfig(model="m", **settings)  # type: ignore[arg-type]
    assert caught.value.param == param
