"""A GPU's memory budget, computed before anything is allocated."""

import logging
from dataclasses import dataclass

from runtime.errors import ProviderError
from runtime.providers.gpu import Gpu

log = logging.getLogger(__name__)

_SAFE = 0.9  # usable share of free memory: the driver and other processes take some
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Memory:
    """GPU memory of an engine, in bytes. `image` is working memory per image of a batch."""

    weights: int
    slot: int
    image: int
    fixed: int = 768 * _MIB  # CUDA's context, its libraries' workspaces and captured graphs

    def batch(self, gpu: Gpu, most: int, slots: int | None) -> int:
        """Images to encode at a time: half of `most`, of that, and so on, until there is room for
        the requested slots, or four beside each image.
        """
        room = int(gpu.free * _SAFE) - self.fixed - self.weights - self.slot
        while most > 1 and most * self.image + (slots or 4 * most) * self.slot > room:
            most //= 2
        return most

    def budget(self, gpu: Gpu, slots: int | None, most: int, batch: int) -> tuple[int, int]:
        """Return the number of slots, and the bytes that are left for sessions.

        slots: requested number; None takes as many as fit, at most `most`. batch: images per
        encoder call. Raises ProviderError, with the figures, if the requested slots, or a single
        one, don't fit.
        """
        base = self.fixed + self.weights + batch * self.image + self.slot  # plus the spare slot
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
        return chosen, int(gpu.free * _SAFE) - self.fixed - (chosen + 1) * self.slot
