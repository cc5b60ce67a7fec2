"""NVIDIA GPUs as reported by the driver's library (NVML), before CUDA is started.

Whatever keeps a GPU from serving is detected here and reported, with its remedy, before the port
opens.
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
_OLDEST = (7, 5)  # lowest compute capability of CUDA 13, and of onnxruntime-gpu for it
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that this process may use. Memory in bytes; `cuda` is the driver's newest version.

    `index` counts visible GPUs, as CUDA does. A MIG instance counts as a GPU, and CUDA knows it by
    `uuid` only.
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
        """Whether this is a MIG instance."""
        return self.uuid.startswith("MIG-")

    def shared(self, share: float) -> "Gpu":
        """This GPU with `free` capped to a share of its total memory."""
        return replace(self, free=min(self.free, int(share * self.total)))

    def __str__(self) -> str:
        return f"{self.name} ({self.free // _MIB} of {self.total // _MIB} MiB free)"


def require_gpu(cuda_major: int | None, index: int = 0) -> Gpu:
    """The visible GPU number `index`.

    cuda_major: CUDA version of onnxruntime-gpu. Raises ProviderError, with the remedy, if the
    driver or the GPU is missing or too old.
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
    """All GPUs that CUDA shows this process; ProviderError if the driver can't be queried."""
    # NVML's order; CUDA uses it only if this is set before it starts.
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
    """NVML handles by UUID: (GPU or MIG instance, its physical GPU)."""
    found: dict[str, tuple[Any, Any]] = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
        handles = [gpu]
        if _is_split(pynvml, gpu):
            handles = []
            for instance in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)):
                with contextlib.suppress(pynvml.NVMLError_NotFound):  # fewer than the maximum
                    handles.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, instance))
        found |= {pynvml.nvmlDeviceGetUUID(handle): (handle, gpu) for handle in handles}
    return found


def _is_split(pynvml: ModuleType, gpu: Any) -> bool:
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(gpu)
    except pynvml.NVMLError_NotSupported:  # most GPUs have no MIG
        return False
    return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)


def visible(uuids: list[str], wanted: str | None) -> list[str]:
    """The UUIDs that CUDA_VISIBLE_DEVICES (`wanted`) selects, in its order.

    As in CUDA: entries are indices or UUID prefixes; an unknown entry hides all that follow.
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
