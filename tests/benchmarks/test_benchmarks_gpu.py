"""benchmarks/gpu.py with the CPU standing in: every part runs, and its check of batches can fail."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.colors import ColorStats
from pipeline.loader import TrainLoader
from pipeline.options import Transform
from pipeline.shards import ShardSet
from tests.pipeline.loader.loading import make_raw

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(*arguments, status=0):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == status, done.stderr
    return done


@pytest.mark.slow
def test_every_part_runs_on_the_cpu_and_its_batches_are_the_cpus(ready_shards, tmp_path):
    raw, report = make_raw(ready_shards, tmp_path / "raw"), tmp_path / "gpu.json"
    shown = run_script(
        ready_shards, "--raw", raw, "--device", "cpu", "--quick", "--recipe", "demo", "--threads", 1, "--json", report
    ).stdout
    document = json.loads(report.read_text())
    checked = {row["way"]: row for row in document["check"]}
    assert set(checked) == {"mixed", "cpu", "hybrid", "raw"}
    for name, row in checked.items():  # "mixed" is DALI's stock operators here
        assert row["ok"] and row["same_samples_and_draws"]
        assert row["largest_difference"] <= (1e-3 if name in ("mixed", "hybrid") else 0)
    assert {row["way"] for row in document["feed"]} >= {
        "mixed, float32",
        "hybrid, float32",
        "hybrid, host 0.25, float32",
        "raw, float32",
        "raw, float16",
    }
    shares = {row["way"]: row["host_share"] for row in document["feed"]}
    assert shares["cpu, float32"] == 1 and shares["mixed, float32"] == 0 and shares["hybrid, float32"] == 0.5
    assert [row["way"] for row in document["train"]] == ["no feeding", "mixed", "cpu", "hybrid", "raw"]
    assert [row["way"] for row in document["cost"]] == ["no feeding", "cpu", "mixed"]
    for row in [*document["feed"], *document["train"], *document["cost"]]:
        assert 0 < row["lowest"] <= row["images_per_s"] <= row["highest"]
    assert all(row["step_ms"] > 0 for row in document["cost"]) and document["cost"][0]["cost_percent"] == 0
    assert [row["way"] for row in document["step"]] == ["float32", "float32, no LRN", "bf16", "bf16, no LRN"]
    assert [row["lrn_percent"] == 0 for row in document["step"]] == [False, True, False, True]
    assert all(row["of_products_percent"] > 0 for row in document["step"])
    assert "the CPU (standing in)" in shown and document["environment"]["dali"]


def test_without_a_gpu_the_script_says_what_to_do(ready_shards):
    if os.environ.get("CUDA_VISIBLE_DEVICES") is None and importlib.import_module("torch").cuda.is_available():
        pytest.skip("a CUDA GPU is visible")
    assert "no CUDA GPU is visible; use --device cpu --quick" in run_script(ready_shards, status=1).stderr


def test_batches_of_other_draws_fail_the_check(script, ready_shards, monkeypatch, capsys):
    """A loader of another seed stands for a GPU that draws differently."""
    shards = ShardSet.open(ready_shards)
    colors = ColorStats.load(shards.root, shards.fingerprint)
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(ready_shards), "--device", "cpu", "--quick", "--parts", "check"])
    make = script.Bench.make_loader

    def differ(self, name, **options):
        if name != "mixed":
            return make(self, name, **options)
        return TrainLoader(shards, colors, Transform(layout="NHWC"), global_batch_size=8, seed=2)

    monkeypatch.setattr(script.Bench, "make_loader", differ)
    assert script.main() == 1
    assert "NO" in capsys.readouterr().out


def test_the_cache_of_a_gpu_has_room_for_every_training_image(script, ready_shards, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(ready_shards), "--device", "cpu", "--quick"])
    bench = script.Bench(script.parse_arguments())
    assert set(bench.ways(script.CHECKED)) == {"mixed", "cpu", "hybrid"}
    bench.options.device = "gpu"
    assert bench.ways(("cache",))["cache"]["cache_gib"] * 2**30 >= 64 * 256 * 256 * 3
