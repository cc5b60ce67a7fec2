"""How much to measure: some minutes, or all."""

from dataclasses import dataclass

BEAMS = 4
ONCE = "fp16 encoded-once"  # `bench.contestants.encoded_once`; the other modes are Hugging Face's


@dataclass(frozen=True, slots=True)
class Extent:
    """How much to measure. `batches`: batches of mixed sizes, for the growth of memory."""

    images: int
    batches: int
    repeats: int
    torch_modes: tuple[str, ...]
    torch_batches: tuple[int, ...]


QUICK = Extent(4096, 2_000, 3, ("fp16",), (64, 256))
FULL = Extent(
    16384, 10_000, 5, ("fp32", "fp16", "bf16", "fp16 compiled", ONCE, f"{ONCE} compiled"),
    (1, 16, 64, 256),
)  # fmt: skip
