"""CPU time, memory and descendants of processes."""

import psutil


def family(pid: int) -> list[int]:
    """Process ids of a process and its descendants; its own alone if it has ended."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return [pid]


def server_on(port: int) -> int:
    """Process id of the server that was started on this port. Raises RuntimeError."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "server" in words and str(port) in words:
            return int(process.pid)
    raise RuntimeError(f"no server was started on port {port}")


def worked(pid: int) -> float:
    """CPU time of a process (user and system) in seconds; 0 if it has ended."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def pss(pid: int) -> int:
    """Proportional set size (PSS) of a process in bytes; 0 if it has ended."""
    try:
        return int(psutil.Process(pid).memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0


def command_line(pid: int) -> str:
    """Command line of a process; empty if it has ended."""
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def runs_engine(pid: int) -> bool:
    """Whether a process has loaded ONNX Runtime, that is, is an engine worker."""
    try:
        return any("onnxruntime" in m.path for m in psutil.Process(pid).memory_maps(grouped=True))
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def open_files(pid: int) -> int:
    """Open file descriptors of a process and its descendants."""
    return sum(psutil.Process(each).num_fds() for each in family(pid))
