"""A memory plan as tables for people, and as one JSON object for programs."""

from collections.abc import Iterator

from rich.table import Table

from headlong.server.engine.describe import format_bytes
from headlong.server.engine.sizing import CacheSizing, Sizing
from headlong.server.engine.weight_quantisation import describe_quantisation
from headlong.server.engine.weights import dtype_name

Json = dict[str, object]


def plan_json(sizing: Sizing) -> Json:
    """A plan as JSON: bytes and tokens as whole numbers, null for what has no limit.

    The keys of the plan itself stand at the top; `full_cache`, and `no_profile` where it differs,
    have the same keys.
    """
    request, model, memory = sizing.request, sizing.model, sizing.memory
    config, gpu, even = request.config, request.gpu, request.even
    made: Json = {
        "model": config.model,
        "model_type": model.config.model_type,
        "num_parameters": sizing.num_parameters,
        "num_layers": model.geometry.num_layers,
        "num_kv_heads": model.geometry.num_kv_heads,
        "head_dim": model.geometry.head_dim,
        "gpu": None if gpu is None else {"name": gpu.name, "total_bytes": gpu.total_bytes},
        "gpu_memory_utilization": None if gpu is None else sizing.utilization,
        "dtype": dtype_name(model.dtype),
        "quantization": config.quantization,
        "kv_cache_dtype": kv_dtype_name(sizing),
        "compensation": config.compensation,
        "retrieval_budget": config.retrieval_budget,
        "profile": config.profile,
        "sparsity": streaming_fraction(sizing),
        "labels": "profile" if config.profile else ("even" if even is not None else "full"),
        "block_size": config.block_size,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "model_max_context": model.max_context,
        "activation_bytes": sizing.activation_bytes,
        "sampling_bytes": None if memory is None else memory.sampling_bytes,
        "choices_bytes": None if memory is None else memory.choices_bytes,
        "cuda_context_bytes": None if memory is None else memory.used_bytes - sizing.weights_bytes,
        "kv_cache_bytes": sizing.cache_bytes,
        "arena_bytes": sizing.arena_bytes,
        **_cache_json(sizing, sizing.own),
        "full_cache": _cache_json(sizing, sizing.full_cache),
    }
    if sizing.no_profile is not None:
        made["no_profile"] = _cache_json(sizing, sizing.no_profile)
    made["notes"] = list(notes(sizing))
    return made


def _cache_json(sizing: Sizing, cache: CacheSizing) -> Json:
    shape = cache.shape
    return {
        "weights_bytes": sizing.weights_bytes,
        "kv_bytes_per_token": shape.growing_token_bytes,
        "kv_bytes_per_sequence": shape.constant_sequence_bytes,
        "max_context_tokens": cache.max_context_tokens,
        "cache_tokens": cache.cache_tokens,
        "groups": [
            {
                "name": group.name,
                "num_heads": len(group.members),
                "sink_size": group.policy.sink_size,
                "window_size": None if group.policy.keeps_all else group.policy.window_size,
                "kv_bytes_per_token": shape.token_bytes(group),
                "kv_bytes_per_sequence": shape.window_bytes(group),
            }
            for group in shape.groups
        ],
        "sequences": {str(length): count for length, count in cache.sequences.items()},
        "sequence_bytes": {str(length): shape.sequence_bytes(length) for length in cache.sequences},
    }


def title(sizing: Sizing) -> str:
    """What is planned for, in one line."""
    request, model = sizing.request, sizing.model
    config = request.config
    place = "" if request.gpu is None else f" on {request.gpu.name}"
    weights = config.quantization or dtype_name(model.dtype)
    return (
        f"{config.model}{place}: {model.config.model_type}, {sizing.num_parameters / 1e9:.3g} B "
        f"parameters in {weights}, KV cache in {kv_dtype_name(sizing)}"
    )


def memory_table(sizing: Sizing) -> Table:
    """Draws what takes the memory, one line each."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("what")
    for _ in range(2):
        table.add_column(justify="right")
    for name, size in memory_parts(sizing):
        table.add_row(name, format_bytes(size), grouped(size))
    return table


def memory_parts(sizing: Sizing) -> list[tuple[str, int]]:
    """What takes the memory, in bytes; on a GPU it adds up to all of it."""
    config, memory = sizing.request.config, sizing.memory
    step = f"activations of a step of {config.max_num_batched_tokens} tokens"
    parts = [("weights", sizing.weights_bytes), (step, sizing.activation_bytes)]
    if memory is None:
        return [*parts, ("KV cache", sizing.cache_bytes)]
    context = memory.used_bytes - sizing.weights_bytes
    parts.append(
        (f"sampling for {counted(config.max_num_seqs, 'sequence')}", memory.sampling_bytes)
    )
    if memory.choices_bytes:
        parts.append(("chosen pages", memory.choices_bytes))
    parts += [
        ("CUDA and kernels, an allowance", context),
        ("KV cache", sizing.cache_bytes),
    ]
    rest = memory.total_bytes - sum(size for _, size in parts)
    return [*parts, (f"left alone at gpu_memory_utilization {sizing.utilization:g}", rest)]


def cache_table(sizing: Sizing) -> Table:
    """Draws what the KV cache takes and holds, beside a full cache."""
    columns = [(own_name(sizing), sizing.own)]
    if sizing.no_profile is not None:
        columns.append(("no profile", sizing.no_profile))
    columns.append(("full cache", sizing.full_cache))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("KV cache")
    for name, _ in columns:
        table.add_column(name, justify="right")
    table.add_column("of full", justify="right")

    def row(name: str, values: list[int | None]) -> None:
        table.add_row(
            name,
            *("any" if value is None else grouped(value) for value in values),
            _ratio(values[0], values[-1]),
        )

    caches = [cache for _, cache in columns]
    row("bytes for each token", [each.shape.growing_token_bytes for each in caches])
    row("bytes for each sequence", [each.shape.constant_sequence_bytes for each in caches])
    row("longest context, tokens", [each.max_context_tokens for each in caches])
    row("tokens in all", [each.cache_tokens for each in caches])
    for length in sizing.request.lengths:
        row(f"sequences of {tokens_name(length)}", [each.sequences[length] for each in caches])
    return table


def group_lines(sizing: Sizing) -> Iterator[str]:
    """One line for each head group, as at the engine's start."""
    shape = sizing.own.shape
    for group in shape.groups:
        policy = group.policy
        keeps = "every token" if policy.keeps_all else (
            f"sink {policy.sink_size} + window {policy.window_size} tokens"
        )  # fmt: skip
        size = (
            f"{grouped(shape.token_bytes(group))} B for each token"
            if policy.keeps_all
            else f"{grouped(shape.window_bytes(group))} B for each sequence"
        )
        yield f"  {group.name:<14} {len(group.members):>5} heads  {keeps:<34} {size}"


def notes(sizing: Sizing) -> Iterator[str]:
    """What a reader of the figures has to know, one sentence a line."""
    request, model = sizing.request, sizing.model
    config = request.config
    if config.quantization is not None:
        told = describe_quantisation(config.quantization, request.processor, model.dtype)
        yield f"--quantization {config.quantization}: {told}."
    if request.even is not None:
        yield (
            f"Without a profile {request.even.sparsity:g} of the KV heads are taken to stream, "
            "evenly over the layers."
        )
    elif config.profile is None:
        yield "Without a profile or a sparsity every head keeps its full cache."
    if sizing.longest_served > (sizing.own.max_context_tokens or sizing.longest_served):
        yield (
            f"--max-model-len {config.max_model_len} does not fit: the engine would not start."
            if config.max_model_len
            else "The memory holds no sequence of the model's own context: the engine will serve "
            "shorter ones."
        )
    longest = sizing.own.max_context_tokens
    fits = "any length" if longest is None else f"{grouped(longest)} tokens"
    yield (
        f"The model was made for {grouped(model.max_context)} tokens, and the engine serves no "
        f"more; the memory holds a sequence of {fits}."
    )
    yield (
        "Sequences are those that run at once if --max-num-seqs is that number, which takes "
        f"sampling's memory too; here it is {config.max_num_seqs}."
    )
    if any(max(each.sequences.values()) >= config.max_num_batched_tokens for each in _all(sizing)):
        yield (
            "There are never more sequences than --max-num-batched-tokens, "
            f"{config.max_num_batched_tokens}."
        )
    if sizing.arena_bytes < 0.99 * sizing.cache_bytes:
        yield (
            f"The engine will allocate {format_bytes(sizing.arena_bytes)} of KV cache: "
            f"{counted(config.max_num_seqs, 'sequence')} of {grouped(sizing.longest_served)} "
            "tokens can fill no more."
        )


def _all(sizing: Sizing) -> Iterator[CacheSizing]:
    yield from (sizing.own, sizing.full_cache)


def kv_dtype_name(sizing: Sizing) -> str:
    """What K and V are stored in."""
    asked = sizing.request.config.kv_cache_dtype
    return dtype_name(sizing.own.shape.dtype) if asked == "auto" else asked


def streaming_fraction(sizing: Sizing) -> float:
    """Fraction of all KV heads that do not keep everything."""
    groups = sizing.own.shape.groups
    dropping = sum(len(group.members) for group in groups if not group.policy.keeps_all)
    return dropping / sum(len(group.members) for group in groups)


def own_name(sizing: Sizing) -> str:
    """What the plan's own labels are called beside the full cache."""
    fraction = streaming_fraction(sizing)
    return f"{fraction:.0%} streaming" if fraction else "every head retrieves"


def tokens_name(count: int) -> str:
    """A length for people: "8k", "1M", "5 000"."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return grouped(count)


def counted(count: int, thing: str) -> str:
    """A number of things: "1 sequence", "64 sequences"."""
    return f"{grouped(count)} {thing}{'' if count == 1 else 's'}"


def grouped(count: int) -> str:
    """A whole number with its thousands apart."""
    return f"{count:,}".replace(",", " ")


def _ratio(own: int | None, full: int | None) -> str:
    return f"{own / full:.2f}x" if own and full else ""
