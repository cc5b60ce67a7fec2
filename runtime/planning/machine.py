"""What the processor can do, which is what a plan depends on."""

import math
import os
import platform
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/sys/fs/cgroup")
# The instruction sets that decide which precision is fast, by the names Linux gives them.
_INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
)

_INT8_DOT = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
_APPLE = {"asimddp"}  # all processors of theirs that are called arm64


@dataclass(frozen=True, slots=True)
class Machine:
    """`cores` are the logical ones that this process may use, a container's quota considered."""

    cpu: str
    cores: int
    instructions: tuple[str, ...]

    @property
    def has_int8_dot(self) -> bool:
        """8-bit products are summed in 32 bits without saturating on the way, and fast."""
        return any(i in self.instructions for i in _INT8_DOT)

    def __str__(self) -> str:
        known = ", ".join(self.instructions) or "no known instruction sets"
        return f"{self.cores} cores of {self.cpu} ({known})"


@cache
def this_machine() -> Machine:
    """The machine that this process runs on; outside Linux few instruction sets are known."""
    fields: dict[str, str] = {}
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text().partition("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    flags = set(f"{fields.get('flags', '')} {fields.get('Features', '')}".split())  # x86, ARM
    if (sys.platform, platform.machine()) == ("darwin", "arm64"):
        flags |= _APPLE
    return Machine(
        cpu=fields.get("model name") or platform.processor() or platform.machine(),
        cores=min(cores, quota() or cores),
        instructions=tuple(i for i in _INSTRUCTIONS if i in flags),
    )


def memory(cgroup: Path = _CGROUP) -> int:
    """Bytes that this process may use: the machine's, or what a container is allowed of them."""
    known = "SC_PHYS_PAGES" in os.sysconf_names
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else sys.maxsize
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such file, or "max"
            most = min(most, int((cgroup / name).read_text()))
    return most


def quota(cgroup: Path = _CGROUP) -> int:
    """Cores' worth of time that a container may use (`docker run --cpus`), rounded up; 0: no limit.

    The container sees all cores of its host, and threads for all of them would spend the quota
    waiting for each other. Source: the kernel's documentation of cgroups, versions 2 and 1.
    """
    try:
        if (cgroup / "cpu.max").is_file():
            time, period = (cgroup / "cpu.max").read_text().split()
        else:
            time, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        return max(0, math.ceil(int(time) / int(period)))  # version 1 says -1 for no limit
    except (OSError, ValueError, ZeroDivisionError):  # no such files, or "max"
        return 0
