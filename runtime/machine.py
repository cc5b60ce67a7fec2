"""What the processor can do, which is what a plan depends on."""

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
# The instruction sets that decide which precision is fast, by the names Linux gives them.
_INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
)


@dataclass(frozen=True, slots=True)
class Machine:
    """`cores` are the logical ones that this process may use."""

    cpu: str
    cores: int
    instructions: tuple[str, ...]

    @property
    def has_int8_dot(self) -> bool:
        """8-bit products are summed in 32 bits without saturating on the way, and fast."""
        return any(i in self.instructions for i in ("avx_vnni", "avx512_vnni", "amx_int8"))

    @property
    def has_amx(self) -> bool:
        """Matrix units for bf16 and int8."""
        return "amx_bf16" in self.instructions

    def __str__(self) -> str:
        known = ", ".join(self.instructions) or "no known instruction sets"
        return f"{self.cores} cores of {self.cpu} ({known})"


@cache
def this_machine() -> Machine:
    """The machine that this process runs on; outside Linux no instruction set is known."""
    fields: dict[str, str] = {}
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text().partition("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    flags = set(fields.get("flags", "").split())
    return Machine(
        cpu=fields.get("model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        instructions=tuple(i for i in _INSTRUCTIONS if i in flags),
    )
