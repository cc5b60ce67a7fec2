"""`python -m server`: settings, then the supervisor until it is told to stop."""

import asyncio
import os
import sys
from importlib.util import find_spec

from runtime.config import AUTO
from runtime.errors import ProviderError, VignetteError
from runtime.gpu import visible_gpus
from server import worker
from server.keys import Keys
from server.logs import configure
from server.settings import Settings, from_command_line
from server.supervisor import Supervisor


def main() -> int:
    """Run until told to stop; returns the exit status."""
    try:
        settings = from_command_line()
        configure(settings)
        asyncio.run(_supervise(settings))
    except VignetteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


async def _supervise(settings: Settings) -> None:
    if settings.api_keys:
        Keys.read(settings.api_keys)  # each front-end does, but now is the time to complain
    devices = _devices(settings)
    settings = settings.model_copy(update={"workers": len(devices)})  # pixels are kept for all
    await Supervisor(settings, worker.main, devices).run()


def _devices(settings: Settings) -> list[str]:
    """What CUDA_VISIBLE_DEVICES each worker gets, one GPU each; on processors nothing."""
    if settings.provider in ("cuda", "tensorrt"):
        indices = [gpu.index for gpu in visible_gpus()]
    elif settings.provider == AUTO and find_spec("pynvml"):  # the gpu extra is installed
        try:
            indices = [gpu.index for gpu in visible_gpus()]
        except ProviderError:
            indices = []  # the worker says what auto takes instead
    else:
        indices = []
    if not indices:
        return [""] * (settings.workers or 1)
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    devices = names if len(names) == len(indices) and names[0] else list(map(str, indices))
    return devices[: settings.workers]


if __name__ == "__main__":
    sys.exit(main())
