"""Archives that are damaged, or made to take memory: told, and never taken for shorter ones."""

import bz2
import gzip
import io
import lzma
import tarfile
import tracemalloc

import pytest

from server.bulk.inputs.lists import Columns
from server.bulk.inputs.parts import items, parts

LIMIT = 1000


def read(path, limit=LIMIT):
    return list(items(parts([str(path)], Columns(), limit)))


def archived(path, names, size=600, attributes=None) -> bytes:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = size
            member.pax_headers = (attributes or {}) if name == names[0] else {}
            archive.addfile(member, io.BytesIO(b"x" * size))
    return path.read_bytes()


MEMBER = 512 + 1024  # head and content
SIX = [f"{n}.png" for n in range(6)]


@pytest.mark.parametrize("content", [
    lambda whole: whole[: 2 * MEMBER + 5] + bytes([whole[2 * MEMBER + 5] ^ 1])
    + whole[2 * MEMBER + 6 :],
    lambda whole: whole[: 2 * MEMBER],
    lambda whole: whole[: 2 * MEMBER + 100],
    lambda whole: whole[: 2 * MEMBER] + bytes(512) + whole[2 * MEMBER + 512 :],
    lambda whole: whole[: 2 * MEMBER] + bytes(1024) + whole,
], ids=["bit flipped", "cut between members", "cut in a head", "head lost", "joined"])  # fmt: skip
def test_an_archive_that_breaks_off_is_not_taken_for_a_shorter_one(content, tmp_path):
    path = tmp_path / "shard.tar"
    path.write_bytes(content(archived(path, SIX)))
    *good, bad = read(path)
    assert [item.key for item in good] == ["0"]  # of the second, more might follow
    assert "no whole tar archive" in bad.wrong


@pytest.mark.parametrize("damage", [
    lambda packed: packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:], lambda packed: packed[:-8],
], ids=["sum", "cut off behind the archive"])  # fmt: skip
def test_the_sums_of_a_packed_archive_are_checked(damage, tmp_path):
    path = tmp_path / "shard.tar.gz"
    path.write_bytes(gzip.compress(archived(tmp_path / "plain.tar", SIX)))
    assert [item.key for item in read(path)] == [f"{n}" for n in range(6)]
    path.write_bytes(damage(path.read_bytes()))
    *_, bad = read(path)
    assert "no whole tar archive" in bad.wrong


def test_a_member_of_an_unknown_type_is_a_file(tmp_path):
    """POSIX says so, for types to come."""
    path = tmp_path / "shard.tar"
    member = tarfile.TarInfo("a.png")
    member.type, member.size = b"Z", 3
    with tarfile.open(path, "w") as archive:
        archive.addfile(member, io.BytesIO(b"abc"))
    assert [(item.key, item.image) for item in read(path)] == [("a", b"abc")]


@pytest.mark.parametrize("size", ["nan", "-5", "1", "99999999999999999999"])
def test_a_size_that_is_none_is_damage(size, tmp_path):
    path = tmp_path / "shard.tar"
    archived(path, SIX, attributes={"size": size})
    assert "no whole tar archive" in read(path)[-1].wrong


@pytest.mark.parametrize("attributes", [
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "900"},
    {"GNU.sparse.map": "0,1", "GNU.sparse.size": "900"},
    {"GNU.sparse.size": "900", "GNU.sparse.offset": "0", "GNU.sparse.numbytes": "1"},
])  # fmt: skip
def test_members_with_holes_are_refused(attributes, tmp_path):
    path = tmp_path / "shard.tar"
    archived(path, SIX, attributes=attributes)
    [bad] = read(path)
    assert "a member is sparse: make the archive anew without --sparse" in bad.wrong


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress])
def test_what_unpacks_without_bound_is_refused(pack, tmp_path):
    path = tmp_path / "shard.tar"
    path.write_bytes(pack(archived(path, SIX)))
    [bad] = read(path)
    assert "use gzip, or none" in bad.wrong


def test_gzip_is_unpacked_in_pieces_whatever_the_name(tmp_path):
    path = tmp_path / "shard.tar"
    path.write_bytes(gzip.compress(archived(path, SIX, size=2**26), 1))
    tracemalloc.start()
    found = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [item.key for item in found] == [str(n) for n in range(6)]
    assert peak < 2**24
    path.write_bytes(path.read_bytes()[:-100_000])
    assert "no whole tar archive" in read(path)[-1].wrong


def test_a_link_is_an_image_that_is_not_there(tmp_path):
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("0.png", tarfile.REGTYPE), ("1.png", tarfile.LNKTYPE),
                           ("2.png", tarfile.SYMTYPE)):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "" if kind == tarfile.REGTYPE else "0.png"
            archive.addfile(member)
    image, *links = read(path)
    assert image.wrong is None
    assert [(item.key, item.wrong[:12]) for item in links] == [
        ("1", "it is a link"), ("2", "it is a link"),
    ]  # fmt: skip


def test_of_a_name_that_comes_twice_the_first_is_meant(tmp_path):
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as archive:
        for content in (b"first", b"second"):
            member = tarfile.TarInfo("0.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert [(item.key, item.image) for item in read(path)] == [("0", b"first"), ("0", b"second")]


def test_what_is_read_whole_is_bounded(tmp_path):
    path = tmp_path / "shard.tar"
    archived(path, SIX, attributes={"comment": "x" * 2**21})
    assert "a name, or attributes, have 2097169 bytes" in read(path)[-1].wrong
    archived(path, [f"0.{n}" for n in range(1001)], size=0)
    assert "0 has over 1000 members" in read(path)[-1].wrong
    archived(path, ["0." + "x" * 1100])
    assert "a name has 1102 characters" in read(path)[-1].wrong
    archived(path, [f"0.{n}{'x' * 1000}" for n in range(999)], size=0)
    assert len(read(path)[-1].wrong) < 300


def test_a_sample_is_bounded_as_a_whole(tmp_path):
    path = tmp_path / "shard.tar"
    archived(path, ["0.a", "0.b", "0.c", "0.d", "0.e", "0.f", "0.png", "1.png"])
    first, second = read(path)
    assert sum(map(len, first.members.values())) == 6 * 600
    assert "with the other members of its sample 4 times as much" in first.wrong
    assert second.wrong is None


def test_samples_of_one_key_are_told_apart(tmp_path):
    path = tmp_path / "shard.tar"
    archived(path, ["a.png", "b.png", "a.png", "a#2.png", "a.png"])
    found = read(path)
    assert [item.id for item in found] == [
        f"{path}/{called}" for called in ("a", "b", "a#2", "a#2#2", "a#3")
    ]
    assert [item.key for item in found] == ["a", "b", "a", "a#2", "a"]


def test_a_name_that_an_archive_would_cut_off_is_refused(tmp_path):
    path = tmp_path / "shard.tar"
    archived(path, SIX, attributes={"path": "0\0x.png"})
    [broken] = read(path)
    assert "a name has a zero byte" in broken.wrong
