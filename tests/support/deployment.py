"""The files of ``docker/``, and the settings that they name."""

import os
import runpy
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from headlong.server.config import ServerConfig
from headlong.server.config_sources import load
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.engine_settings import EngineSettings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
SCRIPTS = Path(sysconfig.get_path("scripts"))
PATIENCE_S = 120


def run(*command: object, text: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs a program, one of Python's own packages before others of its name."""
    path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(part) for part in command],
        input=text,
        cwd=cwd,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def script(name: str) -> dict[str, Any]:
    """What a Python file of ``docker/`` defines."""
    return runpy.run_path(str(DOCKER / name))


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def read_variables(path: Path) -> dict[str, str]:
    """Lines NAME=VALUE of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(
        line.split("=", 1) for line in map(str.strip, lines) if line and not line.startswith("#")
    )


def unknown_settings(variables: Mapping[str, str]) -> list[str]:
    """Those that begin with HEADLONG_ and are no setting of the server."""
    fields = (*ServerConfig.model_fields, *EngineSettings.model_fields)
    known = {f"HEADLONG_{name.upper()}" for name in fields} | {"HEADLONG_CONFIG"}
    return [name for name in variables if name.startswith("HEADLONG_") and name not in known]


def read_settings(variables: Mapping[str, str]) -> tuple[ServerConfig, EngineConfig]:
    """What a server makes of some variables.

    Raises:
        ConfigError: It would refuse a value.
    """
    with _environment(variables):
        return load(ServerConfig), load(EngineSettings).to_engine_config("a model")


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("HEADLONG_")}
    with mock.patch.dict(os.environ, {**kept, **variables}, clear=True):
        yield
