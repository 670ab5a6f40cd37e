"""The pool of processes: everything comes back once, and nothing that dies is waited for."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from tests.sharding import wait_until
from tests.tools.sharding.units import die_at_three, double, fail_at_three, fail_in_code, is_running, leave_at_three
from tools.sharding.workers import count_cpus, run_units


def wait_for_ever(unit, report):
    report(os.getpid())
    time.sleep(1000)


def run(function, units, **options):
    results, updates = [], []
    options = {"num_workers": 2, "on_result": results.append, "on_progress": updates.append, **options}
    run_units(function, units, **options)
    return results, updates


@pytest.mark.parametrize("num_workers", [1, 2, 3, 20])
def test_every_unit_is_done_once_and_its_progress_arrives(num_workers):
    results, updates = run(double, range(8), num_workers=num_workers)
    assert sorted(results) == [(unit, 2 * unit) for unit in range(8)]
    assert len(updates) == sum(range(8))
    assert len(Counter(pid for pid, _ in updates)) <= num_workers


def test_no_units_are_no_work():
    assert run(double, []) == ([], [])


def test_units_are_taken_as_they_are_needed():
    taken = []

    def hand_out():
        for unit in range(6):
            taken.append(unit)
            yield unit

    run_units(double, hand_out(), num_workers=1, on_result=lambda r: taken.append(f"done {r[0]}"), on_progress=id)
    assert taken.index("done 0") < taken.index(2)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_that_is_killed_is_an_error_and_not_a_hang(num_workers):
    with pytest.raises(UserError, match=r"3: its worker process was killed by SIGKILL.*fewer --workers"):
        run(die_at_three, range(5), num_workers=num_workers)


def test_a_worker_that_ends_by_itself_has_not_run_out_of_memory():
    with pytest.raises(UserError, match=r"3: its worker process ended with status 7, expected it to finish; run the"):
        run(leave_at_three, range(5))


def test_a_failed_system_call_in_a_worker_is_raised_here_with_its_file():
    with pytest.raises(OSError) as caught:
        run(fail_at_three, range(5))
    assert (caught.value.errno, caught.value.filename) == (28, "/the/file")


def test_a_defect_in_a_worker_is_raised_here_with_its_traceback():
    with pytest.raises(KeyError) as caught:
        run(fail_in_code, ["unit"])
    assert "in fail_in_code" in "".join(caught.value.__notes__)


def test_an_exception_in_the_parent_ends_the_workers():
    pids = []

    def stop(pid):
        pids.append(pid)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(wait_for_ever, range(2), on_progress=stop)
    assert pids and not any(is_running(pid) for pid in pids)


def test_workers_do_not_outlive_a_parent_that_is_killed(tmp_path):
    program = (
        "import sys, time, os\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[3])]!r}\n"
        "from tools.sharding.workers import run_units\n"
        "from test_workers import work_on\n"
        "if __name__ == '__main__':\n"
        f"    run_units(work_on, [{str(tmp_path)!r}] * 2, num_workers=2, on_result=print, on_progress=id)\n"
    )
    (tmp_path / "program.py").write_text(program)
    with subprocess.Popen([sys.executable, str(tmp_path / "program.py")]) as parent:
        wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2, "two workers at work")
        parent.kill()
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(pids) == 2
    wait_until(lambda: not any(is_running(pid) for pid in pids), "end of the workers")
    assert not any(is_running(pid) for pid in pids)


def work_on(folder, report):
    (Path(folder) / f"{os.getpid()}.pid").touch()
    while True:
        report("at work")
        time.sleep(0.01)


def tell_about_threads_and_signals(unit, report):
    import torch

    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []), torch.get_num_threads()


@pytest.mark.parametrize("preload", [(), ("torch",)], ids=["torch imported later", "torch preloaded"])
def test_workers_do_not_hear_ctrl_c_and_use_one_thread_each(tmp_path, preload):
    program = (
        "import sys\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[3])]!r}\n"
        "from tools.sharding.workers import run_units\n"
        "from test_workers import tell_about_threads_and_signals as tell\n"
        "if __name__ == '__main__':\n"
        f"    run_units(tell, [1, 2], num_workers=2, on_result=print, on_progress=id, preload={preload!r})\n"
    )
    (tmp_path / "program.py").write_text(program)
    variables = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["(True, 1)"] * 2


def test_cpus_are_those_that_may_be_used():
    assert count_cpus() == len(os.sched_getaffinity(0))
