"""What docs/serving.md lists is what there is."""

import yaml

from headlong.server.commands.options import default_of
from headlong.server.config import ServerConfig
from headlong.server.config_file import read_config_file
from headlong.server.config_sources import Sources
from headlong.server.engine_settings import EngineSettings
from headlong.server.flag import flag_of
from support.markdown import ROOT, blocks, names, rows, section

TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
SETTINGS = {
    name: settings
    for settings in (ServerConfig, EngineSettings)
    for name in settings.model_fields
    if name != "model"
}


def listed():
    """Default and meaning of each flag in the tables, by name of its setting."""
    return {
        names(cells[0])[0].strip("-").replace("-", "_"): cells[1:]
        for cells in rows(section(TEXT, "Flags"))
    }


def test_every_flag_is_listed_with_its_default():
    flags = {name: default for name, (default, _) in listed().items()}
    assert set(flags) == set(SETTINGS)
    assert len(rows(section(TEXT, "Flags"))) == len(flags), "a flag is listed twice"
    for name, settings in SETTINGS.items():
        default = default_of(settings, name)
        if isinstance(default, bool):
            assert flags[name] == ("on" if default else "off")
        elif isinstance(default, int | float) and name != "kv_policy_max_window_size":
            assert float(flags[name]) == default


def test_every_flag_says_what_its_help_says():
    for name, (_, meaning) in listed().items():
        assert meaning.replace("`", "") == flag_of(SETTINGS[name], name).help


def test_the_example_of_a_file_is_one(tmp_path):
    (example,) = blocks(TEXT, "yaml")
    file = tmp_path / "serve.yaml"
    file.write_text(example)
    known = (*ServerConfig.model_fields, *EngineSettings.model_fields)
    sources = Sources({}, read_config_file(file, known))
    config = sources.read(ServerConfig)
    engine = sources.read(EngineSettings).to_engine_config("x")
    assert (config.log_format, engine.canary_rate) == ("json", 0.01)
    assert len(yaml.safe_load(example)) == len(sources.file.entries)
