"""A WebDataset shard of the input's samples with their captions.

Until a run ends, the shard grows in a file beside the output. A sample ends with its `.json`, and
counts once that is complete.
"""

import io
import tarfile
from collections.abc import Container, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import msgspec
from PIL import Image
from typing_extensions import override

from server.bulk.inputs.folders import below
from server.bulk.inputs.items import Item, Outcome, ResultRow
from server.bulk.inputs.kept import Kept
from server.bulk.inputs.shards import split
from server.bulk.outputs.base import Output, OutputConflict, changed
from server.bulk.outputs.files import check_regular, locked, remove_empty, replacing
from server.bulk.outputs.index import Index
from server.bulk.outputs.lines import row_of

PARTIAL = ".partial"  # appended to the archive's name while it grows
_OURS = ("txt", "json")
_UNKNOWN = "image"  # extension of an image that no decoder knows
_EXTENSIONS = {"JPEG": "jpg", "TIFF": "tif"}  # that differ from the format's name
_HEAD = tarfile.TarInfo.create_pax_global_header({"comment": "vignette"})  # of a growing archive
_END = b"\0" * 1024  # of an archive


class Sample(NamedTuple):
    """A row, and its sample's key, start and end (bytes) in an archive."""

    row: ResultRow
    key: str
    start: int
    end: int


class Tar(Output):
    """A sample's `.txt` is its caption and `.json` its row; the input's own become `.original.*`.

    Of samples with the same key, all but the first get a number.
    """

    def __init__(self, path: Path) -> None:
        """Raises OutputConflict if another run writes to it, or it is no regular file."""
        check_regular(path)
        self.path = path
        self._growing = path.with_name(path.name + PARTIAL)
        self._stream = locked(self._growing)
        self._items = Kept()  # item ids by sample key
        self._count, self._new = 0, False

    @override
    def rows(self) -> Iterator[ResultRow]:
        """Raises OutputConflict for an archive that is not ours."""
        end = 0
        for stream, sample in self._samples():
            end = sample.end if stream is self._stream else 0
            self._count += 1
            self._items.keep(sample.key, sample.row.id.encode())
            yield sample.row
        self._new = end > 0
        self._stream.truncate(end)

    @override
    def append(self, row: ResultRow, outcome: Outcome) -> None:
        key = self._key(outcome.item)
        content = io.BytesIO(b"" if self._new else _HEAD)
        content.seek(0, io.SEEK_END)
        with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for extension, data in _members(row, outcome).items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            end = archive.offset
        self._stream.write(content.getvalue()[:end])
        self._stream.flush()
        self._items.keep(key, row.id.encode())
        self._count, self._new = self._count + 1, True

    @override
    def finish(self, index: Index) -> None:
        if self._new or index.replaced or not self.path.exists():
            with replacing(self.path) as target:
                count = 0
                for count, (stream, sample) in enumerate(self._samples(), 1):
                    if index.latest(sample.row, count - 1):
                        stream.seek(sample.start)
                        _copied(stream, target, sample.end - sample.start)
                if count != index.rows:
                    raise changed(self.path)
                target.write(_END)
        self._stream.truncate(0)

    @override
    def close(self) -> None:
        remove_empty(self._growing)
        self._stream.close()

    def _key(self, item: Item) -> str:
        """A key that no other item's sample has."""
        wanted = below(item.key or "")
        if not wanted or split(f"{wanted}.json") != (wanted, "json"):  # read back otherwise
            wanted = f"{self._count:09}"
        key, number = wanted, self._count
        while self._items.get(key) not in (None, item.id.encode()):
            key, number = f"{wanted}-{number:09}", number + 1
        return key

    def _samples(self) -> Iterator[tuple[BinaryIO, Sample]]:
        """All samples with their files. Raises OutputConflict for an archive that is not ours."""
        if self.path.exists():
            with self.path.open("rb") as stream:
                end = 0
                for sample in _samples(stream, self.path, 0):
                    yield stream, sample
                    end = sample.end
                stream.seek(end)
                if stream.read(len(_END)).strip(b"\0"):
                    raise OutputConflict(
                        f"{self.path} is no archive of ours (it has other samples): name another "
                        "output"
                    )
        self._stream.seek(0)
        if not _HEAD.startswith(self._stream.read(len(_HEAD))):
            raise OutputConflict(
                f"{self._growing} was not left by a run of this: remove it, or name another output"
            )
        for sample in _samples(self._stream, self._growing, len(_HEAD)):
            yield self._stream, sample


def _samples(stream: BinaryIO, path: Path, start: int) -> Iterator[Sample]:
    """Samples of an archive, except one that a kill left incomplete. Raises OutputConflict."""
    stream.seek(start)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # else it keeps every member
                key, extension = split(member.name)
                if extension == "json":
                    content = archive.extractfile(member) if member.isfile() else None
                    row = row_of(content.read() if content else b"", f"{path}, {member.name},")
                    yield Sample(row, key, start, start := archive.offset)
    except tarfile.TarError:
        return


def _members(row: ResultRow, outcome: Outcome) -> dict[str, bytes]:
    """A sample's files by extension, the row last."""
    members = outcome.item.members
    found = {_renamed(extension, members): data for extension, data in members.items()}
    if not found and outcome.image is not None:
        found[_extension(outcome)] = outcome.image
    if row.caption is not None:
        found["txt"] = row.caption.encode()
    return found | {"json": msgspec.json.encode(row)}


def _renamed(extension: str, taken: Container[str]) -> str:
    """The extension of an input's member, renamed if it is one of ours."""
    name = extension
    while name in _OURS or (name != extension and name in taken):
        name = f"original.{name}"
    return name


def _extension(outcome: Outcome) -> str:
    """An image's extension by its content, or else by its name."""
    assert outcome.image is not None
    try:
        with Image.open(io.BytesIO(outcome.image)) as image:
            kind = str(image.format)
    except Exception:  # the row says what is wrong with the image
        suffix = PurePosixPath(outcome.item.id).suffix.lstrip(".").lower()
        return suffix if suffix.isalnum() and suffix not in _OURS else _UNKNOWN
    return _EXTENSIONS.get(kind, kind.lower())


def _copied(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        piece = source.read(min(size, 2**20))
        if not piece:  # the padding of the last member was cut off
            piece = bytes(size)
        target.write(piece)
        size -= len(piece)
