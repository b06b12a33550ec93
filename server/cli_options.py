"""The command line's options for the engine; each sets the `EngineConfig` field of its name."""

from typing import Annotated

import typer

from headlong.server.engine.engine_config import DType

Profile = Annotated[
    str | None,
    typer.Option(
        help="Head profile; 'none' for a full cache. By default the model folder's profile.json."
    ),
]
Sparsity = Annotated[
    float | None, typer.Option(help="Fraction of KV heads that stream, in place of the profile's.")
]
Threshold = Annotated[
    float | None, typer.Option(help="Least score of a retrieval head, in place of the profile's.")
]
SinkSize = Annotated[int | None, typer.Option(help="First tokens that streaming heads keep.")]
WindowSize = Annotated[int | None, typer.Option(help="Recent tokens that streaming heads keep.")]
DTypeOption = Annotated[DType | None, typer.Option(help="Of weights and cache; auto is float32.")]
Device = Annotated[str | None, typer.Option(help="auto or cpu.")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens of a cache page.")]
KVCacheMemoryBytes = Annotated[
    int | None, typer.Option("--kv-cache-memory-bytes", help="Size of the KV cache.")
]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Most tokens of prompt and completion together.")
]
MaxNumSeqs = Annotated[int | None, typer.Option(help="Most sequences that run at once.")]
MaxNumBatchedTokens = Annotated[int | None, typer.Option(help="Most tokens of one step.")]
Seed = Annotated[int | None, typer.Option(help="Of requests that bring none of their own.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub checkpoint.")]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option("--trust-remote-code", help="Run code that the checkpoint brings along."),
]
