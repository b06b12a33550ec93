"""The ``headlong`` command.

What is slow to import, PyTorch before all, is imported by the command that needs it.
"""

# ruff: noqa: PLC0415

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

import headlong.server.engine.quiet_libraries  # noqa: F401
from headlong.server.commands.bench import bench_app
from headlong.server.commands.evaluate import evaluate
from headlong.server.commands.options import takes_settings
from headlong.server.commands.plan import plan
from headlong.server.commands.profile import profile_app
from headlong.server.commands.serve_ray import serve_ray
from headlong.server.commands.serving_settings import read_serving_settings
from headlong.server.config import ServerConfig, config_path
from headlong.server.config_file import read_config_file
from headlong.server.config_sources import Sources
from headlong.server.config_text import config_text
from headlong.server.console import console
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine_settings import EngineSettings
from headlong.server.errors import ConfigError, HeadlongError

EXIT_FAILURE = 1
EXIT_USAGE = 2

SETTINGS = (*ServerConfig.model_fields, *EngineSettings.model_fields)
FOR_MANY_REQUESTS = (
    "arena_balance",
    "block_size",
    "canary_rate",
    "chunked_prefill_size",
    "disk_cache_bytes",
    "disk_cache_dir",
    "enable_prefix_caching",
    "host_cache_bytes",
    "kv_policy_max_sink_size",
    "kv_policy_max_window_size",
    "kv_policy_tokens",
    "max_num_batched_tokens",
    "max_num_seqs",
)
"""What a single prompt has no use for."""
EPILOG = (
    "Every option can also be set as HEADLONG_<OPTION> in the environment, and in the file of "
    "--config. The command line wins over the environment, and the environment over the file."
)

app = typer.Typer(
    name="headlong",
    help="Serve long-context language models with a head-aware KV cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
app.add_typer(profile_app, name="profile")
app.command("eval")(evaluate)
app.command()(plan)
app.command("serve-ray")(serve_ray)


@app.command(epilog=EPILOG)
@takes_settings(ServerConfig, EngineSettings, without={"model"})
def serve(
    given: dict[str, object],
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id; the embedded demo model by default.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; its keys are the flags' names.")
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config", help="Print all settings as such a file, and end.", metavar=""
        ),
    ] = False,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API."""
    path = config_path(config)
    file = read_config_file(path, SETTINGS) if path is not None else None
    sources = Sources({**given, "model": model}, file)
    with sources.named():
        server_config, settings, engine_config = read_serving_settings(sources)
        if print_config:
            typer.echo(config_text(sources, server_config, settings, engine_config), nl=False)
            return
        code = _serve(server_config, engine_config)
    raise typer.Exit(code)


def _serve(server_config: ServerConfig, engine_config: EngineConfig) -> int:
    from headlong.server.start_checks import check_start
    from headlong.server.telemetry.logs import configure_logs

    say = configure_logs(server_config)
    check_start(server_config)

    from headlong.server.listen import bind, listen

    with bind(server_config.host, server_config.port) as sock:
        from headlong.server.app import create_app
        from headlong.server.start_engine import start_engine

        engine = start_engine(engine_config, server_config)
        application = create_app(engine, server_config)
        for line in engine.describe():
            say(line)
        say(f"Serving {', '.join(server_config.served_model_name)}")
        return listen(application, engine, sock, server_config)


@app.command()
@takes_settings(EngineSettings, without={"model", *FOR_MANY_REQUESTS})
def generate(
    given: dict[str, object],
    model: Annotated[str, typer.Argument(help="Folder or hub id.")],
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Use the chat template; by default if the model has one.",
            metavar="",
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus to sample from.")] = None,
) -> None:
    """Generate text for one prompt and print it."""
    text = _read_prompt(prompt)
    sources = Sources({**given, "model": model})
    with sources.named():
        engine_config = sources.read(EngineSettings).to_engine_config(default_model=model)

        from headlong.server.async_engine import AsyncEngine
        from headlong.server.commands.one_off import generate_text
        from headlong.server.engine.engine import Engine

        engine = AsyncEngine(Engine(engine_config))

    async def run() -> None:
        pieces = generate_text(
            engine,
            text,
            chat=chat,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
        )
        async for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")

    asyncio.run(run())


def main() -> None:
    """Runs the command; what the user can mend is one line on standard error."""
    try:
        app()
    except (HeadlongError, ValueError, OSError) as error:
        message = " ".join(str(error).split())
        console(stderr=True).print(f"headlong: {message}")
        mendable = isinstance(error, ConfigError | ValueError) or (
            isinstance(error, HeadlongError) and error.status < 500
        )
        sys.exit(EXIT_USAGE if mendable else EXIT_FAILURE)


def _read_prompt(prompt: str) -> str:
    try:
        if prompt == "-":
            return sys.stdin.buffer.read().decode()
        # An argument that is not UTF-8 arrives with lone surrogates in it.
        prompt.encode()
    except UnicodeError as error:
        raise ConfigError(f"the prompt is not valid UTF-8: {error}", "prompt") from error
    return prompt
