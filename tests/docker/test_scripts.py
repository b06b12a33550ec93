"""The small programs of the image: its probe, and what it is installed from."""

import sys

import pytest

from headlong.server.api_keys import read_api_keys
from headlong.server.config import ServerConfig
from support.deployment import DOCKER, ROOT, run, script

PROBE = script("probe.py")
REQUIREMENTS = script("requirements.py")["requirements"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("keys.txt", "# of the team\n\nalice: sk-1\nbob:sk-2\n"),
        ("keys.txt", "alice:sk:1\n"),
        ("keys.yaml", "alice: sk-1\nbob: sk-2\n"),
        ("keys.yaml", 'alice: "sk-1"\n'),
        ("keys.yaml", "# of the team\n'alice': 'sk-1'\n"),
    ],
)
def test_the_probe_s_key_is_one_that_the_server_knows(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    key = PROBE["first_key"]({"HEADLONG_API_KEY_FILE": str(path)})
    assert read_api_keys(ServerConfig(api_key_file=path)).name_of(key.encode()) == "alice"


def test_keys_of_the_environment_come_first(tmp_path):
    assert PROBE["first_key"]({"HEADLONG_API_KEY": "a,b"}) == "a"
    assert PROBE["first_key"]({}) is None


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({}, "http://127.0.0.1:8000/ready"),
        ({"HEADLONG_HOST": "0.0.0.0", "HEADLONG_PORT": "81"}, "http://127.0.0.1:81/ready"),
        ({"HEADLONG_HOST": "::"}, "http://[::1]:8000/ready"),
        ({"HEADLONG_HOST": "fd00::1"}, "http://[fd00::1]:8000/ready"),
        ({"HEADLONG_SSL_CERTFILE": "/a.pem"}, "https://127.0.0.1:8000/ready"),
    ],
)
def test_the_probe_asks_where_the_server_listens(variables, url):
    assert PROBE["probe_request"]("/ready", variables).full_url == url


def test_the_probe_ends_with_the_answer(answering):
    port, seen = answering
    ask = [sys.executable, "-I", DOCKER / "probe.py"]
    variables = f"HEADLONG_PORT={port}", "HEADLONG_API_KEY=hush", "http_proxy=http://127.0.0.1:9"
    done = run("env", *variables, *ask, "/ready")
    assert (done.returncode, done.stderr) == (0, "")
    assert seen == [("/ready", "Bearer hush")]
    done = run("env", *variables, *ask, "/gone")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "503" in done.stderr


def test_the_probe_of_nobody_fails_in_one_line():
    done = run("env", "HEADLONG_PORT=1", sys.executable, "-I", DOCKER / "probe.py")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    done = run("env", "HEADLONG_PORT=x", sys.executable, "-I", DOCKER / "probe.py")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    done = run("env", "HEADLONG_API_KEY_FILE=/none", sys.executable, "-I", DOCKER / "probe.py")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_requirements_are_the_project_s():
    plain = REQUIREMENTS(ROOT / "pyproject.toml", "")
    assert any(line.startswith("torch>=") for line in plain)
    traced = REQUIREMENTS(ROOT / "pyproject.toml", "tracing, ray")
    assert traced[: len(plain)] == plain
    assert any(line.startswith("ray[serve]") for line in traced)


def test_an_unknown_extra_is_one_line():
    path = DOCKER / "requirements.py"
    done = run(sys.executable, path, ROOT / "pyproject.toml", "ray,tracking")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no extra 'tracking'" in done.stderr


def test_every_requirement_of_the_image_is_pinned():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0] for line in pins if "==" in line}
    wanted = REQUIREMENTS(ROOT / "pyproject.toml", "tracing,ray,gpu")
    assert {line.partition(">=")[0].partition("[")[0] for line in wanted} <= pinned
