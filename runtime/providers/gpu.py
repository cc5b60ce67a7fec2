"""NVIDIA GPUs as the driver's own library (NVML) tells of them, before CUDA is started.

Everything that keeps a GPU from serving is found here, with its remedy, so that it is said before
the port opens.
"""

import contextlib
import os
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from runtime.errors import ProviderError

_NO_DRIVER = (
    "no NVIDIA driver is reachable: install it on the host (`nvidia-smi` must work there) and "
    "start a container with --gpus all and the NVIDIA container toolkit"
)
_NO_GPU = (
    "no NVIDIA GPU is visible: start the container with --gpus all, and see that "
    "CUDA_VISIBLE_DEVICES names a GPU that `nvidia-smi -L` lists"
)
_OLDEST = (7, 5)  # compute capability that CUDA 13, and onnxruntime-gpu for it, still know
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that this process may use. Memory in bytes; `cuda` is the newest that its driver runs.

    `index` counts as CUDA does, among the visible ones. An instance (MIG) of a GPU counts as one,
    and CUDA knows it by `uuid` alone.
    """

    index: int
    name: str
    compute: tuple[int, int]
    driver: str
    cuda: tuple[int, int]
    total: int
    free: int
    uuid: str = ""

    @property
    def is_instance(self) -> bool:
        """Whether it is a part of a GPU that was split."""
        return self.uuid.startswith("MIG-")

    def shared(self, share: float) -> "Gpu":
        """As seen by an engine that may take that share of it."""
        return replace(self, free=min(self.free, int(share * self.total)))

    def __str__(self) -> str:
        return f"{self.name} ({self.free // _MIB} of {self.total // _MIB} MiB free)"


def require_gpu(cuda_major: int | None, index: int = 0) -> Gpu:
    """The visible GPU number `index`.

    cuda_major: what onnxruntime-gpu was built for. Raises ProviderError, with the remedy, without a
    driver, without that GPU, or with a driver that is too old.
    """
    gpus = visible_gpus()
    if index >= len(gpus):
        raise ProviderError(_NO_GPU)
    gpu = gpus[index]
    if cuda_major is not None and gpu.cuda[0] < cuda_major:
        raise ProviderError(
            f"driver {gpu.driver} runs CUDA {gpu.cuda[0]}.{gpu.cuda[1]}, and this onnxruntime-gpu "
            f"is built for CUDA {cuda_major}: update the driver on the host"
        )
    if gpu.compute < _OLDEST:
        raise ProviderError(
            f"{gpu.name} has compute capability {gpu.compute[0]}.{gpu.compute[1]}, and CUDA 13 "
            f"takes {_OLDEST[0]}.{_OLDEST[1]} or newer: use another GPU, or --provider cpu"
        )
    return gpu


def visible_gpus() -> list[Gpu]:
    """All GPUs that CUDA would show to this process; ProviderError if the driver can't be asked."""
    # NVML counts so, CUDA only if it is told before it starts.
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    try:
        import pynvml
    except ModuleNotFoundError as cause:
        raise ProviderError("nvidia-ml-py is missing: install the gpu extra") from cause
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as cause:
        raise ProviderError(f"{_NO_DRIVER} ({cause})") from cause
    try:
        driver, version = (
            pynvml.nvmlSystemGetDriverVersion(),
            pynvml.nvmlSystemGetCudaDriverVersion_v2(),
        )
        named = _handles(pynvml)
        found = []
        for index, uuid in enumerate(visible(list(named), os.environ.get("CUDA_VISIBLE_DEVICES"))):
            handle, gpu = named[uuid]
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            found.append(
                Gpu(
                    index=index,
                    name=pynvml.nvmlDeviceGetName(handle),
                    compute=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(gpu)),
                    driver=driver,
                    cuda=(version // 1000, version % 1000 // 10),
                    total=memory.total,
                    free=memory.free,
                    uuid=uuid,
                )
            )
        return found
    except pynvml.NVMLError as cause:
        raise ProviderError(f"the NVIDIA driver can't be asked for its GPUs: {cause}") from cause
    finally:
        pynvml.nvmlShutdown()


def _handles(pynvml: ModuleType) -> dict[str, tuple[Any, Any]]:
    """NVML's handles by UUID: each GPU, or instance (MIG) of one that was split, and its GPU."""
    found: dict[str, tuple[Any, Any]] = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
        handles = [gpu]
        if _is_split(pynvml, gpu):
            handles = []
            for instance in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
                with contextlib.suppress(pynvml.NVMLError_NotFound):  # fewer than it could have
                    handles.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, instance))
        found |= {pynvml.nvmlDeviceGetUUID(handle): (handle, gpu) for handle in handles}
    return found


def _is_split(pynvml: ModuleType, gpu: Any) -> bool:
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(gpu)
    except pynvml.NVMLError_NotSupported:  # most GPUs can't be
        return False
    return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)


def visible(uuids: list[str], wanted: str | None) -> list[str]:
    """The UUIDs that CUDA_VISIBLE_DEVICES (`wanted`) leaves, in its order.

    As CUDA reads it: indices or beginnings of UUIDs; what comes after an unknown one is hidden.
    """
    if wanted is None:
        return uuids
    left: list[str] = []
    for name in map(str.strip, wanted.split(",")):
        if name.isdecimal() and int(name) < len(uuids):
            left.append(uuids[int(name)])
            continue
        matching = [uuid for uuid in uuids if name and uuid.startswith(name)]
        if len(matching) != 1:
            break
        left += matching
    return left
