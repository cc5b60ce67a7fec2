"""What runs where: the default for a processor, and plans that were measured."""

import errno
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from runtime.engine import Engine
from runtime.errors import EngineFolderError
from runtime.model import manifest as manifests
from runtime.model.manifest import EXACT
from runtime.planning import plan as plans
from runtime.planning.config import EngineConfig
from runtime.planning.machine import Machine, quota, this_machine
from runtime.planning.plan import default, resolve, suitable
from runtime.providers import registry
from runtime.providers.session import Placement, session_options
from runtime.tune import _candidates, main, tune

AUTO = EngineConfig()
OLD = Machine("old", 4, ())
AVX2 = Machine("desktop", 4, ("avx2",))
VNNI = Machine("server", 8, ("avx2", "avx512f", "avx512_vnni"))
AMX = Machine("matrix", 8, ("avx2", "avx512f", "avx512_vnni", "amx_bf16", "amx_int8"))


@pytest.fixture
def folder(small, tmp_path):
    return shutil.copytree(small[1], tmp_path / "engine")


@pytest.mark.parametrize(("machine", "asked"), [(OLD, True), (AVX2, True), (VNNI, False)])
def test_exact_sums_are_asked_for_where_there_is_no_instruction_for_them(
    machine, asked, monkeypatch
):
    """Where there is one, they would take longer."""
    monkeypatch.setattr("runtime.providers.session.this_machine", lambda: machine)
    options = session_options(Placement("cpu"))
    try:
        said = options.get_session_config_entry("session.x64quantprecision")
    except RuntimeError:  # there is none
        said = "0"
    assert said == str(int(asked))


@pytest.mark.parametrize(
    ("machine", "provider", "expected"),
    [
        (OLD, "cpu", EXACT),  # 8-bit products are no faster there
        (AVX2, "cpu", "int8/int8/int8"),
        (AVX2, "openvino", "fp32/int8/int8"),  # its 8-bit products may saturate there
        (AVX2, "cuda", "fp32/int8/int8"),
        (VNNI, "cpu", "int8/int8/int8"),
        (VNNI, "openvino", "int8-static/int8/int8"),
        (AMX, "cpu", "int8/int8/int8"),
        (AMX, "openvino", "int8-static/int8/int8"),
        (VNNI, "cuda", "fp32/int8/int8"),
    ],
)
def test_the_default_suits_the_processor(folder, machine, provider, expected):
    plan = default(manifests.load(folder), AUTO, provider, machine)
    assert (plan.combination, plan.encoder_provider) == (expected, provider)
    assert machine.cpu in plan.origin


def test_only_what_was_proven_is_chosen(folder):
    manifest = manifests.load(folder)
    failed = [c for c in manifest.combinations if c.encoder != "int8" and c.cache != "int8"]
    manifest = replace(manifest, combinations=tuple(failed))
    assert default(manifest, AUTO, "cpu", VNNI).combination == "fp32/int8/float32"
    assert default(manifest, AUTO, "openvino", AMX).combination == "int8-static/int8/float32"
    exact = replace(manifest, combinations=manifest.combinations[:1])
    assert default(exact, AUTO, "cpu", VNNI).combination == EXACT


def test_tuning_measures_all_and_the_engine_runs_by_it(folder, capsys):
    assert main([str(folder), "--slots", "2"]) == 0
    content = json.loads((folder / "plan.json").read_text())
    measured = [row["combination"] for row in content["measured"]]
    combinations = {c.name for c in manifests.load(folder).combinations}
    assert set(measured) >= {c for c in combinations if suitable(c, "cpu", this_machine())}
    assert content["plan"]["combination"] == measured[0]  # the fastest comes first
    said = capsys.readouterr().out
    assert measured[0] in said
    assert "left out" not in said
    engine = Engine.open(folder)
    assert "(plan.json)" in engine.runs_on
    assert engine.encode_batch == content["plan"]["encode_batch"]
    assert not {"slots", "memory_limit"} & content["plan"].keys()  # a start finds out what fits


def test_what_the_caller_says_counts_more_than_the_plan(folder):
    best = tune(folder, slots=2).plan
    assert Engine.open(folder, EngineConfig(encode_batch=3)).encode_batch == 3
    encoder = best.combination.split("/")[0]
    assert f"encoder {encoder} on {best.encoder_provider}" in Engine.open(folder).runs_on
    exact = Engine.open(folder, EngineConfig(precision=EXACT))
    assert "encoder fp32 on" in exact.runs_on
    assert "plan.json" not in exact.runs_on


def test_processors_are_tuned_and_a_gpu_is_used_where_there_is_one(folder, monkeypatch):
    monkeypatch.setattr(registry, "available", lambda: ("cuda", "cpu"))
    tune(folder, slots=2)
    content = json.loads((folder / "plan.json").read_text())
    assert {row["encoder_provider"] for row in content["measured"]} == {"cpu"}
    [cuda, cpu] = resolve(folder, manifests.load(folder), AUTO, ("cuda", "cpu"))
    assert (cuda.encoder_provider, cpu.encoder_provider) == ("cuda", "cpu")
    [planned] = resolve(folder, manifests.load(folder), AUTO, ("cpu",))
    assert planned.origin == "plan.json"


def test_a_plan_for_something_else_is_refused_with_the_remedy(folder):
    def refused(message, **changes):
        path = folder / "plan.json"
        path.write_text(json.dumps(json.loads(good) | changes))
        with pytest.raises(EngineFolderError, match=f"{message}.*make tune ENGINE={folder}"):
            Engine.open(folder)

    plan = default(manifests.load(folder), AUTO, "cpu", this_machine())
    plans.save(folder, plan, this_machine(), [])
    good = (folder / "plan.json").read_text()
    assert Engine.open(folder)
    other = json.loads(good)["machine"] | {"cores": 999}
    refused("was made on 999 cores", machine=other)
    refused("for another export", engine="0" * 64)
    refused("another version", format=99)
    refused("can't be read", plan={})
    refused("can't be read", machine=None)
    refused("can't be read.*Expected `int` >= 1", plan=asdict(plan) | {"encode_batch": 0})
    refused("can't be read.*Expected `int`", plan=asdict(plan) | {"encoder_streams": "two"})
    refused("can't be read.*`int` <= 1024", plan=asdict(plan) | {"decoder_threads": 100_000})
    refused(
        "wants tensorrt, which is gone", plan=asdict(replace(plan, encoder_provider="tensorrt"))
    )


def test_a_plan_is_not_made_for_what_is_no_engine(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "is not an engine" in capsys.readouterr().err


def test_openvino_is_not_given_products_that_may_saturate(folder, monkeypatch, caplog):
    monkeypatch.setattr(registry, "available", lambda: ("openvino", "cpu"))
    for machine, eight_bits in ((AVX2, {"cpu"}), (VNNI, {"openvino", "cpu"})):
        plans_of = list(_candidates(manifests.load(folder), machine))
        with_8_bits = (p for p in plans_of if p.combination.startswith("int8"))
        assert {plan.encoder_provider for plan in with_8_bits} == eight_bits
    wanted = EngineConfig(precision="int8-static/int8/int8")
    for provider, machine in (("openvino", VNNI), ("cpu", AVX2), ("cpu", OLD)):
        default(manifests.load(folder), wanted, provider, machine)
    assert not caplog.text
    default(manifests.load(folder), wanted, "openvino", AVX2)
    assert "was not proven on a processor such as" in caplog.text


def test_a_folder_that_cannot_be_written_to_is_told_before_measuring(folder, monkeypatch, capsys):
    monkeypatch.setattr("runtime.tune.os.access", lambda *_: False)
    assert main([str(folder)]) == 1
    assert "can't be written to" in capsys.readouterr().err


def test_this_machine_has_cores():
    assert this_machine().cores >= 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, 0),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0),
        ({}, 0),
    ],
)
def test_a_containers_quota_limits_the_cores(tmp_path, monkeypatch, files, expected):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert quota(tmp_path) == expected
    monkeypatch.setattr("runtime.planning.machine.quota", lambda: expected)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    this_machine.cache_clear()
    assert this_machine().cores == (expected or 64)
    this_machine.cache_clear()


@pytest.mark.parametrize(("mask", "cores", "threads"), [({3}, 1, 1), (set(range(8)), 8, 0)])
def test_sessions_have_no_more_threads_than_they_may_use(monkeypatch, mask, cores, threads):
    """With 0 ONNX Runtime takes all physical cores, also those outside the affinity mask."""
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: mask, raising=False)
    monkeypatch.setattr("runtime.planning.machine.quota", lambda: 0)
    this_machine.cache_clear()
    assert this_machine().cores == cores
    this_machine.cache_clear()
    assert session_options(Placement("cpu")).intra_op_num_threads == threads


def test_a_plan_that_is_a_mount_or_a_link_is_written_where_it_is(folder, tmp_path, monkeypatch):
    machine = this_machine()
    plan = default(manifests.load(folder), AUTO, "cpu", machine)
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text("before")
    (folder / plans.FILE).unlink(missing_ok=True)
    (folder / plans.FILE).symlink_to(elsewhere)
    plans.save(folder, plan, machine, [])
    assert (folder / plans.FILE).is_symlink()
    whole = elsewhere.read_text()
    assert json.loads(whole)["measured"] == []
    elsewhere.write_text("before")

    def busy(self, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", busy)
    plans.save(folder, plan, machine, [])
    assert elsewhere.read_text() == whole
    assert not list(tmp_path.glob(".plan*")) and not list(folder.glob(".plan*"))


def test_a_plan_can_be_read_by_who_reads_the_engine_and_else_is_refused(folder, monkeypatch):
    manifest, machine = manifests.load(folder), this_machine()
    before = os.umask(0o077)
    try:
        plans.save(folder, default(manifest, AUTO, "cpu", machine), machine, [])
    finally:
        os.umask(before)
    path = folder / plans.FILE
    assert path.stat().st_mode == (folder / "manifest.json").stat().st_mode
    path.write_text("[" * 100_000)
    with pytest.raises(EngineFolderError, match=r"plan\.json can't be read.*make tune"):
        plans.load(folder, manifest, machine, ("cpu",))
    read = Path.read_text

    def forbidden(self):
        if self.name in ("plan.json", "manifest.json"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(self)

    monkeypatch.setattr(Path, "read_text", forbidden)
    with pytest.raises(EngineFolderError, match=r"plan\.json can't be read \(Permission denied"):
        plans.load(folder, manifest, machine, ("cpu",))
    with pytest.raises(EngineFolderError, match=r"manifest\.json can't be read: Permission denied"):
        manifests.load(folder)


def test_a_plan_that_can_not_be_written_leaves_the_one_before(folder, monkeypatch):
    there = folder / plans.FILE
    there.write_text("before")
    files = sorted(folder.iterdir())

    def full(path, text):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    plan = default(manifests.load(folder), AUTO, "cpu", this_machine())
    with pytest.raises(EngineFolderError, match="No space left"):
        plans.save(folder, plan, this_machine(), [])
    assert there.read_text() == "before"
    assert sorted(folder.iterdir()) == files
