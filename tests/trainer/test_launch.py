"""What is said and done when ranks cannot start, differ, die or are stopped: real processes, however started.

A rank's death has to end the job within 30 s: that is the limit given to each wait below.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from pipeline.common.errors import UserError
from trainer import distributed
from trainer import launch as slurm
from trainer.commands.options import check_divisible
from trainer.distributed import Ranks, choose_device, is_peer_loss, join
from trainer.recipe import RECIPES

ROOT = Path(__file__).resolve().parents[2]
END_S, START_S = 30, 120
# as in a terminal; a suite started by nohup, or in the background, ignores them, and so would its children
HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}

# Ranks that fail in the way their first argument names, under the launcher of `alexnet-train --gpus`.
PROGRAM = """
import atexit, os, signal, sys, time
import click, torch
from pipeline.common import console
from pipeline.common.errors import UserError
from trainer.distributed import check_alike, gather, join, reduce_sum, restart_count
from trainer.safety import StopRequest
from trainer.launch import launch, run_as_rank

def fail(how):
    with join(False) as ranks:
        reduce_sum(torch.zeros(1), ranks)
        last = ranks.rank == ranks.world_size - 1
        if ranks.is_first:
            print("all have met", flush=True)
        if how == "late":
            atexit.register(os.kill, os.getpid(), signal.SIGTERM)
        if how == "once" and restart_count():
            print(f"restarted as {restart_count()}", flush=True)
            return 0
        if last and how in ("raise", "once"):
            raise ValueError("this rank fails")
        if last and how == "user":
            raise UserError("a thing: got this, expected that; do so")
        if last and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stuck":  # the other ranks neither fail nor hear the signal, as in a GPU's kernel
            if last:
                raise ValueError("this rank fails")
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.pause()
        if how == "shards":
            check_alike({"shards": "1234" if last else "5678"}, ranks)
        if how in ("signal", "deaf"):
            with StopRequest(ranks) as stop:
                reduce_sum(torch.zeros(1), ranks)
                if ranks.is_first:
                    print("all listen", flush=True)
                while how == "deaf" or not stop.status():
                    time.sleep(0.01)
                print(f"rank {ranks.rank} saves", flush=True)
                return stop.status()
        reduce_sum(torch.zeros(1), ranks)  # waits for the one that is gone
    return 0

@click.command()
@click.argument("how")
@click.option("--max-restarts", default=0)
def command(how, max_restarts):
    if "RANK" in os.environ:
        return run_as_rank(fail, how)
    return launch(fail, (how,), 2, max_restarts)

if __name__ == "__main__":
    console.run(command)
"""


@pytest.fixture
def program(tmp_path) -> Path:
    path = tmp_path / "ranks.py"
    path.write_text(PROGRAM)
    return path


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ALEXNET_", "TORCHELASTIC_", "SLURM_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **changes}


def start(*words: object, **changes: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: [signal.signal(n, h) for n, h in HANDLERS.items()],
    )


def wait_for(process: subprocess.Popen, line: str) -> None:
    for said in process.stdout:
        if line in said:
            return
    pytest.fail(f"ended without saying {line!r}: {process.stderr.read()}")


def finish(process: subprocess.Popen, status: int, timeout_s: float = END_S) -> tuple[str, str]:
    """(stdout, stderr), once it has ended as it should; whatever is left of it is ended."""
    try:
        out, errors = process.communicate(timeout=timeout_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == status, errors
    return out, errors


def test_the_rank_that_raises_shows_its_traceback_once_and_takes_the_job_down(program):
    process = start(program, "raise")
    wait_for(process, "all have met")
    _, errors = finish(process, 1)
    assert errors.count("Traceback") == 1 and errors.count("ValueError: this rank fails") == 2, errors
    assert "error: rank 1 failed: ValueError: this rank fails" in errors
    assert "elastic" not in errors and "Root Cause" not in errors, errors


@pytest.mark.slow
def test_a_users_error_in_a_rank_is_one_line(program):
    process = start(program, "user", "--max-restarts", 3)
    wait_for(process, "all have met")
    _, errors = finish(process, 1)
    lines = [line for line in errors.splitlines() if "stops: another rank is gone" not in line]
    assert lines == ["error: rank 1: a thing: got this, expected that; do so"]  # and it was not started again


def test_a_rank_that_is_killed_is_named_with_the_signal(program):
    process = start(program, "kill")
    wait_for(process, "all have met")
    _, errors = finish(process, 1)
    assert "rank 1 was killed by SIGKILL" in errors.splitlines()[-1] and "--resume" in errors.splitlines()[-1], errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_rank_that_neither_fails_nor_hears_signals_is_ended_with_the_job(program):
    process = start(program, "stuck")
    wait_for(process, "all have met")
    _, errors = finish(process, 1)
    assert "error: rank 1 failed: ValueError" in errors


@pytest.mark.slow
def test_a_job_whose_rank_died_is_started_again_when_asked(program):
    process = start(program, "once", "--max-restarts", 2)
    wait_for(process, "all have met")
    out, errors = finish(process, 0, START_S)
    assert "restarted as 1" in out and "rank 1 failed: restart 1 of 2, from the last checkpoint" in errors


@pytest.mark.parametrize("to_all", [False, True], ids=["to the launcher", "to all, as a terminal does"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_lets_every_rank_save(program, number, status, to_all):
    process = start(program, "signal")
    wait_for(process, "all listen")
    (os.killpg if to_all else os.kill)(process.pid, number)
    out, errors = finish(process, status)
    assert out.count("saves") == 2 and "Traceback" not in errors, errors
    assert errors.count("the ranks save and leave; a second one ends them at once") == 1, errors


def test_a_signal_to_ranks_that_have_returned_changes_nothing(program):
    process = start(program, "late")
    wait_for(process, "all have met")
    _, errors = finish(process, 0)
    assert errors == ""


def test_a_second_signal_ends_ranks_that_do_not_stop(program):
    process = start(program, "deaf")
    wait_for(process, "all listen")
    process.send_signal(signal.SIGINT)
    said = process.stderr.readline()
    assert "a second one ends them at once" in said
    process.send_signal(signal.SIGINT)
    _, errors = finish(process, 130)
    assert "Traceback" not in errors, errors


def test_ranks_with_different_shards_are_told_apart_in_one_line(program):
    process = start(program, "shards")
    wait_for(process, "all have met")
    _, errors = finish(process, 1)
    assert errors.count("ranks differ in shards: rank 0 has 5678, rank 1 has 1234") == 1 and "Traceback" not in errors


def test_a_port_in_use_is_told_with_the_remedy(program):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process = start(program, "raise", RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        _, errors = finish(process, 1, START_S)
    assert f"127.0.0.1:{port}: the port is in use; choose another with MASTER_PORT" in errors.splitlines()[-1]


@pytest.mark.slow
def test_ranks_with_different_code_are_told_apart(program, tmp_path):
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for package in ("pipeline", "trainer"):
        subprocess.run(["cp", "-r", str(ROOT / package), str(copy)], check=True)
    with (copy / "trainer" / "optim.py").open("a") as file:
        file.write("\n# another version\n")
    port = str(free_port())
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    one = start(program, "shards", RANK="0", **common)
    other = start(program, "shards", RANK="1", **{**common, "PYTHONPATH": str(copy)})
    said = finish(one, 1, START_S)[1] + finish(other, 1, START_S)[1]
    assert said.count("ranks differ in the code of alexnet-dali (SHA-256): rank 0 has ") == 1, said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_under_torchrun_too_a_job_whose_rank_died_is_started_again(program):
    words = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--max-restarts", 1, "--rdzv-backend", "c10d"]
    process = start(*words, "--rdzv-endpoint", "localhost:0", program, "once")
    wait_for(process, "all have met")
    wait_for(process, "restarted as 1")
    finish(process, 0, START_S)


@pytest.mark.slow
def test_two_nodes_on_loopback_under_torchrun_meet_and_fail_together(program):
    words = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "two-nodes", program, "raise"]
    nodes = [start(*words) for _ in range(2)]
    said = [finish(node, 1, START_S) for node in nodes]
    assert "".join(out for out, _ in said).count("all have met") == 1
    assert "".join(errors for _, errors in said).count("error: rank 1 failed: ValueError: this rank fails") == 1


@pytest.mark.slow
def test_two_tasks_of_a_step_of_slurm_meet(program):
    port = str(free_port())
    step = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_LOCALID": "0",
        "MASTER_PORT": port,
    }
    source = program.read_text().replace(
        '    if "RANK" in os.environ:',
        '    from trainer import launch as slurm\n    slurm.adopt(os.environ)\n    if "RANK" in os.environ:',
    )
    program.write_text(source)
    tasks = [start(program, "user", **step, SLURM_PROCID=str(n), SLURM_NODEID=str(n)) for n in range(2)]
    said = [finish(task, status, START_S) for task, status in zip(tasks, (75, 1), strict=True)]
    assert "all have met" in said[0][0] and "error: rank 1: a thing" in said[1][1]


def test_slurms_variables_become_torchs():
    step = {
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
        "SLURM_STEP_NODELIST": "gpu[03-04,09]-ib,big",
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "1",
        "SLURM_PROCID": "4",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "2",
    }
    expected = {
        "RANK": "4",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "gpu03-ib",
        "MASTER_PORT": str(20000 + 77 * 31 + 1),
    }
    adopted = dict(step)
    slurm.adopt(adopted)
    assert adopted == {**step, **expected}
    chosen = {**step, "MASTER_ADDR": "here", "MASTER_PORT": "5"}
    slurm.adopt(chosen)
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("here", "5")


@pytest.mark.parametrize(
    "alone",
    [
        {},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"RANK": "0", "SLURM_STEP_NUM_TASKS": "2"},
    ],
    ids=["no Slurm", "a batch script", "a step of one", "torchrun inside"],
)
def test_nothing_is_taken_from_slurm_that_is_not_a_step_of_several_tasks(alone):
    environment = dict(alone)
    slurm.adopt(environment)
    assert environment == alone


def test_an_environment_that_cannot_be_slurms_is_an_error():
    with pytest.raises(UserError, match=r"Slurm's environment is not understood .*SLURM_PROCID"):
        slurm.adopt({"SLURM_STEP_NUM_TASKS": "2"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("one", "one"),
        ("a1,b2", "a1"),
        ("gpu[1-3]", "gpu1"),
        ("n[007,9]", "n007"),
        ("x-[2]-y,z", "x-2-y"),
        ("[3-4]", "3"),
    ],
)
def test_the_first_host_of_slurms_lists(nodes, first):
    assert slurm.first_host(nodes) == first


def test_a_rank_without_a_gpu_is_told_how_many_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="local rank 1 has no GPU: 1 visible; start at most 1"):
        choose_device(1, True)
    monkeypatch.setenv("SLURM_PROCID", "1")  # srun shows each task its own
    assert choose_device(1, True) == torch.device("cuda", 0)
    assert choose_device(1, False) == torch.device("cpu")


def test_a_torch_without_nccl_is_told_before_the_ranks_meet(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="has no NCCL, by which 2 GPUs reduce; install a CUDA build"), join(True):
        pass


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_never_comes_is_told_in_one_line(rank, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_MEETING", timedelta(seconds=1))
    with pytest.raises(UserError, match=f"127.0.0.1:{port}: not all of the 2 ranks have come within 1 s"), join(False):
        pass


def test_two_ranks_on_one_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Properties", (), {"uuid": "GPU-1"}))
    monkeypatch.setattr(distributed, "gather", lambda value, _: [value, value])
    with pytest.raises(UserError, match="ranks 0 and 1 have the same GPU"):
        distributed._check_devices(Ranks(0, 2, torch.device("cuda", 0)))


def test_a_batch_that_cannot_be_divided_is_told_with_the_next_that_can():
    with pytest.raises(Exception, match=r"128 cannot be divided among 3 GPUs; use 126"):
        check_divisible(RECIPES["paper"], 3)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("NCCL error: remote process exited"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("connection closed by peer"), False),
    ],
)
def test_only_the_loss_of_a_peer_passes_for_one(error, expected):
    assert is_peer_loss(error) is expected
