import os

import pytest

from headlong.server.config import EngineSettings, ServerConfig, load
from headlong.server.errors import ConfigError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("HEADLONG_")]:
        monkeypatch.delenv(name)


def test_a_flag_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("HEADLONG_PORT", "9000")
    monkeypatch.setenv("HEADLONG_HOST", "0.0.0.0")
    monkeypatch.setenv("HEADLONG_SERVED_MODEL_NAME", "a,b")
    config = load(ServerConfig, port=9001, host=None)
    assert (config.host, config.port) == ("0.0.0.0", 9001)
    assert config.with_default_name("c").served_model_name == ("a", "b")


def test_the_default_name_fills_in():
    assert load(ServerConfig).with_default_name("c").served_model_name == ("c",)


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", 70_000), ("port", -1), ("max_body_bytes", 0), ("shutdown_timeout", -1)],
)
def test_bad_values_name_the_field(name, value):
    with pytest.raises(ConfigError, match=name):
        load(ServerConfig, **{name: value})


def test_a_bad_variable_names_the_field(monkeypatch):
    monkeypatch.setenv("HEADLONG_PORT", "http")
    with pytest.raises(ConfigError, match="port"):
        load(ServerConfig)


def test_the_engine_keeps_its_own_defaults(monkeypatch):
    monkeypatch.setenv("HEADLONG_BLOCK_SIZE", "32")
    config = load(EngineSettings, max_num_seqs=3).to_engine_config("demo")
    assert (config.model, config.block_size, config.max_num_seqs) == ("demo", 32, 3)
    assert config.max_num_batched_tokens == type(config)(model="x").max_num_batched_tokens


def test_bad_engine_values():
    with pytest.raises(ConfigError, match="dtype"):
        load(EngineSettings, dtype="int3")
    with pytest.raises(ConfigError, match="block_size"):
        load(EngineSettings, block_size=5).to_engine_config("demo")


def test_the_profile_beside_the_model_is_used(tmp_path):
    def profile(**given):
        return load(EngineSettings, model=str(tmp_path), **given).to_engine_config("x").profile

    assert profile() is None
    beside = tmp_path / "profile.json"
    beside.write_text("{}")
    assert profile() == str(beside)
    assert profile(profile="other.json") == "other.json"
    assert profile(profile="none") is None
