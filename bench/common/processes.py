"""A process and all that it started, as /proc shows them."""

import contextlib
import re
from pathlib import Path


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def pss(pid: int) -> int:
    """Resident bytes of a process, its share of what it shares; 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0


def command_line(pid: int) -> str:
    """Its command line; nothing if it has ended."""
    return _read(pid, "cmdline")


def runs_engine(pid: int) -> bool:
    """Whether it has loaded ONNX Runtime: an engine worker."""
    return "onnxruntime" in _read(pid, "maps")


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


def open_files(pid: int) -> int:
    """Of a process and all that it started."""
    return sum(len(list(Path(f"/proc/{p}/fd").iterdir())) for p in family(pid))
