import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from headlong.server.api.routes_health import health_router
from headlong.server.engine.device import choose_device
from headlong.server.telemetry.engine_metrics import PREFIX
from support.deployment import DOCKER, read_settings, read_yaml, run, script, unknown_settings
from support.promql import metric_names

K8S = DOCKER / "k8s"
OVERLAYS = ("a100", "cpu")
WHOLE = [
    *(path for path in K8S.glob("base/*.yaml") if path.name != "kustomization.yaml"),
    *(path for path in K8S.glob("components/*/*.yaml") if path.name != "kustomization.yaml"),
    K8S / "secret.example.yaml",
]
RENDERERS = (("kubectl", "kustomize"), ("kustomize", "build"))
needs_kustomize = pytest.mark.skipif(
    not any(shutil.which(command[0]) for command in RENDERERS), reason="needs kubectl or kustomize"
)
FAULTS = script("check_manifests.py")["manifest_faults"]


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    """The base's manifests by kind, as they stand in the files."""
    return {manifest["kind"]: manifest for manifest in map(read_yaml, WHOLE)}


@pytest.fixture(params=OVERLAYS)
def rendered(request: pytest.FixtureRequest) -> dict[str, Any]:
    """An overlay's manifests by kind."""
    command = next(each for each in RENDERERS if shutil.which(each[0]))
    done = run(*command, K8S / "overlays" / request.param)
    assert done.returncode == 0, done.stderr
    return {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}


def _settings(folder: Path) -> dict[str, str]:
    (generator,) = read_yaml(folder / "kustomization.yaml")["configMapGenerator"]
    return dict(literal.split("=", 1) for literal in generator["literals"])


def _container(manifests: dict[str, Any]) -> dict[str, Any]:
    (container,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = container
    return found


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.name)
def test_manifests_keep_their_schema(path: Path) -> None:
    assert list(FAULTS(read_yaml(path))) == []


@needs_kustomize
def test_overlays_keep_their_schema(rendered: dict[str, Any]) -> None:
    assert [fault for each in rendered.values() for fault in FAULTS(each)] == []


@pytest.mark.parametrize(
    ("kind", "change", "fault"),
    [
        ("Deployment", {"replica": 1}, "'replica' was unexpected"),
        ("PodDisruptionBudget", {"selector": 1}, "1 is not of type"),
        ("ScaledObject", {"triggers": []}, "$.spec.triggers"),
        ("ScaledObject", {"maxReplicas": 2}, "'maxReplicas' was unexpected"),
        ("ServiceMonitor", {"endpoints": [{"port": 8000}]}, "8000 is not of type 'string'"),
    ],
)
def test_faults_are_found(base: dict[str, Any], kind: str, change: Any, fault: str) -> None:
    manifest = {**base[kind], "spec": {**base[kind]["spec"], **change}}
    assert any(fault in found for found in FAULTS(manifest))


def test_unknown_kinds_and_nothing_are_faults(base: dict[str, Any]) -> None:
    unknown = {**base["Service"], "kind": "Servant"}
    done = run("python", DOCKER / "check_manifests.py", text=yaml.safe_dump(unknown))
    assert (done.returncode, "Servant/headlong" in done.stderr) == (1, True)
    done = run("python", DOCKER / "check_manifests.py", text="---\n")
    assert (done.returncode, done.stderr) == (1, "there is no manifest\n")


def test_the_server_takes_the_settings() -> None:
    for overlay in OVERLAYS:
        variables = {**_settings(K8S / "base"), **_settings(K8S / "overlays" / overlay)}
        assert unknown_settings(variables) == []
        _, engine = read_settings(variables)
        assert engine.device == ("cpu" if overlay == "cpu" else "auto")
        if overlay == "cpu":
            # A setting for GPUs alone would be refused.
            assert choose_device(engine).type == "cpu"


@needs_kustomize
def test_settings_of_base_and_overlay_come_together(rendered: dict[str, Any]) -> None:
    name = rendered["ConfigMap"]["metadata"]["name"]
    assert _container(rendered)["envFrom"] == [{"configMapRef": {"name": name}}]
    config, engine = read_settings(rendered["ConfigMap"]["data"])
    assert config.shutdown_timeout == 60
    limits = _container(rendered)["resources"]["limits"]
    assert ("nvidia.com/gpu" in limits) == (engine.device == "auto")
    assert rendered["ScaledObject" if engine.device == "auto" else "Service"]


def test_probes_ask_routes(base: dict[str, Any]) -> None:
    container = _container(base)
    (port,) = container["ports"]
    routes = {getattr(route, "path", "") for route in health_router(Mock()).routes}
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    assert container["readinessProbe"]["exec"]["command"] == ["headlong-probe", "/ready"]
    assert {"/health", "/ready"} <= routes


def test_pods_have_the_time_to_drain(base: dict[str, Any]) -> None:
    pod = base["Deployment"]["spec"]["template"]["spec"]
    config, _ = read_settings(_settings(K8S / "base"))
    program, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    least = int(seconds) + config.shutdown_timeout + 10
    assert pod["terminationGracePeriodSeconds"] >= least


def test_the_service_s_variables_are_not_settings(base: dict[str, Any]) -> None:
    pod = base["Deployment"]["spec"]["template"]["spec"]
    # A Service of this name would otherwise give every pod HEADLONG_PORT=tcp://...
    assert base["Service"]["metadata"]["name"] == "headlong"
    assert pod["enableServiceLinks"] is False


def test_pods_may_do_little(base: dict[str, Any]) -> None:
    pod = base["Deployment"]["spec"]["template"]["spec"]
    container = _container(base)
    user = f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    assert f"\nUSER {user}\n" in (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    # Where the image's caches are, where the compiler writes, and shared memory.
    assert {"/cache", "/cache/huggingface", "/tmp", "/dev/shm"} <= mounts


def test_names_agree(base: dict[str, Any]) -> None:
    pod = base["Deployment"]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in _container(base)["volumeMounts"]} == set(volumes)
    claim = volumes["models"]["persistentVolumeClaim"]["claimName"]
    assert claim == base["PersistentVolumeClaim"]["metadata"]["name"]
    secret = base["Secret"]
    assert volumes["keys"]["secret"]["secretName"] == secret["metadata"]["name"]
    (endpoint,) = base["ServiceMonitor"]["spec"]["endpoints"]
    credentials = endpoint["authorization"]["credentials"]
    assert credentials["name"] == secret["metadata"]["name"]
    assert {credentials["key"], "api-keys.txt", "hf-token"} == set(secret["stringData"])
    file = _settings(K8S / "base")["HEADLONG_API_KEY_FILE"]
    mounts = {each["name"]: each["mountPath"] for each in _container(base)["volumeMounts"]}
    assert file == f"{mounts['keys']}/api-keys.txt"
    assert base["ScaledObject"]["spec"]["scaleTargetRef"]["name"] == "headlong"


def test_replicas_follow_the_queue(base: dict[str, Any]) -> None:
    (trigger,) = base["ScaledObject"]["spec"]["triggers"]
    # tests/server/telemetry/test_alerts.py holds that a server has this series.
    assert metric_names(trigger["metadata"]["query"]) == {f"{PREFIX}num_requests_waiting"}
    assert "replicas" not in base["Deployment"]["spec"]
