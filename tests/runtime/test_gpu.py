"""What keeps a GPU from serving is said before the port opens, with its remedy."""

import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from runtime.errors import ProviderError
from runtime.execution import loader
from runtime.model import manifest as manifests
from runtime.planning.config import EngineConfig
from runtime.planning.plan import Plan
from runtime.providers import cuda, openvino, registry, tensorrt
from runtime.providers.gpu import Gpu, require_gpu, visible
from runtime.providers.gpu_memory import Memory
from server.models import ServedModel
from server.processes import devices
from server.processes.supervised_engine import SupervisedEngine
from server.settings import Settings
from tests.support.fakes import fake_folder, fake_worker
from tests.support.paths import DEMO

MIB = 2**20
H100 = Gpu(0, "NVIDIA H100 80GB HBM3", (9, 0), "580.10", (13, 0), 80_000 * MIB, 70_000 * MIB)
UUIDS = ["GPU-aa11", "GPU-ab22", "GPU-cc33"]
INSTANCES = ["MIG-dd44", "MIG-ee55"]


class NvmlError(Exception):
    pass


class NotSupported(NvmlError):
    pass


class NotFound(NvmlError):
    pass


def nvml(monkeypatch, count=1, cuda=13000, broken=None, compute=(9, 0), split=()):
    """NVIDIA's library on a host with `count` GPUs; those in `split` have two instances each."""

    def init():
        if broken:
            raise NvmlError(broken)

    def mig_mode(gpu):
        if gpu not in split:
            raise NotSupported
        return 1, 1

    def instance(gpu, number):
        if number >= len(INSTANCES):
            raise NotFound
        return gpu, number

    def uuid(handle):
        return UUIDS[handle] if isinstance(handle, int) else INSTANCES[handle[1]]

    def memory(handle):
        gib = 80 if isinstance(handle, int) else 10
        return SimpleNamespace(total=gib << 30, free=(gib - 10) << 30)

    fake = SimpleNamespace(
        NVMLError=NvmlError,
        NVMLError_NotSupported=NotSupported,
        NVMLError_NotFound=NotFound,
        NVML_DEVICE_MIG_ENABLE=1,
        nvmlDeviceGetMigMode=mig_mode,
        nvmlDeviceGetMaxMigDeviceCount=lambda gpu: 7,
        nvmlDeviceGetMigDeviceHandleByIndex=instance,
        nvmlInit=init,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "550.54",
        nvmlSystemGetCudaDriverVersion_v2=lambda: cuda,
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetUUID=uuid,
        nvmlDeviceGetName=lambda i: f"GPU number {i}",
        nvmlDeviceGetCudaComputeCapability=dict.fromkeys(range(count), compute).__getitem__,
        nvmlDeviceGetMemoryInfo=memory,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_gpu_is_found_with_what_its_driver_runs(monkeypatch):
    nvml(monkeypatch, count=2)
    found = require_gpu(13, 1)
    assert (found.name, found.index, found.cuda) == ("GPU number 1", 1, (13, 0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert require_gpu(13).name == "GPU number 1"


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ({"broken": "Driver Not Loaded"}, r"no NVIDIA driver is reachable.*--gpus all"),
        ({"count": 0}, "no NVIDIA GPU is visible: start the container with --gpus all"),
        ({"cuda": 12040}, "driver 550.54 runs CUDA 12.4.*built for CUDA 13: update the driver"),
        ({"compute": (7, 0)}, r"compute capability 7\.0.*7\.5 or newer: use another GPU"),
    ],
)
def test_each_obstacle_has_its_message(monkeypatch, host, message):
    nvml(monkeypatch, **host)
    with pytest.raises(ProviderError, match=message):
        require_gpu(13)


def test_an_empty_list_of_visible_devices_hides_all(monkeypatch):
    nvml(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ProviderError, match="CUDA_VISIBLE_DEVICES"):
        require_gpu(13)


def test_an_engine_for_bulk_captioning_has_one_gpu_and_its_time_to_compile(monkeypatch, tmp_path):
    nvml(monkeypatch, count=2)
    settings = Settings(_env_file=None, provider="tensorrt")
    model = ServedModel("fake", fake_folder(tmp_path / "engine"), 1.0, "")
    engine = SupervisedEngine(settings, model, fake_worker, places=1)
    child = engine._worker
    child.process, child.heard_at = SimpleNamespace(is_alive=lambda: True, pid=1), 0.0
    assert child.health_problem(now=3600.0, step_seconds=1.0) is None
    assert child.worker_state().device == "0"
    engine._supervisor._control.close()
    engine._supervisor._run.remove()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ProviderError, match="nvidia-ml-py is missing: install the gpu extra"):
        require_gpu(13)


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        (None, UUIDS),
        ("2,0", ["GPU-cc33", "GPU-aa11"]),
        ("GPU-ab", ["GPU-ab22"]),
        ("GPU-a", []),  # two UUIDs begin like this
        ("1,7,0", ["GPU-ab22"]),  # CUDA stops reading at an entry that it does not know
        ("-1", []),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(wanted, left):
    assert visible(UUIDS, wanted) == left


@pytest.mark.parametrize(
    ("variable", "settings", "expected"),
    [
        (None, {"provider": "cuda"}, ["0", "1", "2"]),
        (None, {"provider": "auto"}, ["0", "1", "2"]),
        (None, {"provider": "auto", "workers": 2}, ["0", "1"]),
        (None, {"provider": "cuda", "workers": 4}, ["0", "1", "2", "0"]),
        ("2, 0", {"provider": "auto"}, ["2", "0"]),
        ("1,-1", {"provider": "cuda"}, ["1"]),
        ("GPU-cc", {"provider": "cuda"}, ["GPU-cc"]),
        ("", {"provider": "auto"}, [""]),
        (None, {"provider": "cpu", "workers": 2}, ["", ""]),
    ],
)
def test_each_visible_gpu_gets_a_worker(monkeypatch, variable, settings, expected):
    nvml(monkeypatch, count=3)
    monkeypatch.setattr(devices, "serves_gpus", lambda: True)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert devices.devices_of_workers(Settings(_env_file=None, **settings)) == expected


def test_each_instance_of_a_split_gpu_counts_as_one(monkeypatch):
    nvml(monkeypatch, count=2, split=(1,))
    assert devices.devices_of_workers(Settings(_env_file=None, provider="cuda")) == [
        "0",
        *INSTANCES,
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", INSTANCES[1])
    found = require_gpu(13)
    assert (found.uuid, found.total, found.compute) == (INSTANCES[1], 10 << 30, (9, 0))


def test_auto_asks_for_no_gpu_without_the_gpu_extra(monkeypatch):
    nvml(monkeypatch)
    monkeypatch.setattr(devices, "serves_gpus", lambda: False)
    assert devices.devices_of_workers(Settings(_env_file=None)) == [""]


def test_auto_without_a_driver_is_left_to_the_worker(monkeypatch):
    nvml(monkeypatch, broken="Driver Not Loaded")
    monkeypatch.setattr(devices, "serves_gpus", lambda: True)
    assert devices.devices_of_workers(Settings(_env_file=None)) == [""]


def test_slots_fill_the_memory_up_to_a_bound():
    need = Memory(weights=600 * MIB, slot=10 * MIB, image=50 * MIB)
    slots, limit = need.budget(H100, None, most=64, batch=16)
    assert slots == 64
    assert limit == int(H100.free * 0.9) - 768 * MIB - 65 * 10 * MIB
    assert need.budget(H100, 200, most=64, batch=16)[0] == 200
    assert need.batch(H100, 64, None) == 64
    small = Gpu(0, "small", (8, 6), "580", (13, 0), 4096 * MIB, 2600 * MIB)
    assert need.budget(small, None, most=64, batch=16)[0] == (2340 - 768 - 600 - 800 - 10) // 10
    assert [need.batch(small, 64, slots) for slots in (None, 10, 40)] == [8, 16, 8]


def test_a_gpu_too_small_is_told_with_the_sum():
    need = Memory(weights=600 * MIB, slot=10 * MIB, image=50 * MIB)
    small = Gpu(0, "small", (8, 6), "580", (13, 0), 4096 * MIB, 2600 * MIB)
    with pytest.raises(ProviderError) as said:
        need.budget(small, 64, most=64, batch=16)
    for part in ("2178 MiB", "10.0 MiB a slot", "64 slots do not fit, 16 do: use --slots 16"):
        assert part in str(said.value)
    tiny = Gpu(0, "tiny", (8, 6), "580", (13, 0), 2048 * MIB, 1000 * MIB)
    with pytest.raises(ProviderError, match=r"1 slots do not fit\. Free memory on the GPU"):
        need.budget(tiny, None, most=64, batch=16)


def test_memory_is_counted_from_the_engine():
    manifest = manifests.load(DEMO)
    need = loader.gpu_memory(manifest, Plan("fp32/fp32/float32", "cuda"))
    graphs = [onnx.load(DEMO / f"{graph}.onnx") for graph in ("encoder", "decoder")]
    values = [numpy_helper.to_array(t) for graph in graphs for t in graph.graph.initializer]
    as_fp32 = sum(v.size * max(4 * (v.dtype == np.float16), v.itemsize) for v in values)
    assert need.weights == as_fp32
    sizes = manifest.sizes
    text = min(64, sizes.text)
    slot = 2 * sizes.layers * sizes.heads * sizes.head * (sizes.prefix + text) * 2
    assert need.slot == 2 * slot  # the allocator rounds up to a power of two


def test_auto_leaves_a_gpu_out_that_cannot_serve(monkeypatch, caplog):
    nvml(monkeypatch, broken="Driver Not Loaded")
    monkeypatch.setattr(
        registry.ort, "get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )  # fmt: skip
    monkeypatch.setattr(openvino, "devices", list)
    assert registry.available() == ("cpu",)
    assert "cuda was left out: no NVIDIA driver is reachable" in caplog.text
    with pytest.raises(ProviderError, match="no NVIDIA driver"):
        loader.prepare(DEMO, EngineConfig(provider="cuda"))


def test_tensorrt_without_its_libraries_says_what_to_install():
    if tensorrt.importlib.util.find_spec("tensorrt_libs"):
        pytest.skip("TensorRT is here")
    with pytest.raises(ProviderError, match=r"TensorRT can't be loaded.*\[gpu,tensorrt\]"):
        tensorrt.version()


def test_what_tensorrt_compiled_is_kept_apart_by_gpu_version_and_graph():
    key = tensorrt.key(H100, "10.16.1", "abcdef0123456789")
    assert key == "nvidia-h100-80gb-hbm3-sm90-trt10.16.1-abcdef012345"
    assert key != tensorrt.key(H100, "10.16.1", "0" * 16)
    assert key != tensorrt.key(H100, "10.15.0", "abcdef0123456789")


def test_tensorrt_gets_a_profile_and_both_caches(tmp_path):
    options = tensorrt.options(tmp_path, (3, 224, 224), 16, half=True)
    assert options["trt_profile_min_shapes"] == "pixels:1x3x224x224"
    assert options["trt_profile_max_shapes"] == "pixels:16x3x224x224"
    switches = {
        name: value for name, value in options.items() if not name.endswith(("path", "shapes"))
    }
    assert len(switches) == 4
    assert set(switches.values()) == {"True"}  # ONNX Runtime refuses 1 here
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(tmp_path)
    unproven = tensorrt.options(tmp_path, (3, 224, 224), 16, half=False)
    assert unproven["trt_fp16_enable"] == "False"


def test_a_cache_that_tensorrt_cannot_read_is_made_again(tmp_path, caplog):
    (tmp_path / "old.engine").write_bytes(b"cut off")

    def opened():
        if (tmp_path / "old.engine").exists():
            raise RuntimeError("could not deserialize engine")
        return "a session"

    assert tensorrt.open_cached(tmp_path, opened) == "a session"
    assert "compiles again: could not deserialize" in caplog.text
    assert not list(tmp_path.iterdir())


def test_an_error_that_no_cache_explains_is_not_tried_again(tmp_path):
    calls = []

    def fails():
        calls.append(1)
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        tensorrt.open_cached(tmp_path, fails)
    assert len(calls) == 1


def test_a_read_only_engine_folder_is_compiled_elsewhere(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tensorrt.os, "access", lambda *_: False)
    folder = tensorrt.cache_folder(tmp_path / "engine", "key")
    assert not folder.is_relative_to(tmp_path / "engine")
    assert "compiles at every start" in caplog.text


def test_memory_that_cannot_be_pinned_is_told_not_fatal(caplog, monkeypatch):
    monkeypatch.setattr(cuda, "major", lambda: 999)
    cuda.pin(np.zeros(4, np.uint8))
    assert "pageable" in caplog.text
