"""The options of ``headlong bench``, by the heading that they stand under in its help."""

from pathlib import Path
from typing import Annotated, Literal

import typer

_LOAD = "Load"
_PROMPTS = "Prompts"
_RANDOM = "--workload random"
_SHARED = "--workload shared-prefix"
_CHAT = "--workload chat"
_NEEDLE = "--workload needle"
_TRACE = "--workload trace"
_RESULTS = "Results"

Url = Annotated[str | None, typer.Argument(help="Where the server is.", metavar="URL")]
BaseUrl = Annotated[
    str | None, typer.Option(help="The same as an option. Default: http://127.0.0.1:8000.")
]
Model = Annotated[str | None, typer.Option(help="Default: the one that the server lists.")]
Endpoint = Annotated[
    Literal["completions", "chat"] | None,
    typer.Option(help="Default: chat for chats and needles, completions for all else."),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        help="Others see it in the list of processes: prefer HEADLONG_API_KEY or --api-key-file."
    ),
]
ApiKeyFile = Annotated[Path | None, typer.Option(help="File that holds the key.")]
Timeout = Annotated[float, typer.Option(help="Seconds until a request has failed.")]
RequestRate = Annotated[
    list[float] | None,
    typer.Option(
        help="Requests a second, however slow the answers are: an open loop. May be repeated: "
        "a sweep. Default: a closed loop of --max-concurrency clients.",
        metavar="<float>",
        rich_help_panel=_LOAD,
    ),
]
MaxConcurrency = Annotated[
    int | None,
    typer.Option(
        help="Clients of a closed loop, by default 8; most requests in flight of an open one.",
        rich_help_panel=_LOAD,
    ),
]
NumPrompts = Annotated[
    int | None,
    typer.Option(
        help="Requests, or chats. Default: 100, and the whole of a trace.",
        rich_help_panel=_LOAD,
    ),
]
NumWarmups = Annotated[
    int,
    typer.Option(
        "--num-warmups",
        "--warmups",
        help="More of them, sent before the test and left out of all figures.",
        rich_help_panel=_LOAD,
    ),
]
Arrivals = Annotated[
    Literal["constant", "poisson", "gamma", "ramp"] | None,
    typer.Option(
        help="How requests of a rate follow each other: constant, poisson, gamma or ramp. "
        "Default: poisson, or what the options below mean.",
        metavar="<str>",
        rich_help_panel=_LOAD,
    ),
]
Burstiness = Annotated[
    float | None,
    typer.Option(
        help="Shape of gamma arrivals: under 1 in bursts, 1 Poisson, above more regular.",
        rich_help_panel=_LOAD,
    ),
]
RampUpStartRps = Annotated[
    float | None,
    typer.Option(help="Rate that a ramp begins with. Default: 0.", rich_help_panel=_LOAD),
]
RampUpDuration = Annotated[
    float | None,
    typer.Option(help="Seconds in which a ramp reaches --request-rate.", rich_help_panel=_LOAD),
]
Workload = Annotated[
    Literal["random", "shared-prefix", "chat", "needle", "trace"] | None,
    typer.Option(
        help="What is asked: random, shared-prefix, chat, needle or trace. Default: random, "
        "or trace with --trace.",
        metavar="<str>",
        rich_help_panel=_PROMPTS,
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub id of the model's tokenizer, which makes lengths exact. "
        "Default: words are counted.",
        rich_help_panel=_PROMPTS,
    ),
]
RandomInputLen = Annotated[
    int | None,
    typer.Option(help="Tokens of a prompt. Default: 1024.", rich_help_panel=_RANDOM),
]
RandomOutputLen = Annotated[
    int | None,
    typer.Option(help="Tokens of an answer. Default: 128.", rich_help_panel=_RANDOM),
]
RandomRangeRatio = Annotated[
    float | None,
    typer.Option(
        help="How far lengths differ from those, 0 to below 1. Default: 0.",
        rich_help_panel=_RANDOM,
    ),
]
NumPrefixes = Annotated[
    int | None,
    typer.Option(help="How many there are. Default: 10.", rich_help_panel=_SHARED),
]
PrefixLen = Annotated[
    int | None,
    typer.Option(help="Tokens that are shared. Default: 1024.", rich_help_panel=_SHARED),
]
SuffixLen = Annotated[
    int | None,
    typer.Option(help="Tokens after those. Default: 128.", rich_help_panel=_SHARED),
]
NumTurns = Annotated[
    int | None,
    typer.Option(help="Questions of each. Default: 4.", rich_help_panel=_CHAT),
]
DocumentLen = Annotated[
    int | None,
    typer.Option(help="Tokens of the document. Default: 4096.", rich_help_panel=_CHAT),
]
SharedDocument = Annotated[
    bool,
    typer.Option(
        "--shared-document",
        help="All are about one document.",
        metavar="",
        rich_help_panel=_CHAT,
    ),
]
ContextLen = Annotated[
    list[int] | None,
    typer.Option(
        help="Tokens of a prompt; may be repeated. Default: 1024.",
        metavar="<int>",
        rich_help_panel=_NEEDLE,
    ),
]
OutputLen = Annotated[
    int | None,
    typer.Option(
        help="Tokens of an answer where the workload is shared-prefix, chat or trace. "
        "Default: 128, of a chat 32.",
        rich_help_panel=_PROMPTS,
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        help="JSONL file, a request a line with its timestamp.",
        rich_help_panel=_TRACE,
    ),
]
TraceSpeed = Annotated[
    float | None,
    typer.Option(help="How many times faster it is sent.", rich_help_panel=_TRACE),
]
TraceTimestampUnit = Annotated[
    Literal["s", "ms"] | None,
    typer.Option(
        help="Of its timestamps. Default: ms for Mooncake's, else s.",
        rich_help_panel=_TRACE,
    ),
]
TraceBlockSize = Annotated[
    int | None,
    typer.Option(
        help="Tokens that one of its hash_ids stands for. Default: 512, as in Mooncake's.",
        rich_help_panel=_TRACE,
    ),
]
IgnoreEos = Annotated[
    bool | None,
    typer.Option(
        "--ignore-eos/--no-ignore-eos",
        help="Answers are as long as they may be. Not every server knows the field. "
        "Default: what the workload needs.",
        metavar="",
        rich_help_panel=_PROMPTS,
    ),
]
Seed = Annotated[int, typer.Option(help="Of prompts and arrivals.", rich_help_panel=_PROMPTS)]
Goodput = Annotated[
    list[str] | None,
    typer.Option(
        help="Aims in ms, such as ttft:500 tpot:50; also itl and e2el. Goodput is what meets "
        "them all.",
        metavar="<str>...",
        rich_help_panel=_RESULTS,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Report, as JSON.", rich_help_panel=_RESULTS),
]
SaveDetailed = Annotated[
    bool,
    typer.Option(
        "--save-detailed",
        help="The report holds every request and its answer.",
        metavar="",
        rich_help_panel=_RESULTS,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        help="Picture, as PNG: latency over time; of a sweep also over throughput.",
        rich_help_panel=_RESULTS,
    ),
]
