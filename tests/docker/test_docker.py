"""What can be known of the container files without building them; `make test_container` does."""

import json
import re
import subprocess
import sys

import yaml

from server import probe
from server.telemetry.metrics import Metrics, WorkerMetrics
from tests.support.paths import DEMO, ROOT
from tests.support.processes import ON_CPU, running

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()


def test_what_is_copied_exists_and_is_not_ignored():
    allowed = [
        line[1:].removesuffix("/**")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert "runtime" in copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(source == a or source.startswith(f"{a}/") for a in allowed), source


def test_no_stage_that_serves_installs_torch():
    for extra in ("cpu", "gpu"):
        wanted = subprocess.run(
            [sys.executable, "docker/requirements.py", extra], cwd=ROOT,
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert f"onnxruntime{'-gpu' if extra == 'gpu' else ''}" in wanted
        assert "torch" not in wanted
        assert f"requirements.py {extra} grpc >" in DOCKERFILE


def test_the_dashboard_shows_metrics_that_there_are():
    dashboard = json.loads((DOCKER / "grafana/dashboards/vignette.json").read_text())
    metrics = Metrics()
    WorkerMetrics("m", metrics.registry)
    known = set(re.findall(r"^# TYPE (\S+)", metrics.render().decode(), re.MULTILINE))
    used = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"vignette_\w+", target["expr"])
    }
    assert used
    assert used <= known


def test_compose_starts_what_prometheus_and_grafana_expect():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    prometheus = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    [target] = prometheus["scrape_configs"][0]["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in compose
    assert f"{port}:{port}" in compose[host]["ports"]
    source = yaml.safe_load(
        (DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text()
    )["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    for volume in (v for service in compose.values() for v in service.get("volumes", [])):
        assert (DOCKER / volume.split(":")[0]).resolve().exists(), volume


def test_the_probe_knows_a_living_server_from_none(monkeypatch, capsys):
    with running("--engine", str(DEMO), *ON_CPU) as (_, port, _):
        monkeypatch.setenv("VIGNETTE_PORT", str(port))
        assert probe.main() == 0
    assert probe.main() == 1
    assert f":{port}/health/live" in capsys.readouterr().err


def test_the_probe_asks_where_health_is_served(monkeypatch, capsys):
    """With a port of its own for it, the public one knows no health."""
    monkeypatch.setenv("VIGNETTE_PORT", "1")
    monkeypatch.setenv("VIGNETTE_OPS_PORT", "2")
    monkeypatch.setenv("VIGNETTE_HOST", "::1")
    assert probe.main() == 1
    assert "http://[::1]:2/health/live" in capsys.readouterr().err


def test_the_check_explains_itself_before_it_builds_anything():
    for argument, status in (("--help", 0), ("nonsense", 2)):
        command = [sys.executable, str(DOCKER / "check.py"), argument]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        assert done.returncode == status
        assert "usage" in done.stdout and "make test_container" in done.stdout


def test_the_unit_starts_and_reloads_what_there_is():
    unit = (DOCKER / "vignette.service").read_text()
    assert "vignette serve" in unit and "ExecReload=/bin/kill -HUP" in unit
    assert "KillMode=mixed" in unit  # the supervisor alone gets SIGTERM
