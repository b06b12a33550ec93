import io
import json
import logging
import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from headlong.server import async_engine, cli, listen, start_engine
from headlong.server.engine import engine as engine_module
from headlong.server.errors import ConfigError, ContextLengthError


@pytest.fixture
def run(monkeypatch, capsys, engine, tmp_path):
    """Runs the command on the fake engine; gives its exit code, output and error output."""
    monkeypatch.setattr(engine_module, "Engine", lambda config: config)

    def of_config(config):
        engine.config = config
        return engine

    monkeypatch.setattr(async_engine, "AsyncEngine", of_config)
    monkeypatch.setattr(start_engine, "start_engine", lambda config, _: of_config(config))

    for name in [name for name in os.environ if name.startswith("HEADLONG_")]:
        monkeypatch.delenv(name)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["headlong", *args])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return SimpleNamespace(code=stopped.value.code, **capsys.readouterr()._asdict())

    return call


def test_help_does_not_import_torch():
    code = (
        "import sys; from headlong.server.cli import app; from typer.testing import CliRunner;"
        "assert CliRunner().invoke(app, ['serve', '--help']).exit_code == 0;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'fastapi')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_generate_streams_the_text(run, engine):
    result = run("generate", "some/model", "hi", "--temperature", "0", "--sink-size", "1",
                 "--profile", "p.json")  # fmt: skip
    assert (result.code, result.out) == (0, "Hello wörld\n")
    assert engine.tokenizer.decode(engine.seen[0][0]) == "<user>hi</><assistant>"
    assert engine.seen[0][1].temperature == 0.0
    assert (engine.config.model, engine.config.sink_size) == ("some/model", 1)
    assert not engine.is_alive


FLAGS = (
    "--device", "cuda:1", "--dtype", "float16", "--attention-backend", "triton",
    "--gpu-memory-utilization", "0.5", "--enforce-eager", "--load-format", "dummy",
)  # fmt: skip


@pytest.mark.parametrize("command", [("serve", "m", "--port", "0"), ("generate", "m", "hi")])
def test_flags_of_the_device_reach_the_engine(run, engine, monkeypatch, command):
    monkeypatch.setattr(listen, "listen", lambda *_: 0)
    assert run(*command, *FLAGS).code == 0
    config = engine.config
    assert (config.device, config.dtype) == ("cuda:1", "float16")
    assert (config.attention_backend, config.load_format) == ("triton", "dummy")
    assert (config.gpu_memory_utilization, config.enforce_eager) == (0.5, True)


def test_generate_without_a_chat_and_from_standard_input(run, engine, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("wör".encode())))
    result = run("generate", "some/model", "-", "--no-chat", "--max-tokens", "2")
    assert (result.code, result.out) == (0, "Hello\n")
    assert engine.tokenizer.decode(engine.seen[0][0]) == "wör"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["x" * 80], "context"),
        (["", "--no-chat"], "prompt"),
        (["hi", "--temperature", "nan"], "temperature"),
        (["hi", "--temperature", "-1"], "temperature"),
        (["hi", "--max-tokens", "100"], "context"),
        (["\udcff"], "UTF-8"),
        (["hi", "--sink-size", "4"], "--sink-size must be left out without a profile"),
        (["hi", "--device", "tpu"], "--device must be"),
        (["hi", "--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization must be"),
    ],
)
def test_generate_refuses_in_one_line(run, args, message):
    result = run("generate", "some/model", *args)
    assert result.code == 2
    assert message in result.err
    assert result.err.startswith("headlong: ")
    assert result.err.count("\n") == 1
    assert not result.out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("the checkpoint is [red]truncated"), 2),
        (ContextLengthError("too long"), 2),
        (ValueError("a profile for another model"), 2),
        (OSError("disk"), 1),
    ],
)
def test_errors_of_the_start_are_one_line(run, monkeypatch, error, code):
    def fail(*_):
        raise error

    monkeypatch.setattr(start_engine, "start_engine", fail)
    result = run("serve", "some/model", "--port", "0")
    assert (result.code, result.err) == (code, f"headlong: {error}\n")


def test_serve_prints_the_plan_and_passes_the_exit_code_on(run, engine, monkeypatch):
    def fake_listen(app, served, sock, config):
        assert served is engine
        assert sock.getsockname()[1] > 0
        assert config.shutdown_timeout == 7
        return 1

    monkeypatch.setattr(listen, "listen", fake_listen)
    result = run("serve", "some/model", "--port", "0", "--shutdown-timeout", "7")
    assert result.code == 1
    assert result.out == "layer 0 [bold]RS\nServing some/model\n"


def test_serve_takes_the_embedded_model(run, engine, monkeypatch):
    monkeypatch.setattr(listen, "listen", lambda *_: 0)
    result = run("serve", "--port", "0")
    assert result.out.endswith("Serving headlong-demo\n")
    result = run("serve", "--port", "0", "--served-model-name", "a", "--served-model-name", "b")
    assert result.out.endswith("Serving a, b\n")


def test_a_port_in_use_is_one_line(run, engine):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", "some/model", "--port", str(port))
    assert result.code == 2
    told = f"cannot listen on 127.0.0.1:{port}: Address already in use"
    assert result.err == f"headlong: --port: {told}\n"


def test_an_unknown_host_is_one_line(run):
    result = run("serve", "some/model", "--host", "256.0.0.1", "--port", "0")
    assert result.code == 2
    assert "\nheadlong: --host: cannot listen on 256.0.0.1:0: " in result.err
    for host in ("a..b", "x" * 300, "192.0.2.1"):
        result = run("serve", "some/model", "--host", host, "--port", "0")
        assert result.code == 2
        told = result.err.splitlines()[-1]
        assert told.startswith(f"headlong: --host: cannot listen on {host}:0: ")


def test_the_process_fails_when_the_engine_dies(engine, config):
    from headlong.server.app import create_app

    async def dead():
        pass

    engine.wait_dead = dead
    with listen.bind("127.0.0.1", 0) as sock:
        assert listen.listen(create_app(engine, config), engine, sock, config) == 1
    assert not engine.is_alive


@pytest.fixture
def served(monkeypatch):
    """The server's settings that reached the network, if it came to that."""
    seen = []

    def fake_listen(app, engine, sock, config):
        seen.append(config)
        return 0

    monkeypatch.setattr(listen, "listen", fake_listen)
    return seen


def test_settings_come_from_everywhere(run, engine, served, tmp_path, monkeypatch):
    file = tmp_path / "serve.yaml"
    file.write_text("port: 0\nhost: 0.0.0.0\nmax-num-seqs: 9\nseed: 1\nserved-model-name: [f]\n")
    monkeypatch.setenv("HEADLONG_CONFIG", str(file))
    monkeypatch.setenv("HEADLONG_SEED", "2")
    result = run("serve", "m", "--host", "127.0.0.1", "--no-enable-prefix-caching",
                 "--kv-policy-max-window-size", "full", "--cors-allow-origin", "https://a.example",
                 "--cors-allow-origin", "https://b.example")  # fmt: skip
    assert (result.code, result.err) == (0, "")
    (config,) = served
    assert (config.host, config.served_model_name) == ("127.0.0.1", ("f",))
    assert config.cors_allow_origin == ("https://a.example", "https://b.example")
    assert (engine.config.max_num_seqs, engine.config.seed) == (9, 2)
    assert engine.config.enable_prefix_caching is False
    assert engine.config.kv_policy_max_window_size == 2**31 - 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", ":1: 'prot' is no setting"),
        ("port: http", ":1: port: Input should be a valid integer"),
        ("block-size: 5", ":1: block-size must be a power of two"),
        ("- port", ": must be a mapping"),
    ],
)
def test_a_bad_configuration_file_is_one_line(run, served, tmp_path, text, message):
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    result = run("serve", "m", "--config", str(file))
    assert result.code == 2
    assert result.err.startswith(f"headlong: {file}{message}")
    assert result.err.count("\n") == 1
    assert not served


def test_a_missing_configuration_file_is_one_line(run, served, tmp_path):
    result = run("serve", "--config", str(tmp_path / "none.yaml"))
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "cannot be read: No such file" in result.err


def test_print_config_loads_nothing(run, served, monkeypatch, tmp_path):
    def fail(*_):
        raise AssertionError

    monkeypatch.setattr(start_engine, "start_engine", fail)
    monkeypatch.setenv("HEADLONG_API_KEY", "hush-hush")
    result = run("serve", "some/model", "--print-config", "--port", "1")
    assert (result.code, result.err, served) == (0, "", [])
    printed = yaml.safe_load(result.out)
    assert (printed["model"], printed["port"]) == ("some/model", 1)
    assert printed["served-model-name"] == ["some/model"]
    assert "hush" not in result.out

    file = tmp_path / "again.yaml"
    file.write_text(result.out)
    again = run("serve", "--config", str(file), "--print-config")
    assert (again.code, yaml.safe_load(again.out)) == (0, printed)
    assert run("serve", "--print-config", "--block-size", "5").code == 2


def test_what_is_probably_not_meant_is_warned_of(run, served, monkeypatch, tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text("alice:hush-hush")
    keys.chmod(0o644)
    monkeypatch.setenv("HEADLONG_PROT", "1")

    def warnings(*args):
        result = run("serve", "m", "--port", "0", *args)
        assert result.code == 0
        assert "hush" not in result.err
        return re.findall("WARNING .*?: (.*)", result.err)

    (variable,) = warnings()
    assert "HEADLONG_PROT is no setting" in variable
    monkeypatch.delenv("HEADLONG_PROT")
    assert warnings("--host", "::1") == warnings("--host", "localhost") == []
    (is_open,) = warnings("--host", "0.0.0.0")
    assert "listening on 0.0.0.0 without an API key" in is_open
    in_clear, readable = warnings("--host", "0.0.0.0", "--api-key-file", str(keys))
    assert "without TLS" in in_clear
    assert f"{keys} holds secrets" in readable
    keys.chmod(0o600)
    assert warnings("--api-key-file", str(keys)) == []
    (logged,) = warnings("--log-requests")
    assert "prompts are logged" in logged


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--api-key", "hush hush"], "--api-key: key 1 may only hold"),
        (["--api-key", "hush", "--api-key", "hush"], "--api-key: key 2 was given before"),
        (["--api-key-file", "nowhere.txt"], "--api-key-file: nowhere.txt: cannot be read"),
        (["--ssl-certfile", "nowhere.pem"], "--ssl-certfile: nowhere.pem is no file"),
        (["--ssl-keyfile", "nowhere.pem"], "--ssl-keyfile needs --ssl-certfile"),
        (["--api-key", ""], "--api-key: key 1 is empty"),
        (["--api-key-file", ""], "--api-key-file: "),
        (["--api-key-file", os.devnull], "--api-key-file: /dev/null: holds no key"),
        (["--served-model-name", ""], "--served-model-name: a name is empty"),
        (["--chat-template", "nowhere.jinja"], "--chat-template: cannot read"),
        (["--served-model-name", "m", "--max-num-batched-tokens", "1"], "--max-num-batched-tokens"),
        (["--cors-allow-origin", "a.example"], "--cors-allow-origin: an origin is"),
    ],
)
def test_the_start_refuses_in_one_line_before_it_loads(run, monkeypatch, args, told):
    def fail(*_):
        raise AssertionError

    monkeypatch.setattr(start_engine, "start_engine", fail)
    result = run("serve", "m", "--port", "0", *args)
    assert result.code == 2
    assert result.err.startswith(f"headlong: {told}")
    assert result.err.count("\n") == 1
    assert "hush" not in result.err


def test_in_json_logs_the_plan_is_one_of_them(run, served):
    result = run("serve", "some/model", "--port", "0", "--log-format", "json")
    assert (result.code, result.out) == (0, "")
    lines = [json.loads(line) for line in result.err.splitlines()]
    assert [line["message"] for line in lines] == ["layer 0 [bold]RS", "Serving some/model"]
    assert lines[0]["level"] == "INFO"
    assert logging.getLogger("headlong").level == logging.INFO


def test_help_shows_every_setting():
    from headlong.server.config import ServerConfig
    from headlong.server.engine_settings import EngineSettings

    code = "from headlong.server.cli import main; main()"
    shown = subprocess.run(
        [sys.executable, "-c", code, "serve", "--help"],
        env={**os.environ, "COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in {*ServerConfig.model_fields, *EngineSettings.model_fields} - {"model"}:
        assert f"--{name.replace('_', '-')} " in shown
    assert "--no-enable-prefix-caching" in shown
    lines = {line.split()[1]: line for line in shown.splitlines() if line.startswith("│ --")}
    for name in ("--print-config", "--log-requests", "--enforce-eager", "--enable-prefix-caching"):
        assert "<" not in lines[name]
    for name in ("--served-model-name", "--api-key", "--cors-allow-origin"):
        assert "<str>" in lines[name]
        assert "may be repeated" in lines[name]
    assert "Default: the model's limit." in lines["--max-model-len"]
    assert "Default: 8000." in lines["--port"]
    for panel in ("Server", "Limits", "Security", "Logging", "Model", "Head profile", "KV cache"):
        assert f"─ {panel} ─" in shown


def test_profile_refuses_what_it_does_not_know(run):
    result = run("profile", "some/model", "--method", "tea-leaves")
    assert result.code == 2
    assert "tea-leaves" in result.err
    result = run("profile", "some/model", "--setting", "num_needles=none")
    assert result.code == 2
    assert "num_needles" in result.err
