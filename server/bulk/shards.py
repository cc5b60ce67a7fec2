"""WebDataset shards: tar archives whose neighbouring members of one name are a sample."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from threading import Event
from typing import Any

from runtime.errors import VignetteError
from runtime.model.preprocess import SUFFIXES
from server.bulk.fetching import opened
from server.bulk.folders import named
from server.bulk.items import Item
from server.bulk.lists import Columns

Members = dict[str, bytes]


class DamagedShard(VignetteError):
    """A tar archive that can't be read to its end."""


@dataclass(frozen=True, slots=True)
class Shard:
    """An archive. columns: the extensions of a sample's image and prompt; else its first image."""

    path: str
    columns: Columns
    limit: int  # bytes that a member may have

    def items(self) -> Iterator[Item]:
        """Its samples. Raises DamagedShard."""
        try:
            with (
                opened(self.path) as stream,
                tarfile.open(fileobj=stream, mode="r|*", encoding="utf-8") as archive,
            ):
                for key, members in self._samples(archive):
                    yield self._item(key, members)
        except (tarfile.TarError, EOFError) as cause:
            raise DamagedShard(f"{self.path} is no whole tar archive: {cause}") from cause

    def count(self, over: Event) -> int | None:
        """Not known: an archive has no list of what is in it."""
        return None

    def _samples(self, archive: tarfile.TarFile) -> Iterator[tuple[str, Members]]:
        """Keys, and members by their extensions."""
        last, members = None, Members()
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # it would keep one for each
            if not member.isfile():
                continue
            key, extension = split(member.name)
            if key != last and members:
                yield str(last), members
                members = {}
            last = key
            content = archive.extractfile(member)
            assert content is not None
            members[extension] = content.read(self.limit + 1)
            if len(members[extension]) < min(member.size, self.limit + 1):
                raise tarfile.ReadError(f"it ends within {member.name}")
        stream: Any = archive.fileobj
        if stream.pos % tarfile.BLOCKSIZE:  # which tarfile takes for the end
            raise tarfile.ReadError("it ends within a head")
        if members:
            yield str(last), members

    def _item(self, key: str, members: Members) -> Item:
        where, name = f"{self.path}/{key}", f"{named(self.path)}/{key}"
        extension = self.columns.image or next((e for e in members if f".{e}" in SUFFIXES), "")
        image = members.pop(extension, None)
        wrong = None
        if image is None:
            wrong = f"there is no {self.columns.image or 'image'} among {', '.join(members)}"
        elif len(image) > self.limit:
            image, wrong = None, f"it has more than {self.limit / 1e6:g} MB (--max-image-mb)"
        prompt = members.get(self.columns.prompt or "", b"").decode(errors="replace").strip()
        if self.columns.prompt and not prompt and wrong is None:
            wrong = f"there is no text in {self.columns.prompt}"
        kept = {e: content for e, content in members.items() if len(content) <= self.limit}
        if image is not None:
            kept = {extension: image, **kept}
        return Item(where, image or b"", name, prompt or None, key, kept, wrong)


def split(name: str) -> tuple[str, str]:
    """Key and extension of a member: what stands before and after the first dot of its name."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.with_name(stem)) if stem else str(path), extension.lower()
