"""Which variant of each graph runs where: from plan.json, from the caller, or by default.

`make tune` writes plan.json for one engine on one machine. Without it, a default for the machine's
instruction set is used; both name only combinations that export has proven.
"""

import errno
import json
import logging
import os
import secrets
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from msgspec import Meta, convert

from runtime.errors import EngineFolderError
from runtime.model import manifest as manifests
from runtime.model.manifest import EXACT, Count, Manifest
from runtime.planning.config import AUTO, NVIDIA, TEXT_TOKENS, EngineConfig
from runtime.planning.machine import Machine, this_machine

log = logging.getLogger(__name__)

FILE = manifests.PLAN
FORMAT = 2

# In order of preference where 8-bit products are fast; combinations an engine lacks are skipped.
_INT8_ENCODER = ("int8/int8/int8", "int8/int8/float32", "int8/fp32/int8", "int8/fp32/float32")
_INT8_DECODER = ("fp32/int8/int8", "fp32/int8/float32", "fp32/fp32/int8")
_FUSED_HALF = ("fp16-fused/fp16/float16",)  # all state on the GPU
_PLAIN_HALF = ("fp16/fp16/float16",)  # plain ONNX, for TensorRT
_CALIBRATED_ENCODER = ("int8-static/int8/int8", "int8-static/int8/float32")  # OpenVINO's form
_ENCODE_BATCH = {"openvino": 4, "cuda": 64, "tensorrt": 16}
Threads = Annotated[int, Meta(ge=0, le=1024)]
_FITTED = ("slots", "text_tokens", "memory_limit", "cuda_graphs")
_MOST_STREAMS = 16  # as many as the default slots


@dataclass(frozen=True, slots=True)
class Plan:
    """How an engine's two graphs run: everything a runner needs. `origin` is for people.

    threads: 0 takes all cores. encoder_streams: images encoded in parallel
    (`runtime.execution.encoder`). slots, text_tokens: slots of the K/V arena, and text positions
    of each. memory_limit: bytes that a session may take on a GPU.
    """

    combination: str
    encoder_provider: str
    decoder_provider: str = "cpu"
    encoder_threads: Threads = 0
    decoder_threads: Threads = 0
    encode_batch: Count = 1
    encoder_streams: Count = 1
    origin: str = "default"
    slots: int = 1
    text_tokens: int = TEXT_TOKENS
    memory_limit: int | None = None
    cuda_graphs: bool = True

    def describe(self, arena: int) -> str:
        """For people: providers, precisions and slots. arena: bytes of the K/V arena."""
        encoder, decoder, cache = self.combination.split("/")
        streams = f" in {self.encoder_streams} streams" if self.encoder_streams > 1 else ""
        return (
            f"encoder {encoder} on {self.encoder_provider}{streams}, decoder {decoder} on "
            f"{self.decoder_provider}, K/V {cache} ({self.origin}); "
            f"{self.slots} slots in {arena / 2**20:.0f} MiB"
        )


def resolve(
    folder: Path, manifest: Manifest, config: EngineConfig, available: tuple[str, ...]
) -> list[Plan]:
    """Plans to try, in order; more than one only if the provider is `auto`.

    available: the provider asked for, or this machine's, fastest first. Raises EngineFolderError
    for a plan.json that belongs to another machine or engine, or can't be read.
    """
    if (folder / FILE).is_file():
        chosen = config.provider != AUTO or config.precision != AUTO or config.threads
        if not chosen and not any(name in NVIDIA for name in available):
            plan = load(folder, manifest, this_machine(), available)
            batch = config.encode_batch or plan.encode_batch
            streams = min(plan.encoder_streams, batch)
            return [replace(plan, encode_batch=batch, encoder_streams=streams)]
        reason = "provider, precision or threads were given" if chosen else "there is a GPU"
        log.info("%s, which is of processors, is set aside: %s", folder / FILE, reason)
    return [default(manifest, config, name, this_machine()) for name in available]


def default(manifest: Manifest, config: EngineConfig, provider: str, machine: Machine) -> Plan:
    """The plan for an encoder on `provider` without a plan.json."""
    if config.precision != AUTO:
        combination = manifest.combination(config.precision).name
        if not suitable(combination, provider, machine):
            log.warning("%s was not proven on a processor such as %s", combination, machine)
    else:
        combination = _preferred(manifest, provider, machine)
    on_gpu = provider in NVIDIA and combination.endswith("/float16")
    streams = most_streams(provider, config.threads or machine.cores)
    batch = config.encode_batch or _ENCODE_BATCH.get(provider) or stream_batch(streams)
    return Plan(
        combination=combination,
        encoder_provider=provider,
        decoder_provider="cuda" if on_gpu else "cpu",
        encoder_threads=config.threads,
        decoder_threads=config.threads,
        encode_batch=batch,
        encoder_streams=min(streams, batch),
        origin=f"default for {machine}",
    )


def most_streams(provider: str, threads: int) -> int:
    """Default number of images encoded in parallel: one per thread.

    Providers other than the CPU's parallelise in their own ways and get one stream.
    """
    return min(threads, _MOST_STREAMS) if provider == "cpu" else 1


def stream_batch(streams: int) -> int:
    """Encode batch on a CPU: two images per stream; the second fills idle time.

    Streams end unevenly, and a call lasts until the last stream ends. Without streams, one image:
    an 8-bit encoder is as fast per image for one as for eight.
    """
    return 2 * streams if streams > 1 else 1


def _preferred(manifest: Manifest, provider: str, machine: Machine) -> str:
    proven = {c.name for c in manifest.combinations}
    candidates = [name for name in _order(provider) if name in proven]
    if not machine.has_fast_int8:
        candidates = [name for name in candidates if "int8" not in name]
    return next((name for name in candidates if suitable(name, provider, machine)), EXACT)


def _order(provider: str) -> tuple[str, ...]:
    if provider == "cpu":
        return _INT8_ENCODER + _INT8_DECODER
    if provider == "openvino":
        return _CALIBRATED_ENCODER + _INT8_DECODER
    if provider == "tensorrt":
        return _PLAIN_HALF + _INT8_DECODER
    return _FUSED_HALF + _INT8_DECODER


def suitable(combination: str, provider: str, machine: Machine) -> bool:
    """Whether the proof of a combination holds with its encoder on `provider` of this machine.

    ONNX Runtime is told to sum 8-bit products exactly on any processor; sums of OpenVINO's may
    saturate where there is no instruction for them.
    """
    return provider != "openvino" or machine.has_int8_dot or not combination.startswith("int8")


def save(folder: Path, plan: Plan, machine: Machine, measured: list[dict[str, object]]) -> None:
    """Write `folder`/plan.json, without the fields that every start derives anew; `measured` is
    for people. Raises EngineFolderError if it can't be written; one from before stays then.
    """
    content = {
        "format": FORMAT,
        "machine": asdict(machine),
        "engine": manifests.sha256(folder / manifests.FILE),
        "plan": {name: value for name, value in asdict(plan).items() if name not in _FITTED},
        "measured": measured,
    }
    path = Path(os.path.realpath(folder / FILE))  # of a link, what it leads to is replaced
    partial = path.with_name(f"{manifests.PARTIAL_PLAN}-{secrets.token_hex(4)}")
    text = json.dumps(content, indent=2) + "\n"
    try:
        partial.write_text(text)
        # For the service's user, too, whatever the umask of who tunes.
        partial.chmod(stat.S_IMODE((folder / manifests.FILE).stat().st_mode))
        try:
            partial.replace(path)
        except OSError as cause:
            if cause.errno != errno.EBUSY:
                raise
            path.write_text(text)  # a mount, such as a container's: only its content can change
            partial.unlink()
    except OSError as cause:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise EngineFolderError(f"{path} can't be written: {cause.strerror}") from cause


def load(folder: Path, manifest: Manifest, machine: Machine, available: tuple[str, ...]) -> Plan:
    """Read `folder`/plan.json; EngineFolderError unless it belongs to this machine and engine."""
    path = folder / FILE
    again = f"make a new one with `make tune ENGINE={folder}`, or delete it"
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise EngineFolderError(f"{path} was written by another version: {again}")
        made_on, engine = convert(content["machine"], Machine), content["engine"]
        plan = convert(content["plan"], Plan)
    except OSError as cause:
        raise EngineFolderError(f"{path} can't be read ({cause.strerror}): {again}") from cause
    except (ValueError, KeyError, TypeError, RecursionError) as cause:
        raise EngineFolderError(f"{path} can't be read ({cause!r}): {again}") from cause
    if made_on != machine:
        raise EngineFolderError(f"{path} was made on {made_on}, this is {machine}: {again}")
    if engine != manifests.sha256(folder / manifests.FILE):
        raise EngineFolderError(f"{path} was made for another export of this engine: {again}")
    if plan.encoder_provider not in available:
        raise EngineFolderError(f"{path} wants {plan.encoder_provider}, which is gone: {again}")
    manifest.combination(plan.combination)
    return plan
