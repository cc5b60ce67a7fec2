"""The processor's cores, instruction sets and memory, which a plan depends on."""

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
# Instruction sets that decide which precision is fast, by their names in Linux.
_INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
)

_INT8_DOT = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
_APPLE = {"asimddp"}  # all of Apple's arm64 processors have it


@dataclass(frozen=True, slots=True)
class Machine:
    """`cores` counts logical cores this process may use, within a container's quota."""

    cpu: str
    cores: int
    instructions: tuple[str, ...]

    @property
    def has_int8_dot(self) -> bool:
        """Whether one instruction sums 8-bit products in 32 bits."""
        return any(i in self.instructions for i in _INT8_DOT)

    @property
    def has_fast_int8(self) -> bool:
        """Whether the CPU provider computes 8-bit products faster than fp32 ones."""
        return self.has_int8_dot or "avx2" in self.instructions

    def __str__(self) -> str:
        known = ", ".join(self.instructions) or "no known instruction sets"
        return f"{self.cores} cores of {self.cpu} ({known})"


@cache
def this_machine() -> Machine:
    """The machine this process runs on; outside Linux few instruction sets are detected."""
    fields: dict[str, str] = {}
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text().partition("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    flags = set(f"{fields.get('flags', '')} {fields.get('Features', '')}".split())  # x86, ARM
    if (sys.platform, platform.machine()) == ("darwin", "arm64"):
        flags |= _APPLE
    return Machine(
        cpu=fields.get("model name") or platform.processor() or platform.machine(),
        cores=limited_cores() or os.cpu_count() or 1,
        instructions=tuple(i for i in _INSTRUCTIONS if i in flags),
    )


def limited_cores() -> int:
    """Logical cores this process may use if they are fewer than the machine's, by a container's
    quota or by its affinity (taskset, `docker run --cpuset-cpus`, Slurm); 0: all.
    """
    all_cores = os.cpu_count() or 1
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else all_cores
    cores = min(cores, quota() or cores)
    return cores if cores < all_cores else 0


def memory(cgroup: Path = _CGROUP) -> int:
    """Bytes of memory this process may use: the machine's, or its container's limit if lower."""
    known = "SC_PHYS_PAGES" in os.sysconf_names
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else sys.maxsize
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such file, or "max"
            most = min(most, int((cgroup / name).read_text()))
    return most


def quota(cgroup: Path = _CGROUP) -> int:
    """CPU quota of a container in cores (`docker run --cpus`), rounded up; 0: no limit.

    A container sees all cores of its host, and threads for all of them would spend the quota
    waiting for each other. Source: the kernel's documentation of cgroups, versions 2 and 1.
    """
    try:
        if (cgroup / "cpu.max").is_file():
            time, period = (cgroup / "cpu.max").read_text().split()
        else:
            time, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        return max(0, math.ceil(int(time) / int(period)))  # version 1: -1 means no limit
    except (OSError, ValueError, ZeroDivisionError):  # no such files, or "max"
        return 0
