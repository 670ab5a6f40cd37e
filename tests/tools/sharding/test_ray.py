"""Units as tasks of a Ray cluster: the same results, failures and errors as with local processes."""

import contextlib
import importlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from tests.sharding import BROKEN, PREP, hash_output, make, prep, wait_until, wait_until_gone
from tests.tools.sharding.units import die_at_three, double, fail_at_three, fail_in_code, is_running
from tools.sharding.workers import _hold_signals, run_units_on_ray

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install ray"),
]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def variables():
    """Ray reads most of these once in the life of a process: a token for all Rays here,."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two CPUs in processes of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="ray-")  # short: it holds sockets
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    options = [f"--port={port}", "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}"]
    options += ["--node-ip-address=127.0.0.1", f"--object-store-memory={128 << 20}"]
    variables = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
        "PYTHONUNBUFFERED": "1",
    }
    head = subprocess.Popen(
        [*command, *options],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        if not any("Ray runtime started" in line for line in head.stdout):
            pytest.fail("the Ray cluster has not started")
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.communicate(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.communicate()
        shutil.rmtree(folder, ignore_errors=True)


def work_for_long(folder, report):
    (Path(folder) / f"{os.getpid()}.pid").touch()
    report(os.getpid())
    time.sleep(1000)


def run(function, units, cluster, **options):
    results, updates = [], []
    options = {"num_tasks": 2, "on_result": results.append, "on_progress": updates.append, **options}
    run_units_on_ray(function, units, address=cluster, **options)
    return results, updates


@pytest.mark.parametrize("num_tasks", [1, 2, None])
def test_every_unit_is_done_once_and_its_progress_arrives(cluster, num_tasks):
    results, updates = run(double, range(8), cluster, num_tasks=num_tasks)
    assert sorted(results) == [(unit, 2 * unit) for unit in range(8)]
    assert len(updates) == sum(range(8)) and os.getpid() not in {pid for pid, _ in updates}


def test_no_units_are_no_work_and_need_no_cluster():
    assert run(double, [], "127.0.0.1:1") == ([], [])


def test_no_more_units_are_taken_than_can_be_at_work(cluster):
    taken, done = [], []

    def hand_out():
        for unit in range(8):
            taken.append(unit)
            assert len(taken) - len(done) <= 2
            yield unit

    run(double, hand_out(), cluster, on_result=done.append)
    assert len(done) == 8


def test_a_worker_that_is_killed_is_one_error_and_not_a_hang(cluster):
    with pytest.raises(UserError, match=r"^3: its Ray worker died .*run the same command again") as caught:
        run(die_at_three, range(5), cluster)
    assert "\n" not in str(caught.value)


def test_a_failed_system_call_in_a_task_is_raised_here_with_its_file(cluster):
    with pytest.raises(OSError) as caught:
        run(fail_at_three, range(5), cluster)
    assert (caught.value.errno, caught.value.filename) == (28, "/the/file")


def test_a_defect_in_a_task_is_raised_here_with_its_traceback(cluster):
    with pytest.raises(KeyError) as caught:
        run(fail_in_code, ["unit"], cluster)
    assert "in fail_in_code" in "".join(caught.value.__notes__)


def test_an_exception_in_the_driver_ends_the_tasks(cluster, tmp_path):
    def stop(_pid):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(work_for_long, [str(tmp_path)] * 2, cluster, on_progress=stop)
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert pids
    wait_until(lambda: not any(is_running(pid) for pid in pids), "end of the tasks", 30)


def test_signals_wait_for_a_moment_at_which_they_may_raise_but_not_the_second():
    class Stop(BaseException):
        pass

    def handler(_number, _frame):
        raise Stop

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(Stop), _hold_signals() as heed:
            heed()
            signal.raise_signal(signal.SIGTERM)
            heed()
        with pytest.raises(Stop), _hold_signals():
            signal.raise_signal(signal.SIGTERM)
            held = True
        assert held and signal.getsignal(signal.SIGTERM) is handler
        with pytest.raises(Stop), _hold_signals():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("the second signal did not raise")
    finally:
        signal.signal(signal.SIGTERM, before)


def test_our_handler_of_sigterm_stays_in_place(cluster):
    def handler(_number, _frame):
        pass

    before = signal.signal(signal.SIGTERM, handler)
    try:
        run(double, [1], cluster)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_cluster_that_is_not_there_is_an_error_that_names_it():
    with pytest.raises(UserError, match=r"^Ray at '127.0.0.1:1' cannot be used .*check --ray-address"):
        run(double, [1], "127.0.0.1:1")


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--engine ray needs the package ray .*pip install 'alexnet-dali\[ray\]'"):
        run(double, [1], None)


# Shards


def test_shards_made_on_ray_are_those_of_local_processes_failures_too(cluster, tree, tmp_path):
    (tree / "train/cat/cat_3.png").write_bytes(BROKEN)
    local = make(tree, tmp_path / "local")
    on_ray = make(tree, tmp_path / "ray", engine="ray", ray_address=cluster)
    assert hash_output(on_ray.out) == hash_output(local.out)
    assert (on_ray.images, on_ray.num_failures, on_ray.num_prepared) == (local.images, 1, 16)
    assert not list(on_ray.out.glob(".*"))
    with pytest.raises(UserError, match=r"1 of 16 images cannot be used, limit 0"):
        make(tree, tmp_path / "strict", engine="ray", ray_address=cluster, max_failures="0")


def test_a_job_whose_ray_worker_was_killed_goes_on_on_ray_or_without(cluster, synth_tree, shard_dir, tmp_path):
    out = tmp_path / "out"
    command = [str(PREP), "shard", str(synth_tree), "--out", str(out), "--samples-per-shard", "16"]
    on_ray = ["--engine", "ray", "--ray-address", cluster, "--workers", "1"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, *on_ray], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until(lambda: list(out.glob("*-*.json")) or process.poll() is not None, "the first record", 120)
        temporary = wait_until(lambda: next(iter(out.glob(".*.tar.*.tmp*")), None), "a shard being written")
        os.kill(int(temporary.name.rpartition("tmp")[2]), signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=120)
    errors = [line for line in stderr.splitlines() if not line.startswith("shard: ")]
    assert (process.returncode, stdout, len(errors)) == (1, "", 1), stderr
    assert "its Ray worker died" in errors[0] and not (out / "manifest.json").exists()
    assert not list(out.glob(".*"))
    done = prep(*command[1:], "--json")
    assert json.loads(done.stdout)["num_kept_shards"] >= 1 and hash_output(out) == hash_output(shard_dir)


def test_the_command_starts_a_ray_of_its_own_says_nothing_of_it_and_leaves_nothing_running(
    synth_tree, shard_dir, tmp_path
):
    out = tmp_path / "out"
    arguments = ("--samples-per-shard", 16, "--engine", "ray", "--workers", 2)
    command = [str(PREP), "shard", str(synth_tree), "--out", str(out), *map(str, arguments)]
    home = tmp_path / "home"
    home.mkdir()
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("ALEXNET_", "RAY_"))} | {"HOME": str(home)}
    with subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert [line for line in stderr.splitlines() if not line.startswith("shard: ")] == []
    assert "ray" not in stdout.lower().replace(str(tmp_path).lower(), "")
    wait_until_gone(process.pid)
    assert hash_output(out) == hash_output(shard_dir) and list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "status", "words"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_an_interrupted_run_on_ray_says_so_in_a_word_and_leaves_nothing_running(
    synth_tree, tmp_path, number, status, words
):
    out = tmp_path / "out"
    command = [str(PREP), "shard", str(synth_tree), "--out", str(out), "--samples-per-shard", "8", "--engine", "ray"]
    with subprocess.Popen(
        [*command, "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background would ignore it
    ) as process:
        wait_until(lambda: list(out.glob("*-*.json")) or process.poll() is not None, "the first record", 120)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        try:
            stdout, stderr = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    said = [line for line in stderr.splitlines() if line and not line.startswith("shard: ")]
    assert (process.returncode, stdout, said) == (status, "", [words])
    wait_until_gone(process.pid)
    assert not list(out.glob(".*")) and not (out / "manifest.json").exists()


def test_ray_is_told_not_to_report_to_its_makers():
    program = (
        "import contextlib\n"
        "from tools.sharding.workers import run_units_on_ray\n"
        "from pipeline.common.errors import UserError\n"
        "with contextlib.suppress(UserError):\n"
        "    run_units_on_ray(print, [1], num_tasks=1, address='127.0.0.1:1', on_result=print, on_progress=print)\n"
        "from ray._common.usage import usage_lib\n"
        "print(usage_lib.usage_stats_enabled())"
    )
    variables = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["False"]


def test_code_that_the_cluster_does_not_have_is_said_to_be_missing(cluster, tmp_path, monkeypatch):
    (tmp_path / "module_of_the_driver_alone.py").write_text("def function(unit, report): return unit")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("module_of_the_driver_alone")
    with pytest.raises(UserError, match=r"No module named 'module_of_the_driver_alone'.*same version on each of its"):
        run(module.function, ["unit"], cluster)


def test_an_address_without_the_engine_is_refused(synth_tree, tmp_path):
    done = prep("shard", synth_tree, "--out", tmp_path / "out", "--ray-address", "auto", status=1)
    assert "goes with --engine ray, got --engine local" in done.stderr and not (tmp_path / "out").exists()
