"""The folder that an export writes: beside its destination, where it is moved once it is proven, so
that a failed export leaves the engine that was there.
"""

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.errors import ExportError
from runtime.model.manifest import FILE as MANIFEST
from runtime.model.manifest import OPENVINO_CACHE, PARTIAL_PLAN, PLAN, TENSORRT_CACHE


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A new folder beside `output` that replaces it at the end, or is deleted on an error."""
    _check_replaceable(output)
    output = output.resolve()  # of a link, what it leads to is replaced
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as cause:
        raise ExportError(f"can't write to {output.parent}: {cause.strerror}") from cause
    try:
        yield partial
        # Temporary folders and onnx's data files are private; the service's user must read them.
        for path in (partial, *partial.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        _check_replaceable(output)  # again: exporting takes long
        _move_into_place(partial, output)
    except (OSError, RuntimeError) as cause:
        # The exporter writes in C++ and raises RuntimeError with the system's message only.
        full = getattr(cause, "errno", None) == errno.ENOSPC or "No space left" in str(cause)
        if not full:
            raise
        raise ExportError(
            f"the disk that holds {output.parent} is full: free some space and export again"
        ) from cause
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(output: Path) -> None:
    """Raise ExportError unless `output` is absent, an empty folder, or an engine to replace, with
    nothing else in its folder.
    """
    if output.name in ("", ".."):
        raise ExportError("--output must name a folder of its own, such as engines/my-model")
    if not output.exists():
        return
    if output.is_mount():
        raise ExportError(
            f"{output} is a mount, which can't be replaced: export into a folder of it"
        )
    there = {path.name for path in output.iterdir()} if output.is_dir() else None
    files = _files_of(output)
    if there is None or (there and files is None):
        raise ExportError(f"{output} exists and is no engine: choose another --output")
    ours = {MANIFEST, PLAN, TENSORRT_CACHE, OPENVINO_CACHE, *(files or ())}
    if others := {name for name in there - ours if not name.startswith(PARTIAL_PLAN)}:
        raise ExportError(
            f"{output / min(others)} is no part of the engine that is replaced: move it elsewhere, "
            "or choose another --output"
        )


def _files_of(folder: Path) -> list[str] | None:
    """Files of an engine of any format; None if there is none, but perhaps another tool's
    manifest.json.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    ours = isinstance(content, dict) and {"format", "sizes", "files"} <= content.keys()
    return list(content["files"]) if ours and isinstance(content["files"], dict) else None


def _move_into_place(partial: Path, output: Path) -> None:
    if not output.exists():
        partial.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}-old-", dir=output.parent))
    try:
        output.rename(old / output.name)
    except OSError as cause:
        old.rmdir()
        raise ExportError(f"{output} can't be replaced: {cause.strerror}") from cause
    try:
        partial.rename(output)
    except BaseException:  # an interrupt, too
        (old / output.name).rename(output)
        raise
    finally:
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
