"""What docs/serving.md lists is what there is."""

import re
from pathlib import Path

import pytest
import yaml

from headlong.server.cli_options import default_of
from headlong.server.config import ServerConfig
from headlong.server.config_file import read_config_file
from headlong.server.config_sources import Sources
from headlong.server.engine_settings import EngineSettings
from headlong.server.errors import HeadlongError
from headlong.server.observer import FinishedAs

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def rows(heading):
    """First and second cell of each row of the tables under a heading."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)[1]
    cells = [re.split(r" *\| *", line.strip("| ")) for line in section.splitlines() if "|" in line]
    return [(each[0], each[1] if len(each) > 1 else "") for each in cells]


def test_every_flag_is_listed_with_its_default():
    listed = {name: default for name, default in rows("Flags") if name.startswith("`--")}
    settings = {
        name: default_of(each, name)
        for each in (ServerConfig, EngineSettings)
        for name in each.model_fields
        if name != "model"
    }
    flags = {name.split("`")[1].strip("-").replace("-", "_"): each for name, each in listed.items()}
    assert set(flags) == set(settings)
    for name, default in settings.items():
        if isinstance(default, bool):
            assert flags[name] == ("on" if default else "off")
        elif isinstance(default, int | float) and name != "kv_policy_max_window_size":
            assert float(flags[name]) == default


def test_every_metric_is_listed_with_its_type(client):
    client.post("/nowhere")
    types = re.findall(r"^# TYPE headlong:(\S+) (\S+)$", client.get("/metrics").text, re.M)
    found = {name: kind for name, kind in types if not name.endswith("_created")}
    listed = {
        name.strip("`"): kind.partition(",")[0]
        for name, kind in rows("Metrics")
        if name.startswith("`")
    }
    # In this format an info is a gauge.
    assert {name: kind.replace("info", "gauge") for name, kind in listed.items()} == found


def test_every_end_of_a_completion_is_listed():
    for reason in FinishedAs.__args__:
        assert f"`{reason}`" in TEXT


def _codes(kind=HeadlongError):
    yield kind.status, kind.code
    for each in kind.__subclasses__():
        yield from _codes(each)


def test_every_error_is_listed_with_its_status():
    listed = {code.strip("`"): status for status, code in rows("Errors") if code.startswith("`")}
    assert listed == {code: str(status) for status, code in _codes() if code is not None}


def test_the_example_of_a_file_is_one(tmp_path):
    (example,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)
    file = tmp_path / "serve.yaml"
    file.write_text(example)
    known = (*ServerConfig.model_fields, *EngineSettings.model_fields)
    sources = Sources({}, read_config_file(file, known))
    config = sources.read(ServerConfig)
    engine = sources.read(EngineSettings).to_engine_config("x")
    assert (config.log_format, engine.canary_rate) == ("json", 0.01)
    assert len(yaml.safe_load(example)) == len(sources.file.entries)


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/status", "/version", "/"])
def test_the_endpoints_are_there(client, path):
    assert f"`GET {path}`" in TEXT
    assert client.get(path).status_code == 200
