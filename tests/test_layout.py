"""Imports run one way, and serving needs neither torch nor transformers nor optimum."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("bench", "demo", "export", "runtime", "server")
ALLOWED = {
    "runtime": {"runtime"},
    "server": {"server", "runtime"},
    "bench": {"bench", "runtime", "export"},  # of export: the weights, and the verification loop
    "export": {"export", "runtime.model.manifest", "runtime.errors"},
    "demo": {"demo", "runtime"},
}
ALLOWED_IN = {
    "export/self_test.py": {"runtime.execution.self_test"},  # export stores it, each start runs it
    # The choice among beams, and sessions as engines have them.
    "export/reference.py": {"runtime.decoding", "runtime.request", "runtime.providers.session"},
    "export/__main__.py": {"runtime"},
    "export/pictures.py": {"runtime.model.preprocess"},  # what Hugging Face's leaves to its caller
    "bench/sections/bulk.py": {"server.bulk"},  # it measures in this process, without a server
    "bench/reliability/faulty.py": {"server"},  # the service, with faults injected
}
HEAVY = {"torch", "transformers", "optimum", "onnx"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module in OURS else {node.module}
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package):
    for path in files(package):
        name = path.relative_to(ROOT).as_posix()
        allowed = ALLOWED[package] | ALLOWED_IN.get(name, set())
        for module in imports(path):
            if module.split(".")[0] in OURS:
                known = any(f"{module}.".startswith(f"{a}.") for a in allowed)
                assert known, f"{name} imports {module}"


@pytest.mark.parametrize("package", ["runtime", "server", "server/bulk"])
def test_rooms_do_not_import_each_other_in_circles(package):
    rooms = {p.name for p in (ROOT / package).iterdir() if p.is_dir()}
    needs: dict[str, set[str]] = {}
    inside = package.replace("/", ".") + "."
    for path in files(package):
        of = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        modules = (m.removeprefix(inside) for m in imports(path) if m.startswith(inside))
        needs.setdefault(of, set()).update({m.split(".")[0] for m in modules} - {of})
    while free := {room for room in needs if not needs[room] & needs.keys()}:
        for room in free:
            del needs[room]
    assert not needs.keys() & rooms, needs


def test_ray_is_known_where_many_machines_are():
    users = {p.relative_to(ROOT) for p in files("server") if "ray" in imports(p)}
    assert {path.parent.name for path in users} == {"captioners", "cluster"}
    for path in files("server"):  # serving without Ray must not load server.cluster
        if path.parent.name != "cluster" and path.name != "__main__.py":
            assert not any(module.startswith("server.cluster") for module in imports(path)), path


def test_a_wheel_has_all_packages():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {
        init.parent.relative_to(ROOT)
        for name in OURS
        for init in (ROOT / name).rglob("__init__.py")
    }
    assert {str(path).replace("/", ".") for path in there} == set(listed) - {"engines.demo"}


def test_serving_never_imports_what_exporting_needs():
    for package in ("runtime", "server"):
        for path in files(package):
            assert not {m.split(".")[0] for m in imports(path)} & HEAVY, path
    code = "import sys, server.__main__, runtime.execution.host; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {m.split(".")[0] for m in loaded.stdout.split()} & HEAVY


def test_two_rooms_of_the_runtime_know_onnx_runtime():
    users = {p.parent.name for p in files("runtime") if "onnxruntime" in imports(p)}
    assert users == {"providers", "execution"}
    assert not [p for p in files("server") if "onnxruntime" in imports(p)]


@pytest.mark.parametrize("package", ["runtime.execution.loader", "export.reference"])
def test_nothing_is_reported_to_the_makers_of_onnx_runtime(package, tmp_path):
    """It would keep an id of the machine under HOME, and what it has not sent yet."""
    # Drop the variables of a test run, where it would report nothing anyway.
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    code = (
        f"import {package}, onnxruntime; onnxruntime.InferenceSession('engines/demo/decoder.onnx')"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept | {"HOME": str(tmp_path)}, check=True
    )
    assert not list(tmp_path.rglob("*onnxruntime*"))


def test_what_stands_behind_protocols_knows_of_none():
    for room in ("service", "ipc"):
        for path in files(f"server/{room}"):
            assert not {m for m in imports(path) if m.startswith("server.http")}, path
