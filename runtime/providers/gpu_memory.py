"""What fits a GPU's memory, before anything is put there."""

import logging
from dataclasses import dataclass

from runtime.errors import ProviderError
from runtime.providers.gpu import Gpu

log = logging.getLogger(__name__)

_SAFE = 0.9  # of the free memory: the driver and others on the GPU take some as well
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Memory:
    """What an engine takes of a GPU, in bytes. `image` is working memory for each encoded image."""

    weights: int
    slot: int
    image: int
    fixed: int = 768 * _MIB  # CUDA's context, its libraries' workspaces and captured graphs

    def budget(self, gpu: Gpu, slots: int | None, most: int, batch: int) -> tuple[int, int]:
        """How many slots fit, and bytes that both sessions may take beside them.

        slots: what was asked for; None takes as many as fit, at most `most`. Raises ProviderError,
        with the sum, if they don't fit, or not even one does.
        """
        base = self.fixed + self.weights + batch * self.image + self.slot  # one is nobody's
        room = int(gpu.free * _SAFE) - base
        fitting = max(0, room) // self.slot
        sum_ = (
            f"{gpu}: {base // _MIB} MiB for weights, CUDA and {batch} images at a time, "
            f"{self.slot / _MIB:.1f} MiB a slot"
        )
        if fitting < (slots or 1):
            raise ProviderError(
                f"{sum_}: {slots or 1} slots do not fit"
                + (f", {fitting} do: use --slots {fitting}" if fitting else "")
                + ". Free memory on the GPU, use a smaller --encode-batch, or another GPU"
            )
        chosen = slots or min(most, fitting)
        log.info("%s; %d slots fit, %d are used", sum_, fitting, chosen)
        return chosen, int(gpu.free * _SAFE) - (chosen + 1) * self.slot
