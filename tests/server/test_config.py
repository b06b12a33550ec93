import os
from pathlib import Path

import pytest

from headlong.server.config import ServerConfig, config_path, read_environment, unknown_variables
from headlong.server.config_sources import load
from headlong.server.engine.engine_config import UNBOUNDED, EngineConfig
from headlong.server.engine_settings import EngineSettings
from headlong.server.errors import ConfigError
from headlong.server.flag import flag_of


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
    [
        ("port", 70_000),
        ("port", -1),
        ("max_body_bytes", 0),
        ("max_header_bytes", 100),
        ("shutdown_timeout", -1),
        ("max_num_queued_reqs", 0),
        ("request_timeout", 0),
        ("request_timeout", "nan"),
        ("request_timeout", 90_000),
        ("hang_timeout", "inf"),
        ("send_timeout", -1),
        ("log_format", "xml"),
        ("log_level", "loud"),
        ("log_requests", "perhaps"),
        ("served_model_name", ""),
        ("served_model_name", ["a", " "]),
        ("served_model_name", "a,,b"),
        ("tool_call_parser", "mine"),
        ("cors_allow_origin", ["https://a.example/path"]),
        ("cors_allow_origin", ["a.example"]),
        ("cors_allow_origin", ["null"]),
    ],
)
def test_bad_values_name_the_field(name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        load(ServerConfig, **{name: value})
    assert caught.value.param == name
    assert "\n" not in str(caught.value)


def test_a_bad_variable_names_the_field(monkeypatch):
    monkeypatch.setenv("HEADLONG_PORT", "http")
    with pytest.raises(ConfigError, match="port"):
        load(ServerConfig)


def test_every_setting_has_a_variable(monkeypatch):
    given = {
        "API_KEY": "first,second",
        "API_KEY_FILE": "keys.txt",
        "MAX_NUM_QUEUED_REQS": "9",
        "REQUEST_TIMEOUT": "1.5",
        "CORS_ALLOW_ORIGIN": "https://a.example,http://b.example:81",
        "LOG_FORMAT": "json",
        "LOG_REQUESTS": "true",
        "SSL_CERTFILE": "cert.pem",
        "SSL_KEYFILE_PASSWORD": "hidden",
        "TOOL_CALL_PARSER": "none",
    }
    for name, value in given.items():
        monkeypatch.setenv(f"HEADLONG_{name}", value)
    config = load(ServerConfig)
    assert [key.get_secret_value() for key in config.api_key] == ["first", "second"]
    assert config.api_key_file == Path("keys.txt")
    assert (config.max_num_queued_reqs, config.request_timeout) == (9, 1.5)
    assert config.cors_allow_origin == ("https://a.example", "http://b.example:81")
    assert (config.log_format, config.log_requests) == ("json", True)
    assert set(read_environment(ServerConfig)) == {name.lower() for name in given}


def test_an_empty_variable_is_not_set(monkeypatch):
    monkeypatch.setenv("HEADLONG_HOST", "")
    monkeypatch.setenv("HEADLONG_PORT", "")
    monkeypatch.setenv("HEADLONG_PROFILE", "")
    monkeypatch.setenv("HEADLONG_CONFIG", "")
    assert load(ServerConfig).host == "127.0.0.1"
    assert load(EngineSettings).profile is None
    assert config_path(None) is None


@pytest.mark.parametrize(
    "name",
    [
        "API_KEY",
        "API_KEY_FILE",
        "SSL_CERTFILE",
        "SSL_KEYFILE",
        "SSL_KEYFILE_PASSWORD",
        "SSL_CA_CERTS",
    ],
)
def test_an_empty_guard_does_not_leave_the_server_open(monkeypatch, name):
    monkeypatch.setenv(f"HEADLONG_{name}", "")
    with pytest.raises(ConfigError, match=f"HEADLONG_{name} is set, but empty"):
        load(ServerConfig)


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ("", "key 1 is empty"),
        ("hush-hush,", "key 2 is empty"),
        ("hush-hush,,b", "key 2 is empty"),
        ("hush-hush,hush-hush", "key 2 was given before"),
        ("hush hush", "key 1 may only hold"),
        ("hush-hush\n", "key 1 may only hold"),
        ("hüsh-hush", "key 1 may only hold"),
    ],
)
def test_bad_keys_are_told_without_the_key(keys, fault):
    with pytest.raises(ConfigError, match=fault) as caught:
        load(ServerConfig, api_key=keys)
    assert "sh" not in str(caught.value).replace("ASCII", "")
    assert caught.value.__cause__ is None


def test_secrets_are_in_no_repr():
    config = load(
        ServerConfig, api_key=["hush-hush"], ssl_certfile="c", ssl_keyfile_password="hush-hush"
    )
    for shown in (repr(config), str(config), str(config.model_dump()), config.model_dump_json()):
        assert "hush" not in shown


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"ssl_keyfile": "key.pem"}, "ssl_keyfile"),
        ({"ssl_ca_certs": "ca.pem"}, "ssl_ca_certs"),
        ({"ssl_keyfile_password": "hush"}, "ssl_keyfile_password"),
    ],
)
def test_tls_needs_a_certificate(given, param):
    with pytest.raises(ConfigError, match=f"{param} needs --ssl-certfile") as caught:
        load(ServerConfig, **given)
    assert caught.value.param == param
    assert "hush" not in str(caught.value)


def test_variables_that_are_no_settings(monkeypatch):
    for name in ("PROT", "PORT", "CONFIG", "BLOCK_SIZE"):
        monkeypatch.setenv(f"HEADLONG_{name}", "1")
    assert unknown_variables((ServerConfig, EngineSettings)) == ["HEADLONG_PROT"]


def test_the_file_is_named_by_a_flag_or_a_variable(monkeypatch):
    monkeypatch.setenv("HEADLONG_CONFIG", "there.yaml")
    assert config_path(None) == Path("there.yaml")
    assert config_path(Path("here.yaml")) == Path("here.yaml")


def test_every_setting_says_what_it_is():
    for settings in (ServerConfig, EngineSettings):
        for name in settings.model_fields:
            assert flag_of(settings, name).help.endswith(".")


def test_every_engine_setting_can_be_given():
    assert set(EngineSettings.model_fields) == set(EngineConfig.__slots__)
    assert not set(EngineSettings.model_fields) & set(ServerConfig.model_fields)


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


def test_what_chooses_a_device_comes_from_the_environment(monkeypatch):
    given = {
        "DEVICE": "cuda:1",
        "DTYPE": "bfloat16",
        "ATTENTION_BACKEND": "torch",
        "GPU_MEMORY_UTILIZATION": "0.5",
        "ENFORCE_EAGER": "1",
        "LOAD_FORMAT": "dummy",
    }
    for name, value in given.items():
        monkeypatch.setenv(f"HEADLONG_{name}", value)
    config = load(EngineSettings).to_engine_config("demo")
    assert (config.device, config.dtype) == ("cuda:1", "bfloat16")
    assert (config.attention_backend, config.load_format) == ("torch", "dummy")
    assert config.gpu_memory_utilization == 0.5
    assert config.enforce_eager is True
    assert load(EngineSettings, device="cpu", gpu_memory_utilization=0.7).device == "cpu"


@pytest.mark.parametrize(
    ("value", "size"), [("full", UNBOUNDED), ("4096", 4096), (0, 0), (UNBOUNDED, UNBOUNDED)]
)
def test_the_largest_window_may_be_full(monkeypatch, value, size):
    monkeypatch.setenv("HEADLONG_KV_POLICY_MAX_WINDOW_SIZE", str(value))
    for settings in (load(EngineSettings, kv_policy_max_window_size=value), load(EngineSettings)):
        assert settings.to_engine_config("demo").kv_policy_max_window_size == size


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_backend", "flash"),
        ("load_format", "gguf"),
        ("gpu_memory_utilization", "most"),
        ("enforce_eager", "perhaps"),
        ("enable_prefix_caching", "perhaps"),
        ("kv_policy_max_window_size", "huge"),
        ("canary_rate", "often"),
    ],
)
def test_values_of_another_kind_name_the_field(name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        load(EngineSettings, **{name: value})
    assert caught.value.param == name


def test_the_profile_beside_the_model_is_used(tmp_path):
    def profile(**given):
        return load(EngineSettings, model=str(tmp_path), **given).to_engine_config("x").profile

    assert profile() is None
    beside = tmp_path / "profile.json"
    beside.write_text("{}")
    assert profile() == str(beside)
    assert profile(profile="other.json") == "other.json"
    assert profile(profile="none") is None
