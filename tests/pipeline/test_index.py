"""Indices that do not go with their tars: refused by name before anything is read, or named when reading has failed."""

import tarfile

import pytest

from pipeline.common.errors import UserError
from pipeline.shards import ShardSet, check_index, check_places, find_damage, read_index


def test_an_index_says_where_each_image_and_label_lies_in_its_tar(shards, raw_shards):
    for found, ending in ((shards, "jpg"), (raw_shards, "rgb")):
        for shard, tar, path in zip(found.shards("train"), found.tars("train"), found.indices("train"), strict=True):
            with tarfile.open(tar) as archive:
                members = {member.name: member for member in archive}
            index = read_index(path, shard, ending)
            names = [f"{key:09d}" for key in index.keys.tolist()]
            images, labels = ([members[f"{name}.{kind}"] for name in names] for kind in (ending, "cls"))
            assert index.offsets.tolist() == [member.offset_data for member in images]
            assert index.sizes.tolist() == [member.size for member in images]
            assert index.labels.tolist() == [member.offset_data for member in labels]
            assert len(members) == 2 * shard.samples and all(member.size == 5 for member in labels)


def edit_row(shards: ShardSet, number: int, change) -> None:
    """Change a row (from 1) of the second training shard's index; `change` is given its words."""
    path = shards.indices("train")[1]
    rows = path.read_text().splitlines()
    words = rows[number].split()
    change(words)
    rows[number] = " ".join(words)
    path.write_text("\n".join(rows) + "\n")


def put(word: int, text: str):
    return lambda words: words.__setitem__(word, text)


def test_every_index_that_was_made_is_accepted(shards, raw_shards):
    for found, ending in ((shards, "jpg"), (raw_shards, "rgb")):
        for split in ("train", "val"):
            for shard, path in zip(found.shards(split), found.indices(split), strict=True):
                check_index(path, shard, ending)
                check_places(path, shard, ending)
            find_damage(found, split)


@pytest.mark.parametrize(
    "change",
    [
        put(0, "png"),
        put(1, "-512"),
        put(1, "9" * 30),
        put(2, "1e3"),
        put(3, "../../etc/passwd.jpg"),
        put(3, "000000099.jpg"),  # not the label's key
        put(3, "x.jpg"),
        put(6, "4"),
        put(7, "0000000001.cls"),
        lambda words: words.__delitem__(slice(4, 8)),
        lambda words: words.extend(words[4:8]),
        lambda words: words.clear(),
        lambda words: words.__setitem__(slice(0, 8), ["\0", "é"]),
    ],
)
def test_a_row_of_another_form_is_shown(private_shards, make_train, change):
    edit_row(private_shards, 3, change)
    with pytest.raises(UserError, match=r"train-000001.idx: has the row '.*', expected 'jpg OFFSET BYTES KEY.jpg cls"):
        make_train(shards=private_shards)


@pytest.mark.parametrize(("change", "found"), [(lambda rows: rows[:-2], 14), (lambda rows: rows + rows[-1:], 17)])
def test_another_number_of_rows_than_samples_is_refused(private_shards, make_eval, change, found):
    path = private_shards.indices("val")[0]
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match=rf"val-000000.idx: {found} rows, expected 16; restore it"):
        make_eval(shards=private_shards)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(1, "99999999999"), r"says \d{9}.jpg lies at 99999999999 to"),
        (put(1, "1000"), r"lies at 1000 to \d+, expected a multiple of 512 past"),
        (put(2, "99999999"), r"within the tar's \d+ bytes; restore it"),
    ],
)
def test_a_place_where_nothing_can_lie_is_named_with_its_index(private_shards, make_train, change, message):
    edit_row(private_shards, 3, change)
    with pytest.raises(UserError, match=r"train-000001.idx: .*" + message):
        list(make_train(shards=private_shards))


def test_a_label_that_lies_in_another_sample_is_named(private_shards):
    edit_row(private_shards, 3, put(5, "512"))
    with pytest.raises(UserError, match=r"says \d{9}.cls lies at 512 to 517, expected a multiple of 512 past"):
        find_damage(private_shards, "train")


def test_reading_a_whole_number_of_rows_needs_a_line_end_after_each(private_shards):
    path, shard = private_shards.indices("train")[1], private_shards.shards("train")[1]
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with pytest.raises(UserError, match=r"train-000001.idx: 15 rows, expected 16"):
        check_index(path, shard, "jpg")
