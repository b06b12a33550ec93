import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headlong.server.engine.device import choose_device
from support.deployment import DOCKER, read_settings, read_variables, read_yaml, run
from support.deployment import unknown_settings as unknown

COMPOSE: dict[str, Any] = read_yaml(DOCKER / "compose.yaml")
SERVICES: dict[str, Any] = COMPOSE["services"]
SERVERS = ("headlong", "headlong-cpu")
EXAMPLE = read_variables(DOCKER / ".env.example")
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of docker/ with what the operator adds."""
    copy = tmp_path / "docker"
    shutil.copytree(DOCKER, copy, ignore=shutil.ignore_patterns(".env", "secrets", "models"))
    (copy / ".env").write_text((copy / ".env.example").read_text(encoding="utf-8"))
    made = run(copy / "make-keys.sh")
    assert made.returncode == 0, made.stderr
    return copy


def test_the_schema_is_kept() -> None:
    path = DOCKER / "compose.yaml"
    done = run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="needs docker-compose")
@pytest.mark.parametrize("profile", ["gpu", "cpu"])
def test_docker_compose_understands_it(folder: Path, profile: str) -> None:
    done = run("docker-compose", "--profile", profile, "config", "--quiet", cwd=folder)
    assert done.returncode == 0, done.stderr


def test_images_are_pinned() -> None:
    assert {
        name: image
        for name, service in SERVICES.items()
        if not PINNED.fullmatch(image := service["image"])
    } == {}


@pytest.mark.parametrize("name", SERVERS)
def test_the_server_takes_its_settings(name: str) -> None:
    variables = {**EXAMPLE, **SERVICES[name]["environment"]}
    assert unknown(variables) == []
    config, engine = read_settings(variables)
    assert config.host == "0.0.0.0"
    assert config.api_key_file == Path("/run/secrets/api-keys")
    assert engine.device == ("cpu" if name == "headlong-cpu" else "auto")
    # A setting for GPUs alone would be refused.
    assert choose_device(replace(engine, device="cpu")).type == "cpu"
    (published,) = SERVICES[name]["ports"]
    assert published.endswith(f":{config.port}")


@pytest.mark.parametrize("name", SERVERS)
def test_the_server_has_the_time_to_drain(name: str) -> None:
    config, _ = read_settings(SERVICES[name]["environment"])
    grace = SERVICES[name]["stop_grace_period"]
    assert int(grace.removesuffix("s")) >= config.shutdown_timeout + 10


@pytest.mark.parametrize("name", SERVERS)
def test_the_health_check_is_the_image_s(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    command = re.search(r"HEALTHCHECK .*\\\n +CMD (.*)", (DOCKER / "Dockerfile").read_text())
    assert command is not None
    assert check["test"] == ["CMD", *json.loads(command[1])]
    assert check["start_period"] == "15m"


def test_every_setting_of_the_example_may_be_empty() -> None:
    config, engine = read_settings(dict.fromkeys(EXAMPLE, ""))
    assert (config.log_format, engine.canary_rate) == ("text", 0.0)


def test_what_is_mounted_is_there() -> None:
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or source.startswith(("./", "$"))
            if source.startswith("./"):
                assert (DOCKER / source).is_dir()


def test_every_variable_has_a_default_and_an_example() -> None:
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    named = re.findall(r"\$\{(\w+)(:-[^}]+)?\}", text)
    assert {name for name, _ in named} <= set(EXAMPLE)
    assert all(default for _, default in named)


def test_keys_are_made_once(folder: Path) -> None:
    secrets = folder / "secrets"
    assert {path.name for path in secrets.iterdir()} == {
        Path(secret["file"]).name for secret in COMPOSE["secrets"].values()
    }
    before = {path: path.read_text() for path in secrets.iterdir()}
    assert run(folder / "make-keys.sh").returncode == 0
    assert {path: path.read_text() for path in secrets.iterdir()} == before
    assert len(set(before.values())) == len(before)
    assert secrets.stat().st_mode & 0o077 == 0


def test_the_server_knows_the_keys_and_prometheus_has_one(folder: Path) -> None:
    from headlong.server.api_keys import read_api_keys
    from headlong.server.config import ServerConfig

    keys = read_api_keys(ServerConfig(api_key_file=folder / "secrets" / "api-keys.txt"))
    assert len(keys) == 2
    assert keys.name_of((folder / "secrets" / "prometheus-key").read_bytes()) == "prometheus"


def test_what_the_operator_adds_is_not_committed() -> None:
    ignored = (DOCKER / ".gitignore").read_text(encoding="utf-8").split()
    assert {"/.env", "/secrets/", "/models/"} == set(ignored)
