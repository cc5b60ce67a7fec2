"""Settings of an engine, built once at the edge of the program and passed down."""

from dataclasses import dataclass
from pathlib import Path

from runtime.errors import InvalidRequest

_DEMO = Path("engines/demo")
AUTO = "auto"
PROVIDERS = (AUTO, "tensorrt", "cuda", "openvino", "cpu")  # after auto, in the order it tries
NVIDIA = ("cuda", "tensorrt")  # of these
SLOTS = 16  # on a processor, unless told otherwise: more rows make a step no cheaper for each
MOST_SLOTS = 64  # on a GPU, where none are asked for and memory has room for more
TEXT_TOKENS = 64  # positions of a slot, unless told otherwise: captions are short


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an engine uses the machine.

    slots: sequences that decode together; each takes one fixed piece of the K/V arena. None takes
        16, or on a GPU what fits its memory, at most 64.
    text_tokens: text positions a slot has (prompt and caption); None takes the model's own number,
        at most 64, because captions are short and the arena's size follows from it.
    encode_batch: most images that go through the encoder between two decode steps; None leaves it
        to the plan (`runtime.planning.plan`).
    patience: how long running sequences go before the next encoder call, in terms of the last one's
        duration, for each that runs and divided by the number that wait (`runtime.pacing`).
    refill: admit new sequences while others run (continuous batching); off means static batching.
    provider: execution provider of the encoder graph: cpu, openvino, cuda, tensorrt or auto.
    precision: a combination of the manifest such as fp32/int8/int8, or auto.
    threads: threads of each session's operators; 0 lets ONNX Runtime take all cores.
    memory_share: of the memory of its device that it may take, if several engines share that.
    cuda_graphs: on a GPU, capture each step once and launch it again.
    """

    slots: int | None = None
    text_tokens: int | None = None
    encode_batch: int | None = None
    patience: float = 0.1
    refill: bool = True
    provider: str = AUTO
    precision: str = AUTO
    threads: int = 0
    memory_share: float = 1.0
    cuda_graphs: bool = True

    def text_positions(self, model: int) -> int:
        """Text positions of a slot. model: the most that the model has."""
        return min(self.text_tokens or TEXT_TOKENS, model)

    def __post_init__(self) -> None:
        batch = 1 if self.encode_batch is None else self.encode_batch
        slots = 1 if self.slots is None else self.slots
        if slots < 1 or batch < 1 or self.threads < 0:
            raise InvalidRequest("slots and encode_batch must be 1 or more, threads 0 or more")
        if not 0 < self.memory_share <= 1:
            raise InvalidRequest("memory_share must be above 0, and 1 at most")
        if self.patience < 0:
            raise InvalidRequest("patience must be 0 or more")
        if self.text_tokens is not None and self.text_tokens < 2:
            raise InvalidRequest("text_tokens must be 2 or more: the start token and one more")


def demo_engine() -> Path:
    """The embedded engine: of the checkout that one stands in, or else the installed one."""
    return _DEMO if _DEMO.is_dir() else Path(__file__).parents[2] / _DEMO
