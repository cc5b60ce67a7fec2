"""Settings of an engine, built once at the program's entry point and passed down."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from runtime.errors import InvalidRequest

_DEMO = Path("engines/demo")
AUTO = "auto"
PROVIDERS = (AUTO, "tensorrt", "cuda", "openvino", "cpu")  # after auto: in the order tried by auto
NVIDIA = ("cuda", "tensorrt")  # of PROVIDERS
SLOTS = 16  # default on a CPU: more rows make a step no cheaper per row
MOST_SLOTS = 256  # default on a GPU if memory has room for more
LARGEST = 4096  # of slots, and of images encoded together
TEXT_TOKENS = 64  # default text positions per slot: captions are short


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an engine uses the machine.

    slots: rows that decode together, each with a fixed piece of the K/V arena. None takes 16, or
        on a GPU as many as fit its memory, at most 256.
    text_tokens: text positions per slot (prompt and caption); None takes the model's own number,
        at most 64, because captions are short and the arena's size depends on it.
    encode_batch: most images encoded between two decode steps; None leaves it to the plan
        (`runtime.planning.plan`).
    patience: decode time before the next encoder call, in durations of the last encoder call,
        times the number of running and divided by that of waiting sequences (`runtime.pacing`).
    refill: admit new sequences while others run (continuous batching); off means static batching.
    provider: execution provider of the encoder graph: cpu, openvino, cuda, tensorrt or auto.
    precision: a combination of the manifest such as fp32/int8/int8, or auto.
    threads: threads of each session's operators; 0 lets ONNX Runtime take all cores.
    memory_share: share of the device's memory the engine may take, if several engines share it.
    cuda_graphs: on a GPU, capture each step once and replay it.
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
        """Text positions per slot. model: the model's own number, an upper bound."""
        return min(self.text_tokens or TEXT_TOKENS, model)

    def __post_init__(self) -> None:
        batch = 1 if self.encode_batch is None else self.encode_batch
        slots = 1 if self.slots is None else self.slots
        if not (1 <= slots <= LARGEST and 1 <= batch <= LARGEST):
            raise InvalidRequest(f"slots and encode_batch must be from 1 to {LARGEST}")
        if self.threads < 0:
            raise InvalidRequest("threads must be 0 or more")
        if not 0 < self.memory_share <= 1:
            raise InvalidRequest("memory_share must be above 0, and 1 at most")
        if self.patience < 0:
            raise InvalidRequest("patience must be 0 or more")
        if self.text_tokens is not None and self.text_tokens < 2:
            raise InvalidRequest("text_tokens must be 2 or more: the start token and one more")


def serves_gpus() -> bool:
    """Whether the installed ONNX Runtime supports CUDA, found out without loading it."""
    try:
        return bool(version("onnxruntime-gpu"))
    except PackageNotFoundError:
        return False


def most_slots(slots: int | None) -> int:
    """`slots`, or an upper bound of those that a worker takes by default."""
    return slots or (MOST_SLOTS if serves_gpus() else 4 * SLOTS)


def demo_engine() -> Path:
    """Folder of the demo engine: in the current checkout, or else in the installed package."""
    return _DEMO if _DEMO.is_dir() else Path(__file__).parents[2] / _DEMO
