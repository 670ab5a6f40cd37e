"""Parquet: single values are found where pyarrow finds them; files that are not ImageNet's are refused in one line."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.common.errors import UserError
from pipeline.images.imagenet import load_ilsvrc2012
from tests.layout_builders import build_parquet
from tools.sources.archive import OpenFile
from tools.sources.parquet_pages import FRAGMENT_BYTES, Column, Page, Unlocatable, locate_values, read_place
from tools.sources.source import open_source

SCHEMA = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])


def make_value(kind: str, size: int, seed: int) -> bytes:
    if kind == "photograph":  # what a JPEG looks like to a compressor
        return random.Random(seed).randbytes(size)
    return (b"abcd" * (size // 4 + 1))[:size] if kind == "repeating" else bytes(size)


VALUES = st.lists(
    st.builds(
        make_value,
        st.sampled_from(["photograph", "photograph", "repeating", "zero"]),
        st.sampled_from([0, 1, 3, 4, 100, 65_531, 65_532, 65_536, 65_537, 200_000]),
        st.integers(0, 3),  # few seeds: equal values share a place in the dictionary
    ),
    min_size=1,
    max_size=12,
)


def write_values(path: Path, values: list[bytes | None], **options) -> None:
    rows = [{"image": {"bytes": value, "path": None}, "label": 0} for value in values]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, **options)


def locate(path: Path) -> list[bytes]:
    metadata = pq.read_metadata(path)
    file, found = OpenFile(str(path)), []
    for group in range(metadata.num_row_groups):
        chunk = metadata.row_group(group).column(0)
        start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
        column = Column(start, chunk.total_compressed_size, chunk.num_values, 2, chunk.compression)
        found += [read_place(file, place) for place in locate_values(file, column)]
    return found


@settings(max_examples=60)
@given(
    values=VALUES,
    options=st.fixed_dictionaries(
        {
            "compression": st.sampled_from(["snappy", "none"]),
            "use_dictionary": st.booleans(),
            "data_page_version": st.sampled_from(["1.0", "2.0"]),
            "data_page_size": st.sampled_from([100, 100_000, 1 << 20]),
            "write_batch_size": st.sampled_from([1, 3, 1024]),
            "dictionary_pagesize_limit": st.sampled_from([1000, 1 << 20]),
            "row_group_size": st.sampled_from([1, 5, 100]),
            "write_page_index": st.booleans(),
        }
    ),
)
def test_each_value_is_found_whatever_the_writers_options(tmp_path_factory, values, options):
    path = tmp_path_factory.mktemp("parquet") / "x.parquet"
    write_values(path, values, **options)
    assert locate(path) == values


@pytest.mark.parametrize(
    ("values", "options", "reason"),
    [
        ([b"x" * 9], {"compression": "zstd"}, "compressed by ZSTD"),
        ([b"x" * 9, None], {}, "nulls"),
        ([b"x" * 9, None], {"data_page_version": "2.0"}, "nulls"),
        ([b"x"], {"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_BYTE_ARRAY"}}, "encoding 7"),
    ],
)
def test_what_cannot_be_located_is_told_apart(tmp_path, values, options, reason):
    write_values(tmp_path / "x.parquet", values, **options)
    with pytest.raises(Unlocatable, match=reason):
        locate(tmp_path / "x.parquet")


def test_a_snappy_stream_of_fragments_that_depend_on_each_other_is_told_apart(tmp_path):
    """No known writer makes one; the format allows it. The last four bytes are a copy out of the first fragment."""
    value = random.Random(0).randbytes(FRAGMENT_BYTES)
    literal = bytes([62 << 2]) + (FRAGMENT_BYTES - 1).to_bytes(3, "little") + value
    copy = bytes([3 << 2 | 3]) + FRAGMENT_BYTES.to_bytes(4, "little")
    stream = bytes([0x84, 0x80, 0x04]) + literal + copy
    assert pa.decompress(stream, FRAGMENT_BYTES + 4, codec="snappy", asbytes=True) == value + value[:4]
    (tmp_path / "x").write_bytes(stream)
    with pytest.raises(Unlocatable, match="fragments that depend on each other"):
        Page(OpenFile(str(tmp_path / "x")), 0, len(stream), FRAGMENT_BYTES + 4, is_snappy=True)


def test_a_page_that_tells_of_more_values_than_its_column_is_told_apart(tmp_path):
    """A damaged number of values would fill the memory with them."""
    write_values(tmp_path / "x.parquet", [b"x" * 9] * 3)
    chunk = pq.read_metadata(tmp_path / "x.parquet").row_group(0).column(0)
    column = Column(chunk.dictionary_page_offset, chunk.total_compressed_size, 2, 2, "SNAPPY")
    with pytest.raises(Unlocatable, match="more values than expected"):
        locate_values(OpenFile(str(tmp_path / "x.parquet")), column)


def test_damage_never_leads_anywhere_but_to_a_value_or_to_a_full_reader(tmp_path):
    """Bytes flipped at random in the pages: every outcome is a list of places or Unlocatable, or OSError on reading."""
    path, draw = tmp_path / "x.parquet", random.Random(0)
    write_values(path, [draw.randbytes(size) for size in (50, 3000, 70_000)] * 2, data_page_size=100)
    chunk = pq.read_metadata(path).row_group(0).column(0)
    column = Column(chunk.dictionary_page_offset, chunk.total_compressed_size, 6, 2, "SNAPPY")
    whole, outcomes = path.read_bytes(), set()
    for _ in range(300):
        damaged = bytearray(whole)
        ends = (
            column.offset,
            column.offset + 60,
            column.offset + column.num_bytes - 60,
            column.offset + column.num_bytes,
        )
        for _ in range(2):
            damaged[draw.choice([draw.randrange(*ends[:2]), draw.randrange(*ends[2:])])] = draw.randrange(256)
        path.write_bytes(damaged)
        file = OpenFile(str(path))
        try:
            for place in locate_values(file, column):
                read_place(file, place)
            outcomes.add("found")
        except (Unlocatable, OSError) as error:
            outcomes.add(type(error).__name__)
    assert {"found", "Unlocatable"} <= outcomes


def write_set(root: Path, rows: dict[str, list[tuple[str | None, bytes | None, int | None]]], schema=SCHEMA, **options):
    (root / "data").mkdir(parents=True, exist_ok=True)
    for name, images in rows.items():
        listed = [{"image": {"bytes": data, "path": path}, "label": label} for path, data, label in images]
        pq.write_table(pa.Table.from_pylist(listed, schema=schema), root / f"data/{name}.parquet", **options)
    return root


def with_names(names: list[str]) -> pa.Schema:
    import json

    info = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
    return SCHEMA.with_metadata({"huggingface": json.dumps(info)})


def test_files_of_any_other_compression_are_read_by_row_group_and_the_cost_is_told(synth_tree, tmp_path):
    source = open_source(build_parquet(synth_tree, tmp_path, compression="zstd", row_group_size=10))
    assert any("88 images cannot be read singly (compressed by ZSTD)" in remark for remark in source.remarks)
    files = {path.name: path.read_bytes() for path in (synth_tree / "train").rglob("*.JPEG")}
    assert {entry.base_name: source.read(entry) for entry in source.entries("train")} == files


def test_a_row_without_an_image_is_that_rows_failure(tmp_path):
    rows = [("n00000001_1.JPEG", b"one", 0), ("n00000001_2.JPEG", None, 0)]
    source = open_source(write_set(tmp_path, {"train-0": rows}))
    first, second = source.entries("train")
    assert source.read(first) == b"one"
    with pytest.raises(OSError, match="row 1 of row group 0 has no image"):
        source.read(second)


def test_official_names_are_restored_and_paths_are_names_only(tmp_path):
    rows = {
        "train-0": [("../../n01440764_1_n01440764.JPEG", b"a", 0), ("/etc/n01443537_7_n01443537.JPEG", b"b", 1)],
        "validation-0": [("val/ILSVRC2012_val_00000293_n01443537.JPEG", b"c", 1)],
    }
    source = open_source(write_set(tmp_path, rows))
    assert [entry.path for split in ("train", "val") for entry in source.entries(split)] == [
        "data/train-0.parquet/n01440764_1.JPEG",
        "data/train-0.parquet/n01443537_7.JPEG",
        "data/validation-0.parquet/ILSVRC2012_val_00000293.JPEG",
    ]
    assert [(c.wnid, c.name) for c in source.classes] == [
        ("n01440764", "tench, Tinca tinca"),
        ("n01443537", "goldfish, Carassius auratus"),
    ]


def test_labels_and_titles_that_contradict_the_wnids_in_names_are_told_with_examples(tmp_path):
    """Validation labels of another order than the training labels, and titles of another order than both."""
    rows = {
        "train-0": [("n01440764_1_n01440764.JPEG", b"a", 0), ("n01443537_7_n01443537.JPEG", b"b", 1)],
        "validation-0": [("ILSVRC2012_val_00000293_n01443537.JPEG", b"c", 0)],
    }
    table = load_ilsvrc2012()
    titles = [table["n01443537"], table["n01440764"]]
    [remark] = open_source(write_set(tmp_path / "a", rows, with_names(titles))).remarks
    example = "data/validation-0.parquet/ILSVRC2012_val_00000293_n01443537.JPEG"
    assert f"contradict the labels: 1 of class 'n01440764' tell n01443537, such as '{example}'" in remark
    assert f"n01440764 is called '{titles[0]}', as n01443537 is" in remark
    del rows["validation-0"][0]
    rows["validation-0"] = [("ILSVRC2012_val_00000293_n01443537.JPEG", b"c", 1)]
    assert open_source(write_set(tmp_path / "b", rows, with_names(titles[::-1]))).remarks == ()


def test_a_thousand_labels_without_wnids_are_those_of_ilsvrc2012(tmp_path):
    titles = list(load_ilsvrc2012().values())
    source = open_source(write_set(tmp_path, {"train-0": [(None, b"a", 999), (None, b"b", 3)]}, with_names(titles)))
    assert [(c.index, c.wnid, c.name) for c in source.classes] == [
        (0, "n01491361", titles[3]),
        (1, "n15075141", titles[999]),
    ]
    assert [source.read(entry) for entry in source.entries("train")] == [b"b", b"a"]
    assert source.entries("train")[0].base_name == "train-0-000001"


def test_classes_of_another_set_have_the_names_in_the_metadata_or_their_numbers(tmp_path):
    rows = {"train-0": [("x.jpg", b"a", 0), ("y.jpg", b"b", 10)]}
    names = [f"thing {9 - n}" for n in range(10)] + ["other"]
    source = open_source(write_set(tmp_path / "a", rows, with_names(names)))
    assert [c.wnid for c in source.classes] == ["other", "thing 9"]
    assert [source.read(entry) for entry in source.entries("train")] == [b"b", b"a"]
    source = open_source(write_set(tmp_path / "b", rows))
    assert [c.wnid for c in source.classes] == ["00", "10"]


@pytest.mark.parametrize(
    ("content", "text"), [(pa.large_binary(), pa.large_string()), (pa.binary_view(), pa.string_view())]
)
@pytest.mark.parametrize("compression", ["snappy", "zstd"])
def test_names_and_classes_are_the_same_in_whatever_type_of_text_a_writer_stores_paths(
    tmp_path, content, text, compression
):
    """Polars and newer pandas write large or viewed strings; only the schema beside the data tells them apart."""
    rows = {"train-0": [("n01443537_7_n01443537.JPEG", b"b", 1), ("n01440764_1_n01440764.JPEG", b"a", 0)]}
    schema = pa.schema([("image", pa.struct([("bytes", content), ("path", text)])), ("label", pa.int64())])
    source = open_source(write_set(tmp_path, rows, schema, compression=compression))
    assert [c.wnid for c in source.classes] == ["n01440764", "n01443537"]
    assert [(entry.base_name, source.read(entry)) for entry in source.entries("train")] == [
        ("n01440764_1.JPEG", b"a"),
        ("n01443537_7.JPEG", b"b"),
    ]


def test_one_column_of_plain_bytes_will_do(tmp_path):
    (tmp_path / "train").mkdir()
    table = pa.table({"image": pa.array([b"a", b"b"], pa.binary()), "label": pa.array([0, 1], pa.int32())})
    pq.write_table(table, tmp_path / "train/0000.parquet")
    source = open_source(tmp_path)
    assert [source.read(entry) for entry in source.entries("train")] == [b"a", b"b"]


def make_cut(root: Path) -> None:
    path = write_set(root, {"train-0": [("a", b"a", 0)]}) / "data/train-0.parquet"
    path.write_bytes(path.read_bytes()[:-20])


def make_other_columns(root: Path) -> None:
    (root / "data").mkdir()
    pq.write_table(pa.table({"text": ["x"], "label": [0]}), root / "data/train-0.parquet")


def make_text_image(root: Path) -> None:
    (root / "data").mkdir()
    pq.write_table(pa.table({"image": ["x"], "label": [0]}), root / "data/train-0.parquet")


def make_path_of_numbers(root: Path) -> None:
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.int64())])), ("label", pa.int64())])
    write_set(root, {"train-0": [(3, b"a", 0)]}, schema)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_path_of_numbers, "train-0.parquet: image.path is 'int64', expected text"),
        (make_cut, r"train-0.parquet: not a whole Parquet file \("),
        (make_other_columns, "columns 'text string, label int64', expected image and label"),
        (make_text_image, "column image is 'string', expected a struct of bytes and path"),
        (lambda root: write_set(root, {"train-0": [("a", b"a", None)]}), "row 0 has label None, expected a number"),
        (lambda root: write_set(root, {"train-0": [("a", b"a", -1)]}), "row 0 has label -1, expected a number"),
        (lambda root: write_set(root, {"train-0": []}), "no row in 'data/train-0.parquet'"),
        (lambda root: write_set(root, {"validation-0": [("a", b"a", 0)]}), "none for training; expected names with"),
        (
            lambda root: write_set(root, {"train-0": [("a", b"a", 0)], "other": [("a", b"a", 0)]}),
            "'data/other.parquet' tell neither train nor val",
        ),
        (
            lambda root: write_set(root, {"train-0": [("a", b"a", 0)], "validation-0": [("a", b"a", 1)]}),
            "1 classes without training images: '1'",
        ),
        (
            lambda root: write_set(
                write_set(root, {"train-0": [("a", b"a", 0)]}, with_names(["x"])),
                {"train-1": [("a", b"a", 0)]},
                with_names(["y"]),
            ),
            "train-1.parquet: names its classes otherwise than data/train-0.parquet",
        ),
    ],
)
def test_what_is_not_a_whole_set_is_refused_in_one_line(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_source(tmp_path, layout="parquet")
    assert "\n" not in str(caught.value)


def test_without_pyarrow_the_error_names_the_extra(tmp_path, monkeypatch):
    import sys

    write_set(tmp_path, {"train-0": [("a", b"a", 0)]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"needs pyarrow; install it: pip install 'alexnet-dali\[parquet\]'"):
        open_source(tmp_path)


def test_a_row_group_too_large_to_be_decoded_whole_is_refused_where_it_would_have_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.sources.parquet._MAX_GROUP_BYTES", 3_000_000)
    rows = {"train-0": [("a", b"%d" % n + bytes(1 << 20), 0) for n in range(4)]}
    assert len(open_source(write_set(tmp_path / "snappy", rows)).entries("train")) == 4
    with pytest.raises(
        UserError, match=r"row group 0 has 4 MB, readable as a whole only \(by ZSTD\), expected at most 3"
    ):
        open_source(write_set(tmp_path / "zstd", rows, compression="zstd"))
