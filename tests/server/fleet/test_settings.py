"""What the operator sets, without a cluster."""

import socket
import sys
from pathlib import Path

import pytest

from headlong.demo.paths import MODEL_DIR
from headlong.server import cli
from headlong.server.commands.ray_cluster import start_error
from headlong.server.config import DEFAULT_MAX_NUM_QUEUED_REQS
from headlong.server.config_sources import load
from headlong.server.engine.engine_config import EngineConfig
from headlong.server.errors import ConfigError
from headlong.server.fleet.settings import RaySettings
from headlong.server.ray_app import build_app, num_gpus


@pytest.mark.parametrize(
    ("given", "fewest"),
    [
        ({}, 1),
        ({"num_replicas": 3}, 3),
        ({"max_replicas": 4}, 1),
        ({"min_replicas": 2, "max_replicas": 4}, 2),
    ],
)
def test_the_fewest_replicas(given: dict[str, int], fewest: int) -> None:
    assert load(RaySettings, **given).fewest_replicas == fewest


def _complaint(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    sys.argv = ["headlong", "serve-ray", "--port=0", *flags]
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num-replicas=2", "--max-replicas=3"], "--num-replicas is a fixed number"),
        (["--min-replicas=2"], "--min-replicas needs --max-replicas"),
        (
            ["--min-replicas=3", "--max-replicas=2"],
            "--min-replicas must be at most max_replicas (2)",
        ),
        (["--target-ongoing-requests=5"], "--target-ongoing-requests needs --max-replicas"),
        (["--num-replicas=0"], "--num-replicas: Input should be greater"),
        (["--device=cuda:1"], "--device must be auto, cpu or cuda, got 'cuda:1'"),
        (["--address=127.0.0.1:1"], "--address: cannot reach Ray at 127.0.0.1:1"),
        (["--address=ray://127.0.0.1:1"], "--address must be auto or HOST:PORT, got 'ray://127"),
        (["--downscale-delay=-1"], "--downscale-delay: Input should be greater"),
        (["/no/such/model"], "cannot load model '/no/such/model'"),
    ],
)
def test_what_cannot_be_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    line = _complaint(capsys, *flags)
    assert said in " ".join(line.split())


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [])
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        line = _complaint(capsys, f"--port={port}")
    assert f"cannot listen on 127.0.0.1:{port}" in line


def test_the_settings_of_the_proxy_are_not_taken_for_ours(tmp_path: Path) -> None:
    given = {"model": str(MODEL_DIR), "device": "cpu"}
    for name, value in (
        ("port", 80),
        ("ssl_certfile", "cert.pem"),
        ("send-timeout", 3),
        ("replicas", 2),
        ("device", "cuda:0"),
        ("num_replicas", "many"),
    ):
        with pytest.raises(ConfigError, match=name.replace("-", "_").replace("_", ".")):
            build_app({**given, name: value})
    with pytest.raises(ConfigError, match="MODEL is needed"):
        build_app({})


def test_tls_of_the_environment_is_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADLONG_SSL_CERTFILE", "cert.pem")
    with pytest.raises(ConfigError, match="http_options"):
        build_app({"model": str(MODEL_DIR), "device": "cpu"})


def test_the_application_has_both_deployments() -> None:
    given = {
        "model": str(MODEL_DIR), "device": "cpu", "max-replicas": "3", "max_num_seqs": "7",
        "downscale_delay": "60",
    }  # fmt: skip
    ingress = vars(build_app(given))["_bound_deployment"]
    engines = vars(ingress.init_args[0])["_bound_deployment"]
    assert (ingress.name, engines.name) == ("ingress", "engine")
    assert engines.max_ongoing_requests == 7 + DEFAULT_MAX_NUM_QUEUED_REQS
    scaling = vars(engines)["_deployment_config"].autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    assert scaling.target_ongoing_requests == 7
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (30.0, 60.0)
    assert engines.ray_actor_options["num_gpus"] == 0


@pytest.mark.parametrize(
    ("device", "num_ranks", "asked", "reserved"),
    [
        ("cpu", 2, None, 0.0),
        ("cuda", 1, None, 1.0),
        ("cuda", 4, None, 4.0),
        ("cuda", 1, 0.5, 0.5),
        ("cuda", 2, 3.0, 3.0),
    ],
)
def test_each_rank_has_a_gpu(
    device: str, num_ranks: int, asked: float | None, reserved: float
) -> None:
    engine = EngineConfig(model="m", device=device, tensor_parallel_size=num_ranks)
    assert num_gpus(engine, load(RaySettings, num_gpus_per_replica=asked)) == reserved


def test_fewer_gpus_than_ranks_are_refused() -> None:
    engine = EngineConfig(model="m", device="cuda", tensor_parallel_size=4)
    with pytest.raises(ConfigError, match=r"at least tensor_parallel_size \(4\), got 1"):
        num_gpus(engine, load(RaySettings, num_gpus_per_replica=1.0))


def test_of_a_traceback_of_tracebacks_the_cause_is_said() -> None:
    text = (
        "The deployment failed to start 3 times in a row. Error:\nray.exceptions.RayTaskError(Run"
        'timeError): ray::init()\n  File "a.py", line 3, in b\n    raise error\n'
    )
    mendable = start_error([text + "headlong.server.errors.ConfigError: no such model\n"])
    assert isinstance(mendable, ConfigError)
    assert mendable.message == "no such model"
    other = start_error([text + "torch.OutOfMemoryError: CUDA out of memory\n", ""])
    assert not isinstance(other, ConfigError)
    assert other.message == "the replicas did not start: torch.OutOfMemoryError: CUDA out of memory"
    assert start_error(["no resources"]).message == "the replicas did not start: no resources"
