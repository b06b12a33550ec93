import re
import sys
import tomllib
from pathlib import Path
from unittest.mock import Mock

import pytest

from headlong.server.api.routes_health import health_router
from support.deployment import DOCKER, ROOT, read_settings, run, unknown_settings
from support.layers import ROOMS

DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
SECONDS = {"s": 1, "m": 60}


def _stages() -> dict[str, list[str]]:
    """The instructions of each stage by its name, continued lines in one."""
    stages: dict[str, list[str]] = {}
    current: list[str] = []
    text = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#"))
    for line in text.replace("\\\n", " ").splitlines():
        words = line.split()
        if words[:1] == ["FROM"]:
            current = stages.setdefault(words[-1], [])
        if words:
            current.append(" ".join(words))
    return stages


STAGES = _stages()


def _one(stage: str, instruction: str) -> str:
    (line,) = [each for each in STAGES[stage] if each.startswith(f"{instruction} ")]
    return line.removeprefix(f"{instruction} ")


def _variables(stage: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in _one(stage, "ENV").split())


def _anonymous(name: str, stage: str) -> list[str]:
    """The instructions of a stage, without the name of what it stands on."""
    lines = STAGES[name if stage == "image" else f"{name}-{stage}"]
    names = rf"\b{name}(?=-)|\b{name.upper()}_(?=BASE|TORCH)|(?<=AS ){name}|(?<=TORCH_INDEX)=\S+"
    return [re.sub(names, "", line.rstrip("=")) for line in lines]


def test_hadolint_finds_nothing() -> None:
    done = run("hadolint", DOCKER / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_both_images_differ_in_what_they_stand_on_alone() -> None:
    for stage in ("system", "dependencies", "image"):
        cpu, cuda = (_anonymous(name, stage) for name in ("cpu", "cuda"))
        assert cpu == cuda, stage
    assert list(STAGES)[-1] == "cuda", "the last stage is what is built without --target"


@pytest.mark.parametrize("base", ["CUDA_BASE", "CPU_BASE"])
def test_bases_are_pinned(base: str) -> None:
    (image,) = re.findall(rf"^ARG {base}=(.+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", image)


def test_the_version_is_the_project_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for stage in ("cpu", "cuda"):
        assert f"ARG VERSION={project['version']}" in STAGES[stage]


def test_variables_are_settings() -> None:
    variables = _variables("cpu")
    assert unknown_settings(variables) == []
    config, _ = read_settings(variables)
    assert (config.host, config.port) == ("0.0.0.0", 8000)
    assert _one("cpu", "EXPOSE") == "8000"


def test_caches_lie_in_the_volume() -> None:
    caches = [value for name, value in _variables("cpu").items() if "CACHE" in name or "HF" in name]
    assert len(caches) >= 5
    assert all(value.startswith("/cache") for value in caches)
    assert _one("cpu", "VOLUME") == '["/cache"]'


def test_the_server_is_no_root_and_gets_its_signals() -> None:
    assert _one("cpu", "USER") == "10001:10001"
    assert _one("cpu", "ENTRYPOINT") == '["tini", "--", "headlong"]'
    assert _one("cpu", "CMD") == '["serve"]'
    assert _one("cpu", "STOPSIGNAL") == "SIGTERM"
    # Nothing runs as root after the user was chosen.
    rest = STAGES["cpu"][STAGES["cpu"].index("USER 10001:10001") :]
    assert not [line for line in rest if line.startswith(("RUN", "COPY", "USER root"))]


def test_the_health_check_asks_a_route() -> None:
    command = re.search(r"CMD (\[.*\])$", _one("cpu", "HEALTHCHECK"))
    assert command is not None
    program, path = re.findall(r'"([^"]+)"', command[1])
    assert program == "headlong-probe"
    assert path in {getattr(route, "path", "") for route in health_router(Mock()).routes}
    probe_s = float(re.search(r"TIMEOUT_S = ([\d.]+)", (DOCKER / "probe.py").read_text())[1])  # type: ignore[index]
    limit = re.search(r"--timeout=(\d+)([sm])", _one("cpu", "HEALTHCHECK"))
    assert limit is not None
    assert probe_s < int(limit[1]) * SECONDS[limit[2]], "it would be killed before it gives up"


def test_every_folder_of_source_reaches_the_build() -> None:
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    wanted = {*ROOMS, "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert {f"!{each}" for each in wanted} - set(kept) == set()
    assert kept.index("*") < min(kept.index(f"!{each}") for each in wanted)


@pytest.mark.parametrize("path", sorted(DOCKER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_well_formed(path: Path) -> None:
    shell = path.read_text(encoding="utf-8").splitlines()[0].rsplit("/", 1)[-1].split()[-1]
    assert run(shell, "-n", path).stderr == ""


def test_check_refuses_what_it_does_not_know() -> None:
    done = run(DOCKER / "check.sh", "--lint")
    assert done.returncode == 2
    assert done.stderr == "usage: docker/check.sh [--lint-only]\n"


def test_check_finds_nothing_in_the_files() -> None:
    done = run("env", f"PYTHON={sys.executable}", DOCKER / "check.sh", "--lint-only")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok   hadolint" in done.stdout
