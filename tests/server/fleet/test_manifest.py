"""The RayService manifest: its application can be built, and its pods are pods."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from headlong.server import ray_app

MANIFEST = Path(__file__).parents[3] / "docker" / "ray-serve.yaml"


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    (found,) = yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))
    return dict(found["spec"])


def test_its_application_is_built_of_its_settings(service: dict[str, Any]) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert module == ray_app.__name__
    ingress = vars(getattr(ray_app, name)(application.args))["_bound_deployment"]
    engines = vars(ingress.init_args[0])["_bound_deployment"]
    scaling = vars(engines)["_deployment_config"].autoscaling_config
    group = service["rayClusterConfig"]["workerGroupSpecs"][0]
    assert scaling.min_replicas == group["minReplicas"] == group["replicas"]
    assert scaling.max_replicas == group["maxReplicas"]
    # What a replica reserves is there on each machine, with something left for its proxy.
    requests = group["template"]["spec"]["containers"][0]["resources"]
    assert engines.ray_actor_options["num_cpus"] < int(requests["requests"]["cpu"])
    assert engines.ray_actor_options["num_gpus"] == int(requests["limits"]["nvidia.com/gpu"])
    least = application.args["shutdown_timeout"] + ray_app.SHUTDOWN_MARGIN_S
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > least


def test_its_pods_are_pods(service: dict[str, Any]) -> None:
    cluster = service["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, **group["template"]}
        kubernetes_validate.validate(pod, "1.33", strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**pod, "spec": {"container": []}}, "1.33", strict=True)


def test_it_is_the_ray_that_is_installed(service: dict[str, Any]) -> None:
    constraints = MANIFEST.parents[1] / "constraints.txt"
    version = service["rayClusterConfig"]["rayVersion"]
    assert f"ray=={version}\n" in constraints.read_text(encoding="utf-8")
