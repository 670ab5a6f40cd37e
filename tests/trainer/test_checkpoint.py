"""Checkpoints come back as they were saved, or are refused in one line; a failed save costs nothing."""

import errno
import hashlib
import io
import os
import pickle
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.common.errors import UserError
from trainer import checkpoint

STATE = {
    "model": OrderedDict({"conv1.weight": torch.arange(12.0).reshape(3, 4), "conv1.bias": torch.ones(3)}),
    "momentum": [torch.full((2, 2), 0.25, dtype=torch.bfloat16), torch.tensor([1, -1])],
    "loader": {"rank 0": b"\x00\xff serialised", "rank 1": "text"},
    "step": 40,
    "lr": 0.01,
    "best": None,
    "history": (1, True, 2.5, float("inf")),
}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)
    return path


def same(left, right):
    """Equal in type and, for tensors, in every bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refusal(path):
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "another checkpoint" in message
    return message


def test_a_state_comes_back_bit_for_bit_with_the_schema_added(saved):
    assert same(checkpoint.load(saved), STATE | {"schema": checkpoint.CHECKPOINT_SCHEMA})


def test_saving_leaves_no_other_file(saved):
    assert names(saved.parent) == [saved.name]


def test_what_a_killed_save_left_behind_is_replaced_by_the_next(saved):
    checkpoint._temporary(saved).write_bytes(b"half a checkpoint")
    checkpoint.save(saved, {"step": 2})
    assert checkpoint.load(saved)["step"] == 2
    assert names(saved.parent) == [saved.name]


@pytest.mark.parametrize(
    ("value", "where"),
    [(np.float64(1.0), "state['deep'][0]"), (np.zeros(3), "state['deep'][0]"), ({1, 2}, "state['deep'][0]")],
)
def test_a_value_that_could_not_be_loaded_again_is_refused_when_saving(saved, value, where):
    before = saved.read_bytes()
    with pytest.raises(TypeError) as caught:
        checkpoint.save(saved, {"deep": [value]})
    assert where in str(caught.value)
    assert saved.read_bytes() == before


def test_a_missing_checkpoint_is_named_with_those_beside_it(saved):
    (saved.parent / "best.pt").write_bytes(b"")
    saved.unlink()
    message = refusal(saved)
    assert "no such checkpoint" in message
    assert "best.pt" in message


def test_a_folder_in_place_of_a_checkpoint_is_refused(tmp_path):
    assert "cannot be read" in refusal(tmp_path)


def test_an_empty_file_is_refused(saved):
    saved.write_bytes(b"")
    assert "empty" in refusal(saved)


def test_a_file_of_another_kind_is_refused(saved):
    saved.write_bytes(b"<html>404 Not Found</html>" * 50)
    assert "not a checkpoint" in refusal(saved)


def test_a_checkpoint_cut_short_anywhere_is_refused(saved):
    whole = saved.read_bytes()
    for length in range(1, len(whole), 7):
        saved.write_bytes(whole[:length])
        assert "cut short" in refusal(saved)


def test_a_checkpoint_with_something_appended_is_refused(saved):
    saved.write_bytes(saved.read_bytes() + b"\0")
    assert "not a checkpoint" in refusal(saved)


def test_a_flipped_bit_anywhere_is_refused(saved):
    """In the padding and the headers as well: zip's own CRC-32s let some of these pass for other weights."""
    whole = saved.read_bytes()
    draw = random.Random(0)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << draw.randrange(8)
        saved.write_bytes(damaged)
        assert "checkpoint" in refusal(saved)


def test_torch_itself_reads_the_file(saved):
    assert same(torch.load(saved, weights_only=True), checkpoint.load(saved))


def test_the_file_ends_in_the_checksum_of_all_before_it_as_in_those_made_before(saved):
    data = saved.read_bytes()
    assert data[-73:-64] == (71).to_bytes(2, "little") + b"sha256 "
    assert data[-64:] == hashlib.sha256(data[:-64]).hexdigest().encode()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 41), (38, 1, 2, 3), (43, 1), (44,), (2, 42), (0, 44)])
def test_the_seal_does_not_depend_on_how_the_bytes_come(sizes):
    data, file = bytes(range(42)) + b"\0\0", io.BytesIO()
    sealing, start = checkpoint.Sealing(file), 0
    for size in sizes:
        assert sealing.write(memoryview(data)[start : start + size]) == size
        start += size
    assert start == len(data)
    sealing.seal()
    body = data[:-2] + (71).to_bytes(2, "little") + b"sha256 "
    assert file.getvalue() == body + hashlib.sha256(body).hexdigest().encode()


def write_sealed(path, state):
    """A file as `checkpoint.save` makes it, of a state that `save` would not take."""
    with path.open("wb") as file:
        sealing = checkpoint.Sealing(file)
        torch.save(state, sealing)
        sealing.seal()


class Evil:
    """Unpickled, it makes the folder `target`."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    target, path = tmp_path / "was here", tmp_path / "evil.pt"
    write_sealed(path, {"schema": checkpoint.CHECKPOINT_SCHEMA, "model": Evil(target)})
    assert "code" in refusal(path)
    assert not target.exists()
    torch.load(path, weights_only=False)  # the bait is live: read carelessly, it runs
    assert target.exists()


def test_a_bare_pickle_is_refused_and_not_run(tmp_path):
    target, path = tmp_path / "was here", tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Evil(target)))
    refusal(path)
    assert not target.exists()


def test_a_sound_seal_on_senseless_contents_is_refused(tmp_path):
    path = tmp_path / "odd.pt"
    with path.open("wb") as file:
        sealing = checkpoint.Sealing(file)
        sealing.write(b"PK\x03\x04 no archive \0\0")
        sealing.seal()
    assert "not a checkpoint" in refusal(path)


@pytest.mark.parametrize(
    "state", [{"step": 1}, {"schema": 2}, {"schema": True}, {"schema": "1"}, {"schema": torch.zeros(9, 9)}, [1]]
)
def test_another_schema_is_refused(tmp_path, state):
    path = tmp_path / "other.pt"
    write_sealed(path, state)
    assert "schema is" in refusal(path)
    assert f"expected {checkpoint.CHECKPOINT_SCHEMA}" in refusal(path)


def assert_kept(path: Path, error: OSError) -> None:
    assert error.errno == errno.ENOSPC
    assert str(path.parent) in str(error.filename)
    assert names(path.parent) == [path.name]
    assert same(checkpoint.load(path), STATE | {"schema": checkpoint.CHECKPOINT_SCHEMA})


def test_a_full_disk_keeps_the_previous_checkpoint_and_no_temporary_file(small_disk):
    path = small_disk(1) / "last.pt"
    checkpoint.save(path, STATE)
    with pytest.raises(OSError) as caught:
        checkpoint.save(path, {"model": torch.zeros(1_000_000)})
    assert_kept(path, caught.value)


def test_a_disk_that_fills_up_only_at_fsync_keeps_the_previous_checkpoint(saved, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError) as caught:
            checkpoint.save(saved, {"step": 41})
    assert_kept(saved, caught.value)


def test_the_file_is_on_disk_before_it_takes_the_name_and_the_folder_after(saved, monkeypatch):
    happened = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor):
        happened.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def watched_replace(source, target):
        happened.append(("rename", str(target)))
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    checkpoint.save(saved, {"step": 41})
    temporary = str(checkpoint._temporary(saved))
    assert happened == [("fsync", temporary), ("rename", str(saved)), ("fsync", str(saved.parent))]


def test_best_stays_what_it_was_when_last_moves_on(saved):
    best = saved.with_name("best.pt")
    checkpoint.link(saved, best)
    assert best.samefile(saved)
    checkpoint.save(saved, {"step": 41})
    assert checkpoint.load(best)["step"] == 40
    checkpoint.link(saved, best)
    assert checkpoint.load(best)["step"] == 41


@pytest.mark.parametrize("is_link_possible", [True, False])
def test_a_second_name_is_that_of_what_is_on_disk_and_its_folder_is_synced_after(saved, monkeypatch, is_link_possible):
    happened, best = [], saved.with_name("best.pt")
    fsync, replace, link = os.fsync, Path.replace, os.link

    def watched_fsync(descriptor):
        happened.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def watched_replace(source, target):
        happened.append(("rename", str(target)))
        return replace(source, target)

    def watched_link(source, target):
        if not is_link_possible:
            raise OSError(errno.EPERM, "Operation not permitted")
        happened.append(("link", str(target)))
        link(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    monkeypatch.setattr(os, "link", watched_link)
    checkpoint.link(saved, best)
    first = ("link" if is_link_possible else "fsync", str(checkpoint._temporary(best)))
    assert happened == [first, ("rename", str(best)), ("fsync", str(best.parent))]


def test_linking_twice_changes_nothing_and_leaves_no_temporary_file(saved):
    best = saved.with_name("best.pt")
    for _ in range(2):
        checkpoint.link(saved, best)
    assert names(saved.parent) == ["best.pt", "last.pt"]


def test_where_links_are_not_possible_the_checkpoint_is_copied(saved, monkeypatch):
    def refuse(_source, _target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    best = saved.with_name("best.pt")
    checkpoint.link(saved, best)
    assert not best.samefile(saved)
    assert best.read_bytes() == saved.read_bytes()
    assert names(saved.parent) == ["best.pt", "last.pt"]


def test_linking_what_is_not_there_fails_and_keeps_the_target(saved):
    best = saved.with_name("best.pt")
    checkpoint.link(saved, best)
    with pytest.raises(FileNotFoundError):
        checkpoint.link(saved.with_name("gone.pt"), best)
    assert checkpoint.load(best)["step"] == 40
