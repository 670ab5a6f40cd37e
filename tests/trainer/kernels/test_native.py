"""What the compiled functions leave to torch, and the memory that a process keeps."""

import subprocess
import sys

import pytest
import torch

from pipeline.operators import compile as compiling
from trainer import step as learner
from trainer.distributed import Ranks
from trainer.kernels import native
from trainer.kernels.native import Native, Norm, load_native
from trainer.recipe import RECIPES, override
from trainer.step import Learner

PAPER = Norm(2.0, 5, 1e-4, 0.75)
COUNT_FAULTS = """
import resource, torch
from trainer.kernels.native import keep_freed_memory
def count():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(1 << 24).fill_(1.0)  # 64 MiB: more than glibc would keep
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = [count() for _ in range(3)]
assert keep_freed_memory()
for _ in range(20):
    count()  # the first few leave gaps
print(given_back[-1], count())
"""

COUNT_RESIDENT = """
import torch
from pathlib import Path
from trainer.kernels.native import keep_freed_memory, release_freed_memory
def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) // 256
assert keep_freed_memory()
before = resident_mib()
block = torch.empty(1 << 26).fill_(1.0)
rest = torch.empty(1024).fill_(1.0)  # behind it
del block
kept = resident_mib()
assert release_freed_memory()
print(before, kept, resident_mib())
"""


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_without_a_working_c_compiler_there_are_no_compiled_functions(monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    assert load_native.__wrapped__() is None


def test_a_compiler_is_waited_for_however_long_a_process_was_frozen_meanwhile(monkeypatch):
    if load_native() is None:
        pytest.skip("no C compiler")
    compile_now = compiling.subprocess.run

    def compile_late(*words, timeout=None, **named):
        if timeout is not None:
            raise subprocess.TimeoutExpired("cc", timeout)
        return compile_now(*words, **named)

    monkeypatch.setattr(compiling.subprocess, "run", compile_late)
    assert load_native.__wrapped__() is not None


def test_only_what_the_c_file_can_do_is_given_to_it():
    rows = torch.zeros(3, 48)
    assert Native.can_normalise(rows, PAPER) and Native.can_normalise(rows.bfloat16(), PAPER)
    for other in (rows.double(), rows.half(), torch.zeros(1, 4096), torch.empty(3, 48, device="meta")):
        assert not Native.can_normalise(other, PAPER)
    assert not Native.can_normalise(rows, PAPER._replace(beta=0.5))
    assert not Native.can_normalise(rows, PAPER._replace(n=19))


def test_the_largest_rows_and_windows_fit_their_buffers():
    """The widest row there may be, with the longest window: nothing is written beside it."""
    library = load_native()
    if library is None:
        pytest.skip("no C compiler")
    norm = PAPER._replace(n=native._MOST_N, scale=0.1)
    for num_maps in (1, 2, 9, native._MOST_MAPS):
        rows = torch.randn(5, num_maps)
        assert Native.can_normalise(rows, norm)
        windows = torch.nn.functional.pad(rows**2, (8, 8)).unfold(1, 17, 1).sum(2)
        torch.testing.assert_close(library.lrn_forward(rows, norm), rows / (2.0 + 0.1 * windows) ** 0.75)
        gradient = library.lrn_backward(rows, torch.ones_like(rows), norm)
        leaf = rows.clone().requires_grad_()
        windows = torch.nn.functional.pad(leaf**2, (8, 8)).unfold(1, 17, 1).sum(2)
        (leaf / (2.0 + 0.1 * windows) ** 0.75).sum().backward()
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-5)


def test_freed_memory_is_used_again_without_asking_the_system():
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < 10 < 1000 < given_back


def test_what_was_kept_is_given_back_when_asked():
    done = subprocess.run([sys.executable, "-c", COUNT_RESIDENT], capture_output=True, text=True, check=True)
    before, kept, left = map(int, done.stdout.split())
    assert kept - before > 250 and left - before < 30  # of a block of 256 MiB


def test_a_learner_gives_back_once_a_minute_at_the_most(monkeypatch):
    times, given = iter([0.0, 59.0, 61.0, 61.0, 100.0, 130.0, 130.0]), []
    monkeypatch.setattr(learner.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(learner, "release_freed_memory", lambda: given.append(True))
    trained = Learner(override(RECIPES["demo"], ["width=0.0625"]), 4, Ranks(0, 1, torch.device("cpu")))
    counts = []
    for _ in range(4):
        trained.rest()
        counts.append(len(given))
    assert counts == [0, 1, 1, 2]
