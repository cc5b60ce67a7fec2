"""A process and all that it started."""

import psutil


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return [pid]


def server_on(port: int) -> int:
    """The process that was started as a server on this port. Raises RuntimeError."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "server" in words and str(port) in words:
            return int(process.pid)
    raise RuntimeError(f"no server was started on port {port}")


def worked(pid: int) -> float:
    """Core seconds that a process has had; 0 if it has ended."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def pss(pid: int) -> int:
    """Resident bytes of a process, its share of what it shares; 0 if it has ended."""
    try:
        return int(psutil.Process(pid).memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0


def command_line(pid: int) -> str:
    """Its command line; nothing if it has ended."""
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def runs_engine(pid: int) -> bool:
    """Whether it has loaded ONNX Runtime: an engine worker."""
    try:
        return any("onnxruntime" in m.path for m in psutil.Process(pid).memory_maps(grouped=True))
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def open_files(pid: int) -> int:
    """File handles of a process and all that it started."""
    return sum(psutil.Process(each).num_fds() for each in family(pid))
