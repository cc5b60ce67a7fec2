"""WebDataset shards: tar archives whose adjacent members of one stem are a sample."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from threading import Event
from typing import NoReturn, Self, TypeVar

from typing_extensions import override

from runtime.errors import VignetteError
from runtime.model.preprocess import SUFFIXES
from server.bulk.fetching import opened
from server.bulk.folders import named
from server.bulk.items import Item
from server.bulk.lists import Columns

_Info = TypeVar("_Info", bound=tarfile.TarInfo)
Members = dict[str, bytes | None]  # None for a member too large to hold

_TOGETHER = 4  # times the bytes that a member may have: the limit of a sample
_MEMBERS = 1000  # of a sample
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
                    fileobj=stream, mode="r|*", encoding="utf-8", tarinfo=_Member
                ) as archive,
            ):
                for key, members in self._samples(archive):
                    yield self._item(key, members)
        except (tarfile.TarError, EOFError) as cause:
            raise DamagedShard(f"{self.path} is no whole tar archive: {cause}") from cause

    def count(self, over: Event) -> int | None:
        """None: an archive has no table of contents."""
        return None

    def _samples(self, archive: tarfile.TarFile) -> Iterator[tuple[str, Members]]:
        """Keys of samples, and their members by extension."""
        last, members = None, Members()
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # else it keeps every member
            if not _checked(member).isfile():
                continue
            key, extension = split(member.name)
            if key != last and members:
                yield str(last), members
                members = {}
            last = key
            members[extension] = self._content(archive, member, members)
            if len(members) > _MEMBERS:
                raise tarfile.ReadError(f"{key} has over {_MEMBERS} members")
        if members:
            yield str(last), members

    def _content(
        self, archive: tarfile.TarFile, member: tarfile.TarInfo, others: Members
    ) -> bytes | None:
        stream = archive.extractfile(member)
        assert stream is not None
        held = sum(len(other or b"") for other in others.values())
        if member.size <= self.limit and held + member.size <= _TOGETHER * self.limit:
            return stream.read()
        while stream.read(_PIECE):  # else tarfile seeks the member's end past the archive's
            pass
        return None

    def _item(self, key: str, members: Members) -> Item:
        where, name = f"{self.path}/{key}", f"{named(self.path)}/{key}"
        extension = self.columns.image or next((e for e in members if f".{e}" in SUFFIXES), "")
        image = members.get(extension)
        wrong = None
        if extension not in members:
            wrong = f"there is no {self.columns.image or 'image'} among {', '.join(members)}"
        elif image is None:
            wrong = (
                f"it has more than {self.limit / 1e6:g} MB (--max-image-mb), or with the other "
                f"members of its sample {_TOGETHER} times as much"
            )
        prompt = (members.get(self.columns.prompt or "") or b"").decode(errors="replace").strip()
        if self.columns.prompt and not prompt and wrong is None:
            wrong = f"there is no text in {self.columns.prompt}"
        kept = {e: content for e, content in members.items() if content is not None}
        return Item(where, image or b"", name, prompt or None, key, kept, wrong)


def split(name: str) -> tuple[str, str]:
    """Key and extension of a member: the parts before and after the first dot of its name."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.with_name(stem)) if stem else str(path), extension.lower()
