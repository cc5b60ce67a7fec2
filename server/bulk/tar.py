"""A WebDataset shard of the input's samples, with what was said of them.

Until a run ends it grows as a file beside the output. A sample ends with its `.json`, and is in the
archive once that is there whole.
"""

import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import msgspec
from PIL import Image
from typing_extensions import override

from server.bulk.folders import below
from server.bulk.index import Index
from server.bulk.items import Outcome, ResultRow
from server.bulk.output import Output, OutputConflict, check_regular, locked, replacing
from server.bulk.shards import split

PARTIAL = ".partial"  # after the archive's name, while it grows
_OURS = ("txt", "json")
_UNKNOWN = "image"  # extension of what no decoder knows
_EXTENSIONS = {"JPEG": "jpg", "TIFF": "tif"}  # where they are not the format's name
_END = b"\0" * 1024  # of an archive


class Tar(Output):
    """`.txt` is the caption and `.json` the row of a sample; its own are `.original.*`."""

    def __init__(self, path: Path) -> None:
        """Raises OutputConflict if another run writes to it, or for what is no regular file."""
        check_regular(path)
        self.path = path
        self._growing = path.with_name(path.name + PARTIAL)
        self._stream = locked(self._growing)
        self._count, self._new = 0, False

    @override
    def rows(self) -> Iterator[ResultRow]:
        """Raises OutputConflict for an archive that holds other things."""
        self._stream.seek(0)
        self._new = bool(self._stream.read(1))
        if not self._new and self.path.exists():
            self._check()
            with self.path.open("rb") as whole:
                shutil.copyfileobj(whole, self._stream)
        end = 0
        for row, _, offset in self._samples():
            self._count, end = self._count + 1, offset
            yield row
        self._stream.truncate(end)

    @override
    def append(self, row: ResultRow, outcome: Outcome) -> None:
        key = below(outcome.item.key or "")
        if not key or split(f"{key}.json") != (key, "json"):  # it would not be found again
            key = f"{self._count:09}"
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for extension, data in _members(row, outcome).items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            end = archive.offset
        self._stream.write(content.getvalue()[:end])
        self._stream.flush()
        self._count, self._new = self._count + 1, True

    @override
    def finish(self, index: Index) -> None:
        if not self._new and self.path.exists():
            self._growing.unlink()
            return
        with replacing(self.path) as stream:
            for number, (row, start, end) in enumerate(self._samples()):
                if index.latest(row, number):
                    self._stream.seek(start)
                    _copied(self._stream, stream, end - start)
            stream.write(_END)
        self._growing.unlink()

    @override
    def close(self) -> None:
        self._stream.close()

    def _samples(self) -> Iterator[tuple[ResultRow, int, int]]:
        """Rows, and where their samples begin and end; not the one that a kill left half there."""
        self._stream.seek(0)
        start = 0
        try:
            with tarfile.open(fileobj=self._stream, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]
                    if split(member.name)[1] != "json":
                        continue
                    content = archive.extractfile(member)
                    assert content is not None
                    row = msgspec.json.decode(content.read(), type=ResultRow)
                    end = archive.offset
                    yield row, start, end
                    start = end
        except tarfile.ReadError:
            return

    def _check(self) -> None:
        """Raise OutputConflict unless each sample of the archive ends with a row."""
        last = "json"
        try:
            with tarfile.open(self.path, "r:") as archive:
                for member in archive:
                    archive.members = []  # type: ignore[attr-defined]
                    last = split(member.name)[1]
                    if last == "json":
                        content = archive.extractfile(member)
                        assert content is not None
                        msgspec.json.decode(content.read(), type=ResultRow)
            if last != "json":
                raise tarfile.ReadError("its last sample has no row")
        except (tarfile.TarError, msgspec.MsgspecError) as cause:
            raise OutputConflict(
                f"{self.path} is no archive of ours ({cause}): name another output"
            ) from cause


def _members(row: ResultRow, outcome: Outcome) -> dict[str, bytes]:
    """A sample's files by their extensions, its row last."""
    found = {
        f"original.{extension}" if extension in _OURS else extension: data
        for extension, data in outcome.item.members.items()
    }
    if not found and outcome.image is not None:
        found[_extension(outcome)] = outcome.image
    if row.caption is not None:
        found["txt"] = row.caption.encode()
    return found | {"json": msgspec.json.encode(row)}


def _extension(outcome: Outcome) -> str:
    """The extension of an image by its content; else that of its name."""
    assert outcome.image is not None
    try:
        with Image.open(io.BytesIO(outcome.image)) as image:
            kind = str(image.format)
    except Exception:  # whatever is wrong with it is in its row
        suffix = PurePosixPath(outcome.item.id).suffix.lstrip(".").lower()
        return suffix if suffix.isalnum() and suffix not in _OURS else _UNKNOWN
    return _EXTENSIONS.get(kind, kind.lower())


def _copied(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        piece = source.read(min(size, 2**20))
        target.write(piece)
        size -= len(piece)
