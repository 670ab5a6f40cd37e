"""Run folders are never shared or overwritten; metrics survive kills and tell of any other damage."""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.common.errors import UserError
from trainer.record import runs as runlog
from trainer.record.metrics import MetricsLog, read_metrics
from trainer.record.runs import create_run, find_run, read_config, resolve_run, write_config

TRAIN = {
    "step": 40,
    "epoch": 2,
    "loss": 1.93,
    "top1_error": 71.2,
    "top5_error": 20.1,
    "lr": 0.01,
    "images_per_s": 212.0,
    "data_wait_fraction": 0.01,
    "time_s": 12.3,
}
EVAL = {
    "step": 40,
    "epoch": 2,
    "crops": "centre",
    "num_images": 200,
    "loss": 1.2,
    "top1_error": 40.5,
    "top5_error": 3.0,
}


def make_resumable(run):
    (run / runlog.CHECKPOINTS / runlog.LAST).write_bytes(b"")


# Run folders


def test_runs_of_one_name_are_numbered_and_never_overwritten(tmp_path):
    runs = tmp_path / "new" / "runs"
    first = create_run(runs, "paper")
    (first / "keep").write_text("mine")
    assert [create_run(runs, "paper").name for _ in range(2)] == ["paper-2", "paper-3"]
    assert (first / "keep").read_text() == "mine"
    assert (first / runlog.CHECKPOINTS).is_dir()


def test_a_file_in_the_way_counts_as_taken(tmp_path):
    (tmp_path / "paper").write_text("a file")
    assert create_run(tmp_path, "paper").name == "paper-2"


def test_runs_created_at_the_same_time_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: create_run(tmp_path, "demo"), range(64)))
    assert len(set(made)) == 64
    assert {run.name for run in made} == {"demo", *(f"demo-{number}" for number in range(2, 65))}


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../up", "two words", "naïve", "line\n", "nul\0"])
def test_a_name_that_is_no_plain_file_name_is_refused(tmp_path, name):
    for make in (create_run, find_run):
        with pytest.raises(UserError, match="run name"):
            make(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


def test_the_newest_run_with_a_checkpoint_is_found_by_number(tmp_path):
    made = [create_run(tmp_path, "demo") for _ in range(12)]
    for run in made[:10]:
        make_resumable(run)
    assert find_run(tmp_path, "demo") == tmp_path / "demo-10"  # not demo-9, last in the alphabet; 11 and 12 have none


def test_a_run_whose_name_only_begins_the_same_is_another(tmp_path):
    for name in ("demo", "demonstration", "demo-5-wide", "demo-0"):
        make_resumable(create_run(tmp_path, name))
    assert find_run(tmp_path, "demo") == tmp_path / "demo"


def test_without_a_run_to_resume_those_that_could_be_are_named(tmp_path):
    create_run(tmp_path, "demo")
    make_resumable(create_run(tmp_path, "paper"))
    with pytest.raises(UserError, match=r"'demo'.*found paper\b"):
        find_run(tmp_path, "demo")
    with pytest.raises(UserError, match="found none"):
        find_run(tmp_path / "nowhere", "demo")


def test_a_run_is_named_by_its_path_or_by_its_name(tmp_path, monkeypatch):
    run = create_run(tmp_path / "runs", "demo")
    write_config(run, {"seed": 1})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder of that name which is no run does not stand in the way
    assert resolve_run(tmp_path / "runs", "demo") == run
    assert resolve_run(tmp_path / "elsewhere", str(run)) == run
    assert read_config(run) == {"seed": 1}


@pytest.mark.parametrize("text", ["other", "", "../runs/demo/..", "a\0b"])
def test_what_is_no_run_is_refused_with_the_runs_there_are(tmp_path, text):
    write_config(create_run(tmp_path, "demo"), {})
    with pytest.raises(UserError, match="has demo"):
        resolve_run(tmp_path, text)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_a_damaged_configuration_is_refused_by_name(tmp_path, content):
    (tmp_path / runlog.CONFIG).write_text(content)
    with pytest.raises(UserError, match=runlog.CONFIG):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("recipe", "paper"), ("seed", True), ("shards", None), ("safety", []), ("classes", {})]
)
def test_a_configuration_with_a_field_of_another_type_is_refused_by_name(tmp_path, field, value):
    write_config(tmp_path, {"seed": 1, field: value})
    with pytest.raises(UserError, match=rf"config\.json: {field} is .*, expected "):
        read_config(tmp_path)


# Metrics


def test_records_have_exactly_the_fields_of_the_contract_one_strict_object_a_line(tmp_path):
    path = tmp_path / runlog.METRICS
    with MetricsLog.open(path, None) as log:
        log.train(**TRAIN)
        log.eval(**EVAL)
        log.event("lr_cut", step=40, epoch=2, lr=0.001)
    expected = [
        {"kind": "train", **TRAIN},
        {"kind": "eval", **EVAL},
        {"kind": "event", "name": "lr_cut", "step": 40, "epoch": 2, "lr": 0.001},
    ]
    assert read_metrics(path) == expected
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected


def test_a_line_is_in_the_file_as_soon_as_it_is_logged(tmp_path):
    path = tmp_path / runlog.METRICS
    with MetricsLog.open(path, None) as log:
        log.train(**TRAIN)
        assert len(read_metrics(path)) == 1
        log.sync()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_written_as_null(tmp_path, value):
    path = tmp_path / runlog.METRICS
    with MetricsLog.open(path, None) as log:
        log.train(**TRAIN | {"loss": value})
    assert '"loss": null' in path.read_text()
    assert read_metrics(path)[0]["loss"] is None


def test_a_finite_loss_however_large_can_be_read_again(tmp_path):
    path = tmp_path / runlog.METRICS
    with MetricsLog.open(path, None) as log:
        log.train(**TRAIN | {"loss": 1.7e308})
    assert read_metrics(path)[0]["loss"] == 1.7e308


@pytest.mark.parametrize("wrong", [{"step": 1.0}, {"epoch": True}, {"loss": "1.0"}, {"step": None}])
def test_a_record_that_could_not_be_read_again_is_never_written(tmp_path, wrong):
    path = tmp_path / runlog.METRICS
    with MetricsLog.open(path, None) as log, pytest.raises(ValueError, match=next(iter(wrong))):
        log.train(**TRAIN | wrong)
    assert path.read_bytes() == b""


def test_a_record_without_one_of_its_fields_is_never_written(tmp_path):
    path = tmp_path / runlog.METRICS
    with MetricsLog.open(path, None) as log, pytest.raises(ValueError, match="without top5_error"):
        log.eval(**{name: value for name, value in EVAL.items() if name != "top5_error"})
    assert path.read_bytes() == b""


def test_a_new_log_never_overwrites_one(tmp_path):
    path = tmp_path / runlog.METRICS
    path.write_text("precious\n")
    with pytest.raises(FileExistsError):
        MetricsLog.open(path, None)
    assert path.read_text() == "precious\n"


def log_of_steps(path, *steps):
    with MetricsLog.open(path, None) as log:
        for step in steps:
            log.train(**TRAIN | {"step": step})
            log.eval(**EVAL | {"step": step})
            log.event("note")


def same_metrics(left, right):
    """The same but for speeds, times and events, which is what "the same metrics" means here."""
    measured = ("images_per_s", "data_wait_fraction", "time_s")
    bare = [
        [{k: v for k, v in record.items() if k not in measured} for record in records if record["kind"] != "event"]
        for records in (left, right)
    ]
    return bare[0] == bare[1]


def test_a_resumed_log_cuts_the_lines_past_the_checkpoint_and_goes_on(tmp_path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / runlog.METRICS
    log_of_steps(whole, 10, 20, 30)
    log_of_steps(path, 10, 20, 30)
    with MetricsLog.open(path, 20) as log:
        assert path.read_bytes() == b"".join(whole.read_bytes().splitlines(keepends=True)[:6])
        log.train(**TRAIN | {"step": 30, "images_per_s": 1.0})
        log.eval(**EVAL | {"step": 30})
    assert same_metrics(read_metrics(path), read_metrics(whole))
    assert not same_metrics(read_metrics(path)[:-1], read_metrics(whole))


def test_a_line_torn_by_a_kill_is_dropped_on_resuming(tmp_path):
    path = tmp_path / runlog.METRICS
    log_of_steps(path, 10)
    whole = path.read_bytes()
    for torn in (b'{"kind": "tra', b"\x00" * 40, b'{"kind": "event", "name": "whole but for its end"}'):
        path.write_bytes(whole + torn)
        assert len(read_metrics(path)) == 3
        with MetricsLog.open(path, 10) as log:
            log.event("resumed", step=10)
        assert [record.get("name") for record in read_metrics(path)] == [None, None, "note", "resumed"]


def test_resuming_before_the_first_line_or_without_a_log_begins_it_anew(tmp_path):
    path = tmp_path / runlog.METRICS
    log_of_steps(path, 10)
    MetricsLog.open(path, 5).close()
    assert path.read_bytes() == b""
    path.unlink()
    MetricsLog.open(path, 5).close()
    assert path.read_bytes() == b""


def test_a_failed_cut_keeps_the_log_whole(tmp_path, monkeypatch):
    path = tmp_path / runlog.METRICS
    log_of_steps(path, 10, 20)
    before = path.read_bytes()

    def full(_descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        MetricsLog.open(path, 10)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


GOOD = json.dumps({"kind": "event", "name": "fine"}).encode() + b"\n"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"train"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"kind": "unknown"}',
        b'{"kind": ["train"]}',
        b'{"kind": "event"}',
        b'{"kind": "event", "name": "x", "step": "1"}',
        b'{"kind": "event", "name": "x", "lr": NaN}',
        b'{"kind": "train", "step": 1}',
        json.dumps({"kind": "train", **TRAIN, "loss": "1"}).encode(),
        json.dumps({"kind": "train", **TRAIN, "loss": math.nan}).encode(),
        json.dumps({"kind": "train", **TRAIN}).replace("1.93", "1e999").encode(),
        json.dumps({"kind": "train", **TRAIN, "step": 10**400}).encode(),
        json.dumps({"kind": "eval", **EVAL, "crops": 10}).encode(),
    ],
)
def test_a_damaged_line_within_is_named_by_its_number(tmp_path, line):
    path = tmp_path / runlog.METRICS
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(UserError, match="line 2") as caught:
        read_metrics(path)
    assert "\n" not in str(caught.value)
    before = path.read_bytes()
    with pytest.raises(UserError, match="line 2"):
        MetricsLog.open(path, 0)
    assert path.read_bytes() == before


def test_a_missing_log_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=runlog.METRICS):
        read_metrics(tmp_path / runlog.METRICS)


LINES = st.lists(
    st.one_of(st.binary(max_size=40), st.just(GOOD), st.just(json.dumps({"kind": "eval", **EVAL}).encode()))
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=200), LINES.map(b"\n".join)))
def test_any_bytes_are_read_as_records_or_refused(tmp_path, content):
    path = tmp_path / runlog.METRICS
    path.write_bytes(content)
    try:
        records = read_metrics(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert len(records) == content.count(b"\n")
        assert all(record["kind"] in ("train", "eval", "event") for record in records)
