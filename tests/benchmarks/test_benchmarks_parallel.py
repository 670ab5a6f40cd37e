"""benchmarks/parallel.py end to end on a narrow net: every table, and bytes that the loopback device confirms."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_benchmark_counts_what_the_shapes_say_and_the_loopback_device_carries(tmp_path):
    words = ["--width", "0.0625", "--global-batch-size", "8", "--rounds", "1", "--seconds", "0.5", "--out", "out.json"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "parallel.py"), *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["ranks"]
    assert {number: sorted(rows) for number, rows in found.items()} == {
        "2": ["columns", "data", "hybrid"],
        "4": ["data", "hybrid"],
    }
    for rows in found.values():
        for row in rows.values():
            assert row["sent_bytes"] == pytest.approx(row["predicted"], rel=1e-12)
            assert row["loopback_bytes"] >= row["sent_bytes_of_all_ranks"]  # other processes' bytes come on top
    assert all(row["images_per_s"]["images_per_s"] > 0 for row in found["2"].values())
    for title in ("2 ranks: sent by each rank", "4 ranks: sent", "images/s, median"):
        assert title in done.stdout
