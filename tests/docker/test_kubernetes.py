"""Manifests against Kubernetes' own schemas, and against what the server really does."""

import importlib
import json
import re
import shutil
import subprocess

import jsonpatch
import kubernetes_validate
import promql_parser
import pytest
import yaml

from server.protocols.errors import ERRORS, INTERNAL
from server.settings import Settings
from server.telemetry.metrics import Metrics, WorkerMetrics
from tests.support.paths import ROOT

DOCKER = ROOT / "docker"
FOLDER = DOCKER / "kubernetes"
CUSTOM = {"ServiceMonitor": "monitoring.coreos.com/v1", "RayJob": "ray.io/v1"}  # no schemas there


def documents(path):
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


def base() -> dict[tuple[str, str], dict]:
    """Objects of the base by kind and name, as kustomization.yaml lists them."""
    [kustomization] = documents(FOLDER / "base" / "kustomization.yaml")
    found = [d for name in kustomization["resources"] for d in documents(FOLDER / "base" / name)]
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def overlaid(name: str) -> dict[tuple[str, str], dict]:
    """The base with an overlay's patches applied."""
    [kustomization] = documents(FOLDER / name / "kustomization.yaml")
    assert kustomization["resources"] == ["../base"]
    found = base()
    for patch in kustomization["patches"]:
        target = patch["target"]["kind"], patch["target"]["name"]
        [operations] = documents(FOLDER / name / patch["path"])
        found[target] = jsonpatch.apply_patch(found[target], operations)
    return found


@pytest.mark.parametrize("name", ["base", "cpu", "gpu"])
def test_manifests_are_what_kubernetes_takes(name):
    resources = base() if name == "base" else overlaid(name)
    assert len(resources) == 7
    for (kind, _), resource in resources.items():
        if kind in CUSTOM:
            assert resource["apiVersion"] == CUSTOM[kind]
        else:
            kubernetes_validate.validate(resource, "1.33", strict=True)


def test_the_schemas_refuse_what_is_wrong():
    wrong = base()["Deployment", "vignette"]
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.33", strict=True)


def pod(name: str) -> dict:
    return overlaid(name)["Deployment", "vignette"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_pod_is_as_confined_as_the_container_is_tested(name):
    found = pod(name)
    assert found["securityContext"]["runAsNonRoot"] is True
    assert f"--uid {found['securityContext']['runAsUser']} " in (DOCKER / "Dockerfile").read_text()
    for container in [*found.get("initContainers", []), *found["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    mounts = {mount["mountPath"] for mount in found["containers"][0]["volumeMounts"]}
    assert {"/dev/shm", "/tmp"} <= mounts
    volumes = {volume["name"] for volume in found["volumes"]}
    assert volumes == {mount["name"] for mount in found["containers"][0]["volumeMounts"]}


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_settings_and_times_are_the_servers(name):
    found = pod(name)
    [container] = found["containers"]
    for variable in container["env"]:
        field = variable["name"].removeprefix("VIGNETTE_").lower()
        assert field in Settings.model_fields, variable["name"]
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {
        "http": Settings.model_fields["port"].default,
        "ops": int(env["VIGNETTE_OPS_PORT"]),
    }
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    left = found["terminationGracePeriodSeconds"] - pause - float(env["VIGNETTE_DRAIN_SECONDS"])
    assert left >= 10, "for workers and front-ends to end"
    assert found["enableServiceLinks"] is False, "a service's variables would be taken for flags"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == "ops"


def test_what_scales_and_is_scraped_is_there():
    resources = base()
    scaled = resources["HorizontalPodAutoscaler", "vignette"]["spec"]
    [metric] = scaled["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert f"# TYPE {name} gauge" in Metrics().render().decode()
    [adapter] = documents(FOLDER / "adapter.yaml")
    [rule] = adapter["rules"]["custom"]
    assert rule["name"]["matches"] == name
    monitor = resources["ServiceMonitor", "vignette"]["spec"]
    labels = resources["Service", "vignette-ops"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()


def test_the_ray_job_is_a_command_that_there_is():
    from server.bulk.arguments import command_line

    [job] = documents(FOLDER / "ray" / "job.yaml")
    assert (job["kind"], job["apiVersion"]) == ("RayJob", CUSTOM["RayJob"])
    *command, name = job["spec"]["entrypoint"].split()[:4]
    arguments = job["spec"]["entrypoint"].split()[4:]
    assert (command, name) == (["python", "-m", "vignette"], "caption")
    assert command_line("").parse_args(arguments).ray == "auto"
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **group["template"]}
        kubernetes_validate.validate(pod, "1.33", strict=True)


def test_the_ray_service_is_one_that_serve_takes():
    schema = pytest.importorskip("ray.serve.schema", reason="needs the extra ray")
    [ray, service] = documents(FOLDER / "ray" / "service.yaml")
    assert (ray["kind"], ray["apiVersion"]) == ("RayService", "ray.io/v1")
    kubernetes_validate.validate(service, "1.33", strict=True)
    config = schema.ServeDeploySchema(**yaml.safe_load(ray["spec"]["serveConfigV2"]))
    cluster = ray["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        template = group["template"]
        pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": "ray"}}
        kubernetes_validate.validate(pod, "1.33", strict=True)
        assert service["spec"]["selector"] == template["metadata"]["labels"]
    for application in config.applications:
        module, name = application.import_path.split(":")
        build = getattr(importlib.import_module(module), name)
        settings = build.__annotations__["args"].model_validate(application.args)
        ports = template["spec"]["containers"][0]["ports"]
        assert [port["containerPort"] for port in ports] == [settings.port, settings.ops_port]
        assert settings.replicas == (2, 16)
    model, _, _ = settings.engine.partition("=")
    assert [each.name for each in config.applications] == [f"vignette-{model}", "vignette"]


def rules() -> list[dict]:
    [content] = documents(DOCKER / "alerts.yml")
    return [rule for group in content["groups"] for rule in group["rules"]]


def test_alerts_are_of_metrics_and_outcomes_that_there_are():
    metrics = Metrics()
    WorkerMetrics("m", metrics.registry)
    known = set(re.findall(r"^# TYPE (\S+)", metrics.render().decode(), re.MULTILINE))
    codes = {answer.code for answer in (*ERRORS.values(), INTERNAL)}
    for rule in rules():
        promql_parser.parse(rule["expr"])
        names = set(re.findall(r"vignette_\w+", rule["expr"]))
        assert {re.sub(r"_bucket$", "", name) for name in names} <= known
        outcomes = re.findall(r'outcome=~?"([^"]+)"', rule["expr"])
        assert {code for found in outcomes for code in found.split("|")} <= codes
        assert rule["annotations"]["summary"] and rule["labels"]["severity"] in ("page", "ticket")


def test_prometheus_itself_takes_the_rules():
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool (Debian's package prometheus)")
    done = subprocess.run(
        ["promtool", "check", "rules", str(DOCKER / "alerts.yml")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboards_questions_can_be_asked():
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "vignette.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            promql_parser.parse(target["expr"])
            # Ray's metrics are labelled by node and model, ours by scraped instance.
            ours = "ray_serve_" not in target["expr"]
            assert ('instance=~"$instance"' if ours else "vignette-($model)") in target["expr"]
