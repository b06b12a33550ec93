import os

import pytest
import yaml

from headlong.server.config import ServerConfig
from headlong.server.config_file import read_config_file
from headlong.server.config_sources import Sources
from headlong.server.config_text import config_text
from headlong.server.engine_settings import EngineSettings
from headlong.server.errors import ConfigError
from headlong.server.flag import flag_of

SETTINGS = (*ServerConfig.model_fields, *EngineSettings.model_fields)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("HEADLONG_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def sources(tmp_path):
    def of_text(text, **given):
        path = tmp_path / "serve.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return Sources(given, read_config_file(path, SETTINGS))

    return of_text


def test_the_command_line_then_the_environment_then_the_file_then_the_default(sources, monkeypatch):
    given = sources("host: file\nport: 1\nmax-num-queued-reqs: 2\nsend_timeout: 3\n", host="flag")
    monkeypatch.setenv("HEADLONG_HOST", "env")
    monkeypatch.setenv("HEADLONG_PORT", "4")
    config = given.read(ServerConfig)
    assert (config.host, config.port, config.max_num_queued_reqs) == ("flag", 4, 2)
    assert (config.send_timeout, config.shutdown_timeout) == (3.0, 30)
    assert given.origin("host") == "--host"
    assert given.origin("port") == "HEADLONG_PORT"
    assert given.origin("max_num_queued_reqs").endswith("serve.yaml:3")
    assert given.origin("shutdown_timeout") == "default"


def test_values_of_every_kind(sources):
    text = """
served-model-name: [a, b]
api-key: [hush, psst]
cors-allow-origin: https://a.example
log-requests: yes
request-timeout: 5
chat-template: t.jinja
enable-prefix-caching: false
kv-policy-max-window-size: full
sparsity: 0.5
profile: none
model:
"""
    given = sources(text)
    config, engine = given.read(ServerConfig), given.read(EngineSettings)
    assert config.served_model_name == ("a", "b")
    assert [key.get_secret_value() for key in config.api_key] == ["hush", "psst"]
    assert config.cors_allow_origin == ("https://a.example",)
    assert (config.log_requests, config.request_timeout) == (True, 5.0)
    assert (engine.enable_prefix_caching, engine.sparsity) == (False, 0.5)
    assert (engine.kv_policy_max_window_size, engine.model) == (2**31 - 1, None)


def test_an_empty_file_sets_nothing(sources):
    for text in ("", "# nothing\n", "{}", "---\n"):
        assert sources(text).read(ServerConfig) == ServerConfig()


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("host: a\nprot: 1\n", ":2", "'prot' is no setting"),
        ("host: a\nhost: b\n", ":2", "'host' was set before, in line 1"),
        ("max-num-seqs: 1\nmax_num_seqs: 2\n", ":2", "'max_num_seqs' was set before, in line 1"),
        ("1: a\n", ":1", "'1' is no setting"),
        ("[a, b]: c\n", "", "no"),
        ("? {a: b}\n: c\n", "", ""),
        ("config: other.yaml\n", ":1", "'config' is no setting"),
        ("- host\n", "", "must be a mapping"),
        ("host", "", "must be a mapping"),
        ("a: b: c", "", "not valid YAML"),
        ("host: [", "", "not valid YAML"),
        ("host: a\n---\nhost: b\n", "", "not valid YAML"),
        ("host: !!python/object/apply:os.system [true]\n", "", "not valid YAML"),
        ("host: *nowhere\n", "", "not valid YAML"),
        ("host: 2024-99-99\n", "", "not valid YAML"),
        ("[" * 5000, "", "not valid YAML"),
        ("host: \x07\n", "", "not valid YAML"),
        (b"host: \xff\n", "", "not UTF-8"),
        (f"{'k' * 1000}: 1\n", ":1", "is no setting"),
    ],
)
def test_a_file_that_cannot_be_used(sources, text, place, message):
    with pytest.raises(ConfigError) as caught:
        sources(text)
    told = str(caught.value)
    assert f"serve.yaml{place}" in told
    assert message in told
    assert "\n" not in told
    assert len(told) < 500


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_file_that_cannot_be_read(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config_file(tmp_path / name, SETTINGS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: yes", "port: got True"),
        ("port: x", "port: Input should be a valid integer"),
        ("host: on", "host: got True"),
        ("seed: no", "seed: got False"),
        ("port: [1]", "port: Input should be a valid integer"),
        ("port: {a: b}", "port: "),
        ("host: 8000", "host: Input should be a valid string"),
        ("served-model-name: [1]", "served-model-name: value 1: Input should be a valid string"),
        ("served-model-name: {a: b}", "served-model-name: Input should be a list"),
        ("served-model-name: ''", "served-model-name: a name is empty"),
        ("cors-allow-origin: ['*', a]", "cors-allow-origin: an origin is"),
        ("log_requests: 1", "log-requests must be true or false, got 1"),
        ("log-requests: 'yes'", "log-requests must be true or false, got 'yes'"),
        ("enable-prefix-caching: 0", "enable-prefix-caching must be true or false, got 0"),
        ("ssl-keyfile: a.pem", "ssl-keyfile needs --ssl-certfile"),
        ("log-format: xml", "log-format: "),
        ("block-size: 5", "block-size must be a power of two"),
        ("enforce-eager: 7", "enforce-eager must be"),
        ("request-timeout: .nan", "request-timeout: "),
    ],
)
def test_a_bad_value_is_named_with_its_line(sources, text, message):
    given = sources(f"# first\n{text}\n")
    with pytest.raises(ConfigError) as caught, given.named():
        given.read(ServerConfig)
        given.read(EngineSettings).to_engine_config("m")
    told = str(caught.value)
    assert f"serve.yaml:2: {message}" in told
    assert "\n" not in told


@pytest.mark.parametrize("empty", ["", "null", "[]", "''", "{}"])
@pytest.mark.parametrize("key", ["api-key", "api_key_file", "ssl-certfile", "ssl-ca-certs"])
def test_an_empty_guard_does_not_leave_the_server_open(sources, key, empty):
    given = sources(f"host: a\n{key}: {empty}\n")
    with pytest.raises(ConfigError) as caught, given.named():
        given.read(ServerConfig)
    shown = key.replace("_", "-")
    assert str(caught.value).endswith(f"serve.yaml:2: {shown} is set, but empty")


def test_what_guards_nothing_may_be_empty(sources):
    given = sources("host:\nserved-model-name: []\nlog-requests:\nrequest-timeout: null\n")
    assert given.read(ServerConfig) == ServerConfig()
    assert given.origin("host") == "default"


def test_a_bad_secret_is_not_shown(sources):
    for text in ("api-key: [hush hush]", "api-key: {hush: hush}", "api-key: [[hush]]"):
        given = sources(text)
        with pytest.raises(ConfigError) as caught, given.named():
            given.read(ServerConfig)
        assert "hush" not in str(caught.value)


def test_errors_name_the_flag_the_variable_or_the_line(sources, monkeypatch):
    def told(given):
        with pytest.raises(ConfigError) as caught, given.named():
            given.read(EngineSettings).to_engine_config("m")
        assert caught.value.param == "block_size"
        return str(caught.value)

    assert told(Sources({"block_size": 5})).startswith("--block-size must be a power of two")
    assert told(Sources({"block_size": "x"})).startswith("--block-size: Input should be")
    assert ".yaml:1: block-size must be a power of two" in told(sources("block-size: 5"))
    monkeypatch.setenv("HEADLONG_BLOCK_SIZE", "5")
    assert told(Sources({})).startswith("HEADLONG_BLOCK_SIZE must be a power of two")


def test_errors_without_a_setting_stay_as_they_are():
    for error in (ConfigError("it is broken"), ConfigError("--it is broken", "it")):
        with pytest.raises(ConfigError, match="it is broken"), Sources({}).named():
            raise error


def _text(given):
    config, settings = given.read(ServerConfig), given.read(EngineSettings)
    return config_text(given, config, settings, settings.to_engine_config("the/model"))


def test_the_printed_configuration_is_one(sources, monkeypatch):
    text = """
host: 0.0.0.0
served-model-name: ["a # b", 'ü "x"']
chat-template: "with space.jinja"
sparsity: 0.5
profile: p.json
kv-policy-max-window-size: full
enable-prefix-caching: false
request-timeout: 0.00001
"""
    monkeypatch.setenv("HEADLONG_MAX_NUM_SEQS", "3")
    given = sources(text, port=9)
    printed = _text(given)
    assert "port: 9  # --port\n" in printed
    assert "max-num-seqs: 3  # HEADLONG_MAX_NUM_SEQS\n" in printed
    assert "serve.yaml:2\n" in printed
    assert "block-size: 16  # default\n" in printed
    assert "kv-policy-max-window-size: full  # " in printed
    config, engine = given.read(ServerConfig), given.read(EngineSettings)

    monkeypatch.delenv("HEADLONG_MAX_NUM_SEQS")
    again = sources(printed)
    assert again.read(ServerConfig) == config
    assert again.read(EngineSettings).to_engine_config("x") == engine.to_engine_config("the/model")
    shown = [line.partition("  # ")[0] for line in printed.splitlines()]
    assert [line.partition("  # ")[0] for line in _text(again).splitlines()] == shown


def test_the_printed_configuration_has_every_setting_but_secrets_and_empty_guards(sources):
    text = _text(sources(""))
    printed = yaml.safe_load(text)
    guards = {name for name in ServerConfig.model_fields if flag_of(ServerConfig, name).guards}
    secret = {name for name in ServerConfig.model_fields if flag_of(ServerConfig, name).secret}
    assert secret == {"api_key", "ssl_keyfile_password"}
    files = {"api_key_file", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs"}
    assert guards == secret | files
    assert {key.replace("-", "_") for key in printed} == {*SETTINGS} - guards
    for name in files:
        assert f"# {name.replace('_', '-')}: null  # default\n" in text
    assert _text(sources("api-key-file: keys.txt")).count("\napi-key-file: keys.txt  # ") == 1


def test_the_printed_configuration_says_what_holds_without_a_value(sources):
    printed = _text(sources("sink-size: 4\nprofile: p.json\n"))
    assert "max-model-len: null  # default: the model's limit\n" in printed
    assert "window-size: null  # default: the profile's\n" in printed
    assert "gpu-memory-utilization: null  # default: 0.9\n" in printed
    assert "sink-size: 4  # " in printed
    assert "request-timeout: null  # default\n" in printed


def test_the_printed_configuration_keeps_secrets(monkeypatch):
    monkeypatch.setenv("HEADLONG_API_KEY", "hush-hush")
    given = Sources({"ssl_certfile": "c.pem", "ssl_keyfile_password": "hush-hush"})
    printed = _text(given)
    assert "hush" not in printed
    assert "# api-key is set and not shown: HEADLONG_API_KEY\n" in printed
    assert "# ssl-keyfile-password is set and not shown: --ssl-keyfile-password\n" in printed


def test_the_profile_that_lies_beside_the_model_is_printed(tmp_path):
    (tmp_path / "profile.json").write_text("{}")
    printed = _text(Sources({"model": str(tmp_path)}))
    assert f"profile: {tmp_path}/profile.json  # beside the model\n" in printed
    assert "profile: none  # --profile\n" in _text(
        Sources({"model": str(tmp_path), "profile": "none"})
    )
