"""Saving beside training: what is copied, what is kept, when it is due, and what a failed or torn save costs."""

import errno
import io
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.common.errors import UserError
from tests.trainer.trained import DEMO
from trainer import checkpoint
from trainer.checkpoint import Saver, Snapshot, list_saved, list_steps
from trainer.commands.options import find_begun
from trainer.config import Job
from trainer.distributed import Ranks
from trainer.evaluate import Errors
from trainer.record.logger import Logger
from trainer.record.runs import read_config
from trainer.train import run_rank

ALONE = Ranks(0, 1, torch.device("cpu"))


def make_state(value: float) -> dict:
    weights = torch.full((3, 4, 2, 2), value).to(memory_format=torch.channels_last)
    return {
        "model": {"conv1.weight": weights, "conv1.bias": torch.full((3,), value)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.full((3,), -value)}}, "param_groups": [{"lr": 0.1}]},
        "ranks": [{"sums": torch.zeros(4, dtype=torch.float64), "loader": {"step": 3}}],
        "step": int(value),
    }


class Folder:
    """A saver in a folder, what it told and what it asked."""

    def __init__(self, path: Path, **changes) -> None:
        self.path, self.told, self.now_s, self.num_alive = path, [], 0.0, 0
        options = {"keep": 2, "minutes": 10, "before": lambda: None, "clock": lambda: self.now_s, **changes}
        self.saver = Saver(path, ALONE, tell=lambda *what: self.told.append(what), alive=self.live, **options)

    def live(self) -> None:
        self.num_alive += 1

    def save(self, step: int, *names: str) -> None:
        self.saver.begin(make_state(float(step)), step, names)
        self.saver.wait()

    def names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir())


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


def test_a_snapshot_is_not_changed_by_what_is_done_in_place_afterwards():
    snapshot, state = Snapshot(), make_state(1.0)
    copy = snapshot.take(state)
    for tensor in (state["model"]["conv1.weight"], state["ranks"][0]["sums"]):
        tensor.add_(5)
    assert (copy["model"]["conv1.weight"] == 1).all() and (copy["ranks"][0]["sums"] == 0).all()
    assert copy["model"]["conv1.weight"].is_contiguous(memory_format=torch.channels_last)
    assert copy["step"] == 1 and copy["optimizer"]["param_groups"] == [{"lr": 0.1}]


def test_the_next_snapshot_lies_in_the_same_memory_unless_a_tensor_has_another_shape():
    snapshot = Snapshot()
    first, second = snapshot.take(make_state(1.0)), snapshot.take(make_state(2.0))
    assert first["model"]["conv1.weight"].data_ptr() == second["model"]["conv1.weight"].data_ptr()
    assert (second["model"]["conv1.weight"] == 2).all()
    assert snapshot.take({"model": {"conv1.weight": torch.ones(7)}})["model"]["conv1.weight"].shape == (7,)


def test_the_memory_for_copies_is_taken_at_the_start_and_used_by_every_save(folder):
    folder.saver.prepare(make_state(1.0))
    kept = {name: buffer.data_ptr() for name, buffer in folder.saver._snapshot._buffers.items()}
    assert folder.names() == [] and len(kept) == 4
    folder.save(10)
    assert {name: buffer.data_ptr() for name, buffer in folder.saver._snapshot._buffers.items()} == kept
    assert (checkpoint.load(folder.path / "last.pt")["model"]["conv1.weight"] == 10).all()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24.0).reshape(4, 6)[:, 1:3],
        torch.arange(24.0).reshape(4, 6).t(),
        torch.arange(6.0)[2:],
        torch.zeros(0, 3),
        torch.tensor(7, dtype=torch.int64),
        torch.arange(5).to(torch.bfloat16),
        torch.arange(3.0).expand(4, 3),
    ],
    ids=["a part", "transposed", "an end", "empty", "one number", "bfloat16", "repeated"],
)
def test_tensors_of_any_form_are_copied_as_they_are(tensor):
    snapshot = Snapshot()
    for _ in range(2):
        copy = snapshot.take({"a": [tensor]})["a"][0]
        assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype
        assert copy.numel() == 0 or copy.data_ptr() != tensor.data_ptr()


def test_what_is_written_is_the_state_of_the_moment_though_training_goes_on_before_the_write(tmp_path):
    may_write = threading.Event()
    folder = Folder(tmp_path, before=may_write.wait)
    state = make_state(1.0)
    folder.saver.begin(state, 1)
    state["model"]["conv1.weight"].fill_(9.0)
    assert not folder.names()  # training has not waited
    may_write.set()
    folder.saver.wait()
    saved = checkpoint.load(tmp_path / "last.pt")
    assert (saved["model"]["conv1.weight"] == 1).all()


def test_the_last_ones_are_kept_and_those_that_have_other_names(folder):
    folder.save(10, "epoch.pt", "best.pt")
    for step in (20, 30, 40):
        folder.save(step)
    assert folder.names() == ["best.pt", "epoch.pt", "last.pt", "step-00000030.pt", "step-00000040.pt"]
    assert [checkpoint.load(folder.path / f"{name}.pt")["step"] for name in ("best", "epoch", "last")] == [10, 10, 40]
    assert (folder.path / "last.pt").samefile(folder.path / "step-00000040.pt")


def test_going_back_leaves_none_of_the_future_that_was_left(folder):
    for step in (10, 20, 30):
        folder.save(step)
    Folder(folder.path).save(25)
    assert list(list_steps(folder.path)) == [25, 20]
    assert checkpoint.load(folder.path / "last.pt")["step"] == 25


def test_a_save_is_due_by_the_clock_not_while_another_is_written_and_never_with_0(tmp_path):
    may_write = threading.Event()
    folder = Folder(tmp_path, before=may_write.wait)
    assert not folder.saver.is_due()
    folder.now_s = 600.0
    assert folder.saver.is_due()
    folder.saver.begin(make_state(1.0), 1)
    folder.now_s = 6000.0
    assert not folder.saver.is_due()
    may_write.set()
    folder.saver.wait()
    assert folder.saver.is_due()
    never = Folder(tmp_path, minutes=0)
    never.now_s = 1e9
    assert not never.saver.is_due()


def test_a_full_disk_costs_that_save_alone_and_is_told(folder, monkeypatch):
    folder.save(10)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        folder.save(20)
    (step, what, kept), *others = folder.told
    assert (step, kept, others) == (20, "the one of step 10 is kept", [])
    assert "No space left on device" in what and "step-00000020.pt" in what
    assert folder.names() == ["last.pt", "step-00000010.pt"]
    assert checkpoint.load(folder.path / "last.pt")["step"] == 10
    folder.save(30)
    assert checkpoint.load(folder.path / "last.pt")["step"] == 30 and len(folder.told) == 1


def test_a_last_save_that_fails_is_an_error_that_names_the_one_kept(folder, monkeypatch):
    folder.save(10)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    folder.saver.begin(make_state(20.0), 20)
    with pytest.raises(UserError, match=r"of step 20, could not be saved: .*No space.*; the one of step 10 is kept"):
        folder.saver.finish()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_saved(folder, bad):
    folder.save(10)
    state = make_state(20.0)
    state["model"]["conv1.weight"][1, 2, 0, 1] = bad
    folder.saver.begin(state, 20)
    with pytest.raises(UserError, match=r"after step 20 the model's numbers are not finite.*--resume"):
        folder.saver.wait()
    assert folder.names() == ["last.pt", "step-00000010.pt"]


def test_what_is_no_fault_of_the_disk_is_raised(folder):
    folder.saver.begin({**make_state(1.0), "odd": {1, 2}}, 1)
    with pytest.raises(TypeError, match="odd"):
        folder.saver.wait()


def test_who_waits_for_a_write_hears_that_it_moves(folder):
    folder.saver.wait()
    before = folder.num_alive
    folder.save(10)
    assert folder.num_alive > before


def test_who_waits_hears_each_time_that_the_file_has_grown(folder, monkeypatch):
    folder.save(10)
    writing, sizes, before = iter(range(4)), iter([100, 100, 200, 200, 200]), folder.num_alive
    gather, path = checkpoint.gather, checkpoint._temporary(folder.path / "step-00000010.pt")

    def grow(value, ranks):
        path.write_bytes(bytes(next(sizes)))  # seen the next time
        return gather(value, ranks)

    monkeypatch.setattr(checkpoint, "gather", grow)
    monkeypatch.setattr(folder.saver, "_is_writing", lambda: next(writing, None) is not None)
    folder.saver._wait()
    assert folder.num_alive == before + 3  # nothing yet, 100 bytes, 200 bytes


def test_a_write_left_by_a_killed_run_is_cleared_away(tmp_path):
    (tmp_path / ".step-00000032.pt.tmp").write_bytes(b"half")
    Folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_checkpoints_that_was_taken_away_is_there_again_with_the_next_save(folder):
    folder.save(10)
    shutil.rmtree(folder.path)
    assert list_steps(folder.path) == {}
    folder.save(20)
    assert folder.names() == ["last.pt", "step-00000020.pt"] and folder.told == []


CALLS = ("os.fsync", "pathlib.Path.replace", "os.link", "pathlib.Path.unlink")


def count_calls(monkeypatch, at: int) -> list[int]:
    """Of the calls that change the disk, the one numbered `at` and all after it fail, as if the process had ended."""
    counted = [0]

    def guard(function):
        def guarded(*args, **kwargs):
            counted[0] += 1
            if counted[0] >= at:
                raise SystemExit("killed")
            return function(*args, **kwargs)

        return guarded

    for name in CALLS:
        owner = os if name.startswith("os.") else Path
        attribute = name.rpartition(".")[2]
        monkeypatch.setattr(owner, attribute, guard(getattr(owner, attribute)))
    return counted


def test_a_kill_between_any_two_changes_of_the_disk_leaves_a_whole_checkpoint_under_every_name(tmp_path, monkeypatch):
    at, steps_found = 1, set()
    while True:
        path = tmp_path / str(at)
        path.mkdir()
        folder = Folder(path, keep=1)
        folder.save(10, "epoch.pt", "best.pt")
        with monkeypatch.context() as patch:
            counted = count_calls(patch, at)
            try:
                folder.saver._write(make_state(20.0), 20, ("epoch.pt", "best.pt"))
            except SystemExit:
                is_over = False
            else:
                is_over = True
        found = {name: checkpoint.load(path / name)["step"] for name in folder.names() if name.endswith(".pt")}
        assert {"last.pt", "epoch.pt", "best.pt"} <= set(found) and set(found.values()) <= {10, 20}
        assert found["last.pt"] <= min(found["epoch.pt"], found["best.pt"])  # last.pt moves last
        steps_found.add(checkpoint.load(list_saved(path)[0])["step"])
        if is_over:
            break
        at += 1
    assert (
        counted[0] >= 10
        and steps_found == {10, 20}
        and folder.names() == sorted(["best.pt", "epoch.pt", "last.pt", "step-00000020.pt"])
    )


def test_checkpoints_are_tried_from_the_newest_on_each_once(folder):
    for step in (10, 20):
        folder.save(step)
    assert [path.name for path in list_saved(folder.path)] == ["last.pt", "step-00000010.pt"]
    (folder.path / "last.pt").unlink()
    assert [path.name for path in list_saved(folder.path)] == ["step-00000020.pt", "step-00000010.pt"]


def make_logger(runs: Path, resume: Path | None = None, step: int = 0, epoch: int = 1, config=None, **named) -> Logger:
    class Colors:
        def save(self, _folder: Path) -> None:
            pass

    return Logger(ALONE, runs, "run", config or {}, Colors(), resume=resume, step=step, epoch=epoch, **named)


class FullBoard:
    """TensorBoard's on a disk that fills up with its second record."""

    def __init__(self, opens: bool = True) -> None:
        if not opens:
            self.fail()
        self.num_calls = 0

    def eval(self, _record: object) -> None:
        self.num_calls += 1
        if self.num_calls > 1:
            self.fail()

    def fail(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "run/tensorboard")

    close = fail


@pytest.mark.parametrize("opens", [True, False])
def test_a_disk_that_is_full_for_tensorboard_ends_its_events_and_not_the_run(tmp_path, capsys, opens):
    logger = make_logger(tmp_path, open_board=lambda _: FullBoard(opens))
    for step in (1, 2, 3):
        logger.eval(Errors(24, 1.0, 50.0, 5.0), step, 1)
    logger.close()
    assert len((logger.folder / "metrics.jsonl").read_text().splitlines()) == 3
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "No space left on device" in said and "metrics.jsonl is the record" in said


def test_lines_for_a_full_disk_wait_and_are_there_when_it_has_room(tmp_path, monkeypatch, capsys):
    logger = make_logger(tmp_path)
    full, descriptor = [True], logger._log._file.fileno()

    class Disk(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def fileno(self) -> int:
            return descriptor

        def write(self, data) -> int:
            if full[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            return os.write(descriptor, data)

    log, logger._log._file = logger._log._file, io.BufferedWriter(Disk(), 1 << 20)
    for step in (1, 2):
        logger.event("something", step=step)
    with pytest.raises(OSError, match="No space left"):
        logger.sync()  # so no checkpoint is made that goes beyond the log
    assert (logger.folder / "metrics.jsonl").read_bytes() == b""
    assert capsys.readouterr().err.count("warning: ") == 1
    full[0] = False
    logger.event("something", step=3)
    lines = (logger.folder / "metrics.jsonl").read_text().splitlines()
    assert [f'"step": {step}' in line for step, line in enumerate(lines, start=1)] == [True] * 3
    log.close()


def test_a_run_begun_anew_in_its_folder_has_the_new_configuration_and_one_gone_on_with_its_own(tmp_path):
    first = make_logger(tmp_path, config={"shards": "one"})
    first.close()
    make_logger(tmp_path, first.folder, step=0, config={"shards": "two"}).close()
    assert read_config(first.folder) == {"shards": "two"}
    make_logger(tmp_path, first.folder, step=32, config={"shards": "three"}).close()
    assert read_config(first.folder) == {"shards": "two"}


def test_a_run_killed_while_its_folder_is_filled_is_begun_again_in_it(tmp_path):
    class Colors:
        def save(self, _folder: Path) -> None:
            raise SystemExit("killed")

    with pytest.raises(SystemExit):
        Logger(ALONE, tmp_path, "run", {}, Colors(), resume=None, step=0, epoch=1)
    assert find_begun(tmp_path, "run") == tmp_path / "run"


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    logger = make_logger(tmp_path)
    with pytest.raises(UserError, match="another process trains in it"):
        make_logger(tmp_path, resume=logger.folder)
    logger.close()
    make_logger(tmp_path, resume=logger.folder)


@pytest.mark.parametrize(("epoch", "kept"), [(3, [1, 2]), (2, [1])])
def test_an_evaluation_is_cut_where_the_checkpoint_of_its_step_is_from_before_it(tmp_path, epoch, kept):
    logger = make_logger(tmp_path)
    numbers = {"crops": "centre", "num_images": 24, "loss": 1.0, "top1_error": 50.0, "top5_error": 5.0}
    for ended in (1, 2):
        logger._log.eval(step=32 * ended, epoch=ended, **numbers)
    logger.close()
    make_logger(tmp_path, logger.folder, step=64, epoch=epoch).close()
    lines = (logger.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == kept


def test_a_run_on_a_full_disk_goes_on_to_its_end_and_then_says_what_it_could_not_save(ready_shards, small_disk, capsys):
    runs = small_disk(4)  # a checkpoint of the narrow net takes 3
    recipe = replace(DEMO, global_batch_size=16, epochs=3, schedule="milestones")
    job = Job(str(ready_shards), runs, "run", recipe, seed=0, use_gpu=False)
    with pytest.raises(UserError, match=r"of step 12, could not be saved: .*No space.*; the one of step 4 is kept"):
        run_rank(job)
    records = [json.loads(line) for line in (runs / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "eval"] == [4, 8, 12]
    assert [record["step"] for record in records if record.get("name") == "checkpoint_failed"] == [8]
    assert "warning: no checkpoint of step 8: " in capsys.readouterr().err
    assert [path.name for path in list_saved(runs / "run" / "checkpoints")] == ["last.pt"]
    assert checkpoint.load(runs / "run" / "checkpoints" / "last.pt")["step"] == 4
