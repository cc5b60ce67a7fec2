"""WebDataset shards: tar archives whose adjacent members of one stem are a sample."""

import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from gzip import BadGzipFile, GzipFile
from pathlib import PurePosixPath
from textwrap import shorten
from threading import Event
from typing import Any, NoReturn, Self, TypeVar

from typing_extensions import override

from runtime.errors import VignetteError
from runtime.model.preprocess import SUFFIXES
from server.bulk.inputs.fetching import opened
from server.bulk.inputs.folders import named
from server.bulk.inputs.items import Item
from server.bulk.inputs.kept import Kept
from server.bulk.inputs.lists import Columns

_Info = TypeVar("_Info", bound=tarfile.TarInfo)
Members = dict[str, bytes | str]  # text: why a member's content is not there

_TOGETHER = 4  # times the bytes that a member may have: the limit of a sample
_MEMBERS, _NAME = 1000, 1024  # of a sample, and characters of each name
_LISTED = 200  # characters of names in a message
_GZIP, _HEAD = b"\x1f\x8b", 10
_NOT_TAKEN = {
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ"),
    "Zstandard": re.compile(rb"\x28\xb5\x2f\xfd"),
}
_LINK = "it is a link: make the archive anew with --dereference --hard-dereference"
_PLAIN = {*tarfile.SUPPORTED_TYPES} - {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
_OTHER = _PIECE = 2**20  # bytes of a special member: long names, attributes, unknown types


class DamagedShard(VignetteError):
    """A tar archive can't be read to its end, or exceeds a sample's limits."""


class _Member(tarfile.TarInfo):
    """A member of an archive, which must end with a block of zeros.

    tarfile takes a damaged header for the end, and fills the holes of a sparse member; this raises
    ReadError for both.
    """

    @classmethod
    @override
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Parse a header block. Raises ReadError if it is missing or damaged."""
        if not buf:
            raise tarfile.ReadError("it has no end: it was cut off between two members")
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as cause:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            raise tarfile.ReadError(f"the head of a member is damaged: {cause}") from cause
        return _checked(member)

    def _sparse(self, *_: object) -> NoReturn:
        raise tarfile.ReadError("a member is sparse: make the archive anew without --sparse")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _sparse


def _checked(member: _Info) -> _Info:
    """Raise ReadError for a large special member: tarfile reads it whole, or seeks past the end."""
    if member.type not in _PLAIN and member.size > _OTHER:
        raise tarfile.ReadError(f"a name, or attributes, have {member.size} bytes")
    return member


class _Stream:
    """A stream whose first bytes were read before."""

    def __init__(self, first: bytes, rest: Any) -> None:
        self._first, self._rest = first, rest

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        if not self._first:
            return self._rest.read(size)
        piece, self._first = self._first[:size], self._first[size:]
        return piece


def _unpacked(stream: Any) -> Any:
    """The stream, unpacked in bounded pieces if it is gzip's. Raises ReadError for other formats:
    tarfile unpacks those whole, and bzip2 makes gigabytes of a kilobyte.
    """
    first = stream.read(_HEAD)
    for name, begins in _NOT_TAKEN.items():
        if begins.match(first):
            raise tarfile.ReadError(f"it is compressed with {name}: use gzip, or none")
    whole: Any = _Stream(first, stream)
    return GzipFile(fileobj=whole, mode="rb") if first.startswith(_GZIP) else whole


def _check_end(stream: Any) -> None:
    """Read what follows the archive's end, which checks a gzip's sums, too. Raises ReadError if it
    is more than zeros: tarfile takes a single block of zeros for the end.
    """
    while piece := stream.read(_PIECE):
        if any(piece):
            raise tarfile.ReadError(
                "there is more behind a block of zeros: a member's head was lost, or these are "
                "several archives, which can't be joined by cat"
            )


@dataclass(frozen=True, slots=True)
class Shard:
    """An archive. columns: extensions of a sample's image (by default its first) and prompt."""

    path: str
    columns: Columns
    limit: int  # bytes that a member may have

    def items(self) -> Iterator[Item]:
        """An item for each sample. Raises DamagedShard."""
        try:
            with (
                opened(self.path) as stream,
                tarfile.open(
                    fileobj=_unpacked(stream), mode="r|", encoding="utf-8", tarinfo=_Member
                ) as archive,
            ):
                known = Kept()  # keys
                for key, members in self._samples(archive):
                    yield self._item(key, _unique(key, known), members)
        except (tarfile.TarError, EOFError, BadGzipFile, zlib.error) as cause:
            raise DamagedShard(f"{self.path} is no whole tar archive: {cause}") from cause

    def count(self, over: Event) -> int | None:
        """None: an archive has no table of contents."""
        return None

    def _samples(self, archive: tarfile.TarFile) -> Iterator[tuple[str, Members]]:
        """Keys of samples, and their members by extension."""
        last, members = None, Members()
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # else it keeps every member
            link = member.issym() or member.islnk()
            unknown = member.type not in tarfile.SUPPORTED_TYPES  # a file (POSIX)
            if not (_checked(member).isfile() or link or unknown):
                continue
            if len(member.name) > _NAME:
                raise tarfile.ReadError(f"a name has {len(member.name)} characters")
            if "\0" in member.name:  # archives would end the name there
                raise tarfile.ReadError("a name has a zero byte")
            key, extension = split(member.name)
            if (key != last or extension in members) and members:
                yield str(last), members
                members = {}
            last = key
            members[extension] = _LINK if link else self._content(archive, member, members)
            if len(members) > _MEMBERS:
                raise tarfile.ReadError(f"{key} has over {_MEMBERS} members")
        _check_end(archive.fileobj)
        if members:
            yield str(last), members

    def _content(
        self, archive: tarfile.TarFile, member: tarfile.TarInfo, others: Members
    ) -> bytes | str:
        stream = archive.extractfile(member)
        assert stream is not None
        held = sum(map(len, others.values()))
        if member.size <= self.limit and held + member.size <= _TOGETHER * self.limit:
            return stream.read()
        while stream.read(_PIECE):  # else tarfile seeks the member's end past the archive's
            pass
        return (
            f"it has more than {self.limit / 1e6:g} MB (--max-image-mb), or with the other members "
            f"of its sample {_TOGETHER} times as much"
        )

    def _item(self, key: str, called: str, members: Members) -> Item:
        """called: the key, or another if an earlier sample has it."""
        where, name = f"{self.path}/{called}", f"{named(self.path)}/{called}"
        extension = self.columns.image or next((e for e in members if f".{e}" in SUFFIXES), "")
        kept = {e: content for e, content in members.items() if isinstance(content, bytes)}
        wrong = None
        if extension not in members:
            names = shorten(", ".join(members), _LISTED, placeholder=" ...")
            wrong = f"there is no {self.columns.image or 'image'} among {names}"
        elif isinstance(why := members[extension], str):
            wrong = why
        prompt = kept.get(self.columns.prompt or "", b"").decode(errors="replace").strip()
        if self.columns.prompt and not prompt and wrong is None:
            text = members.get(self.columns.prompt)
            wrong = text if isinstance(text, str) else f"there is no text in {self.columns.prompt}"
        return Item(where, kept.get(extension, b""), name, prompt or None, key, kept, wrong)


def _unique(key: str, known: Kept) -> str:
    """A key that no earlier sample of the shard has: `key`, or with a number. It becomes known."""
    called = key
    number = int(known.get(key) or 0)  # the last that was given to this key
    while known.get(called) is not None:
        number += 1
        called = f"{key}#{number + 1}"
    known.keep(called, b"0")
    if called != key:
        known.keep(key, b"%d" % number)
    return called


def split(name: str) -> tuple[str, str]:
    """Key and extension of a member: the parts before and after the first dot of its name."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.with_name(stem)) if stem else str(path), extension.lower()
