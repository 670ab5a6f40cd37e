"""The scanner of tars: members read in place, and one line for each way of being broken."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.common.errors import UserError
from tests.layout_builders import add_member, build_tar
from tools.sources.archive import OpenFile, scan_tar

FORMS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=150)


def scan(path: Path, **options) -> list:
    return list(scan_tar(path, **options))


@given(
    members=st.lists(st.tuples(NAMES, st.integers(0, 3000), st.sampled_from("fffdl")), max_size=8),
    form=st.sampled_from(FORMS),
)
def test_members_are_found_where_they_were_written(tmp_path_factory, members, form):
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    wanted = []
    with tarfile.open(path, "w", format=form) as tar:
        for number, (name, size, kind) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.type = {"f": tarfile.REGTYPE, "d": tarfile.DIRTYPE, "l": tarfile.SYMTYPE}[kind]
            info.linkname = "x" * 120 if kind == "l" and form != tarfile.USTAR_FORMAT else ""
            info.size = size if kind == "f" else 0
            content = bytes([255 - number]) * info.size
            try:
                tar.addfile(info, io.BytesIO(content))
            except ValueError:
                continue  # a name that this form cannot hold
            if kind != "d":
                wanted.append((name.rstrip("/"), kind == "f", content))  # slashes at the end say nothing about a file
    file, found = OpenFile(str(path)), []
    for member in scan_tar(path):
        found.append((member.name.rstrip("/"), member.isreg(), file.read(member.offset_data, member.size)))
    assert found == wanted


@pytest.mark.parametrize("form", FORMS, ids=["ustar", "gnu", "pax"])
def test_long_names_are_whole_in_every_form(tmp_path, form):
    names = ["d" * 150 + "/" + "f" * 90, "short"]
    (tmp_path / "x.tar").write_bytes(build_tar([(name, b"x") for name in names], form))
    assert [member.name for member in scan(tmp_path / "x.tar")] == names


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_offsets_and_sizes_beyond_8_gib_are_read(tmp_path, form):
    path = tmp_path / "big.tar"
    large = tarfile.TarInfo("large")
    large.size = (9 << 30) + 5
    with path.open("wb") as file:
        header = large.tobuf(form)
        file.write(header)
        file.seek(len(header) + (9 << 30) + 512)  # a hole: it takes no room on the disk
        file.write(build_tar([("behind", b"image")], form))
    behind = scan(path)[1]
    assert scan(path)[0].size == large.size and behind.offset_data > 9 << 30
    assert OpenFile(str(path)).read(behind.offset_data, behind.size) == b"image"


def test_a_tar_cut_anywhere_is_an_error_or_has_all_its_members(tmp_path):
    path = tmp_path / "x.tar"
    whole = build_tar([("a", b"x" * 700), ("b" * 150, b"y" * 20), ("c", b"")])
    path.write_bytes(whole)
    members = [(member.name, member.size) for member in scan(path)]
    end = scan(path)[-1].offset_data + 512  # one block of zeros will do for the end mark
    assert len(members) == 3 and len(whole) > end
    for num_bytes in [*range(0, len(whole), 128), end - 1]:
        path.write_bytes(whole[:num_bytes])
        if num_bytes >= end:
            assert [(member.name, member.size) for member in scan(path)] == members
            continue
        with pytest.raises(UserError) as caught:
            scan(path)
        message = str(caught.value)
        assert f"{path}: truncated: " in message and f"byte {num_bytes}" in message and "\n" not in message


def test_the_end_mark_may_be_missing_from_a_tar_whose_size_another_one_tells(tmp_path):
    path = tmp_path / "x.tar"
    whole = build_tar([("a", b"x" * 700)])
    path.write_bytes(b"\0" * 512 + whole[:1536] + whole)  # what comes behind is not of it
    assert [m.name for m in scan(path, start=512, size=512 + 1024, name="a.tar")] == ["a"]
    with pytest.raises(UserError, match=r"x.tar, 'a.tar': truncated: 'a' \(header at byte 512\) needs 700 bytes"):
        scan(path, start=512, size=1024, name="a.tar")


@pytest.mark.parametrize("place", [0, 100, 148, 511])
def test_a_flipped_bit_in_a_header_is_found(tmp_path, place):
    path = tmp_path / "x.tar"
    whole = bytearray(build_tar([("a", b"x" * 700), ("b", b"y")]))
    whole[512 + 1024 + place] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match="damaged: no tar header at byte 1536"):
        scan(path)


def make_gzip(path: Path) -> None:
    with tarfile.open(path, "w:gz") as tar:
        add_member(tar, "a", b"x" * 5000)


def make_sparse(path: Path) -> None:
    info = tarfile.TarInfo("holes")
    info.type = tarfile.GNUTYPE_SPARSE
    path.write_bytes(info.tobuf() + bytes(1024))


def make_endless_name(path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2 << 20
    path.write_bytes(info.tobuf() + bytes(3 << 20))


def make_bad_size(path: Path) -> None:
    header = bytearray(tarfile.TarInfo("a").tobuf())
    header[124:136] = b"12345678901\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(header + bytes(1024))


def make_negative_size(path: Path) -> None:
    """Followed, it would lead back to where the reader has been, for ever."""
    header = bytearray(tarfile.TarInfo("a").tobuf())
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"  # -1024
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(header + bytes(1024))


def make_pax_size(path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 12
    path.write_bytes(info.tobuf() + b"12 size=1x2\n".ljust(512, b"\0") + build_tar([("a", b"x" * 9)]))


def make_no_name(path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 9
    path.write_bytes(info.tobuf() + bytes(512) + build_tar([("a", b"x")]))


def make_chain(path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 9
    path.write_bytes((info.tobuf() + b"long name".ljust(512, b"\0")) * 5000 + build_tar([("a", b"x")]))


def make_bad_pax(path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 20
    path.write_bytes(info.tobuf() + b"0 path=b\n".ljust(512, b"\0") + bytes(1024))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b""), "truncated: ends at byte 0"),
        (
            lambda path: path.write_bytes(b"\xff\xd8" * 400),
            "no tar, expected a tar header at byte 0 .bad checksum.; a compressed one",
        ),
        (make_gzip, "truncated: ends at byte|no tar, expected a tar header"),
        (make_sparse, "'holes' .* is stored as a sparse file"),
        (make_endless_name, "header at byte 0 .a name of 2097152 bytes, expected no more than 1048576"),
        (make_bad_size, "no tar, expected a tar header at byte 0"),
        (
            make_negative_size,
            "'a' .header at byte 0. has no readable size|header at byte 0 .invalid offset",
        ),  # by version
        (make_pax_size, "damaged: 'a' .header at byte 0. has no readable size"),
        (make_no_name, "damaged: no readable name at byte 0"),
        (make_chain, "no tar, expected a tar header at byte 0 .maximum recursion depth exceeded"),
        (make_bad_pax, "no tar, expected a tar header at byte 0 .invalid header."),
    ],
)
def test_what_is_no_plain_tar_is_refused_in_one_line(tmp_path, make, message):
    make(tmp_path / "x.tar")
    with pytest.raises(UserError, match=message) as caught:
        scan(tmp_path / "x.tar")
    assert "\n" not in str(caught.value) and str(tmp_path / "x.tar") in str(caught.value)
