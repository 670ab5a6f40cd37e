"""CPU time and memory over a tree of processes, children that still live included."""

import os
import subprocess
import sys

from trainer.bench.rates import cpu_time_s, list_tree, memory_bytes

WORK = """
import sys, time
held = bytearray(100 << 20)
held[::4096] = b"x" * len(held[::4096])
while time.process_time() < 0.3: pass
del held
print("done", flush=True)
sys.stdin.read()
"""


def test_a_living_child_counts_with_its_time_and_its_peak():
    before_s, before_bytes = cpu_time_s(list_tree()), memory_bytes(list_tree(), peak=True)
    child = subprocess.Popen([sys.executable, "-c", WORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"done\n"
        tree = list_tree()
        assert tree[0] == os.getpid() and child.pid in tree
        assert cpu_time_s(tree) - before_s >= 0.25
        assert memory_bytes(tree, peak=True) - before_bytes >= 100 << 20
        assert memory_bytes([child.pid]) < memory_bytes([child.pid], peak=True) - (90 << 20)  # it has given it back
    finally:
        child.communicate()
    assert child.pid not in list_tree()
    assert cpu_time_s(list_tree()) - before_s >= 0.25  # it has ended, its time is ours


def test_a_process_that_has_ended_counts_nothing():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert cpu_time_s([child.pid]) == 0 and memory_bytes([child.pid]) == 0
