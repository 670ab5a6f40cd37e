"""benchmarks/ablate.py: each flag is one effect, runs are made once, and the intervals hold what they promise."""

import argparse
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.common.errors import UserError
from trainer.recipe import RECIPES, override

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["--recipe", "demo", "--epochs", "1", "--set", "width=0.0625", "--set", "global_batch_size=16"]


@pytest.fixture
def ablate(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ablate

    return ablate


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ablate_table

    return ablate_table


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "ablate.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def ablation(ready_shards, tmp_path_factory):
    """A base and one effect, trained for an epoch: (folder, what was printed)."""
    out = tmp_path_factory.mktemp("ablation")
    done = run_script(ready_shards, "--out", out, *SETTINGS, "--only", "no-dropout")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_every_effect_changes_the_fields_it_names_and_no_other(ablate):
    named = {
        "base": {},
        "no-lrn": {"lrn": False},
        "pool-2x2": {"overlapping_pool": False},
        "tanh": {"activation": "tanh"},
        "no-dropout": {"dropout": 0.0},
        "no-colour": {"lighting": None},
        "no-crop-flip": {"crop": False, "flip": False},
        "no-decay": {"weight_decay": 0.0},
        "one-tower": {"num_towers": 1},
    }
    assert [effect.name for effect in ablate.EFFECTS] == list(named)
    for effect in ablate.EFFECTS:
        base, changed = RECIPES["small"], override(RECIPES["small"], effect.settings)
        different = {
            f.name: getattr(changed, f.name) for f in fields(base) if getattr(changed, f.name) != getattr(base, f.name)
        }
        assert different == named[effect.name]


@pytest.mark.slow
def test_the_table_has_the_errors_that_alexnet_eval_counts(ablation, ready_shards):
    from pipeline.shards import ShardSet
    from trainer.distributed import Ranks
    from trainer.nets.ensemble import evaluate_nets, summarise
    from trainer.nets.weights import load_run

    shards, alone = ShardSet.open(ready_shards), Ranks(0, 1, torch.device("cpu"))
    out, text = ablation
    rows = {row["effect"]["name"]: row for row in json.loads((out / "ablation.json").read_text())["rows"]}
    for name in ("base", "no-dropout"):
        errors, _, _ = evaluate_nets([load_run(out / f"{name}-s0", "last", shards)], shards, alone)
        found = summarise(errors[0])
        assert rows[name]["error"] == pytest.approx(found["top1_error"])
        assert rows[name]["ten_crop_error"] == pytest.approx(found["ten_crop_top1_error"])
        assert rows[name]["num_images"] == 24
    assert f"| {rows['base']['error']:.1f} ± " in text
    assert text.strip() == (out / "ablation.md").read_text().strip()
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_the_switch_reaches_the_run_and_the_other_settings_too(ablation):
    out, _ = ablation
    for name, dropout in (("base", RECIPES["demo"].dropout), ("no-dropout", 0.0)):
        recipe = json.loads((out / f"{name}-s0" / "config.json").read_text())["recipe"]
        assert (recipe["dropout"], recipe["width"], recipe["epochs"]) == (dropout, 0.0625, 1)


def test_finished_runs_are_not_made_again(ablation, ready_shards):
    out, text = ablation
    checkpoint = out / "base-s0" / "checkpoints" / "last.pt"
    before = checkpoint.stat().st_mtime_ns
    again = run_script(ready_shards, "--out", out, *SETTINGS, "--only", "no-dropout")
    assert (again.returncode, again.stdout) == (0, text)
    assert "run 1" not in again.stderr and checkpoint.stat().st_mtime_ns == before


def test_a_folder_with_runs_of_other_settings_is_refused(ablate, ablation, ready_shards):
    from pipeline.shards import ShardSet

    settings = ["width=0.0625", "global_batch_size=16"]
    for extra, message in (([], None), (["lr=0.1"], r"base-s0: holds a run of another recipe; choose another --out")):
        wanted = argparse.Namespace(epochs=1, settings=settings + extra, recipe="demo", seeds=1, out=str(ablation[0]))
        run = ablate.plan(wanted, ablate.choose("base"))[0]
        with pytest.raises(UserError, match=message) if message else nullcontext():
            ablate.check(run, ShardSet.open(ready_shards))


def test_effects_are_chosen_by_name_with_base_always_and_an_unknown_one_is_refused(ablate):
    assert [effect.name for effect in ablate.choose("tanh,no-lrn")] == ["base", "no-lrn", "tanh"]
    assert ablate.choose(None) == list(ablate.EFFECTS)
    with pytest.raises(UserError, match="--only no-gpu: no such effect; expected some of base, no-lrn"):
        ablate.choose("tanh,no-gpu")


def test_the_training_error_is_that_of_the_last_epoch_weighted_by_steps(ablate):
    records = [(20, 1, 90.0), (40, 1, 80.0), (47, 1, 70.0), (67, 2, 60.0), (94, 2, 30.0)]
    metrics = [{"kind": "train", "step": step, "epoch": epoch, "top1_error": error} for step, epoch, error in records]
    assert ablate.final_training_error(metrics) == pytest.approx((20 * 60 + 27 * 30) / 47)


def test_with_one_seed_the_interval_is_that_of_paired_differences(table):
    wrong, base = np.array([[0, 0, 100, 100, 100, 0.0]]), np.array([[0, 100, 0, 0, 100, 0.0]])
    differences = np.array([0, -100, 100, 100, 0, 0])
    expected = 1.959964 * differences.std(ddof=1) / np.sqrt(6)
    assert table.half_interval(wrong, base, 0.0, 0) == pytest.approx(expected)
    assert table.half_interval(base, base, 0.0, 0) == 0.0


def test_the_variance_of_runs_is_pooled_about_each_variants_own_mean(table):
    assert table.pooled_variance([[1.0, 3.0], [10.0, 10.0, 13.0]]) == pytest.approx((8 / 3, 3))
    assert table.pooled_variance([[1.0], [5.0]]) == (0.0, 0)


def test_intervals_hold_a_true_difference_of_nothing_in_19_of_20_cases_or_more(table):
    """Variants that differ in nothing but the run: images of different difficulty, runs of different luck."""
    rng, effects = np.random.default_rng(0), [FakeEffect("base"), FakeEffect("other")]
    held = []
    for _ in range(300):
        difficulty = rng.normal(-0.5, 1.5, 341)
        results = {}
        for effect in effects:
            results[effect.name] = {}
            for seed in range(4):
                wrong = (difficulty + rng.normal(0, 0.2) + rng.normal(0, 0.7, 341) > 0).astype(int).tolist()
                results[effect.name][seed] = {"centre": wrong, "ten": wrong, "training_error": 0.0}
        held.append(not table.compare(effects, results)[1].is_significant)
    assert np.mean(held) >= 0.93
    assert np.mean(held) < 1.0


class FakeEffect:
    def __init__(self, name, paper_points=None):
        self.name, self.what, self.settings = name, f"what {name} is", ("lrn=false",) * (name != "base")
        self.paper, self.paper_points = "+1.4 (3.3)", paper_points


def results_of(base_wrong, other_wrong, num=200):
    def run(number):
        wrong = [1] * number + [0] * (num - number)
        return {0: {"centre": wrong, "ten": wrong, "training_error": 12.0}}

    return {"base": run(base_wrong), "other": run(other_wrong)}


@pytest.mark.parametrize(
    ("other_wrong", "paper_points", "reading"),
    [
        (50, None, "not significant"),
        (80, None, "worse without"),
        (30, None, "better without"),
        (80, 14.0, "worse without; the paper's is within"),
        (80, 1.4, "worse without; the paper's is outside"),
        (51, 0.4, "not significant; the paper's is within"),
    ],
)
def test_the_table_says_what_the_interval_allows(table, other_wrong, paper_points, reading):
    rows = table.compare([FakeEffect("base"), FakeEffect("other", paper_points)], results_of(50, other_wrong))
    assert rows[1].difference == pytest.approx((other_wrong - 50) / 2)
    text = table.format_table(rows, ["a note"])
    assert f"| {rows[1].difference:+.1f} ± {rows[1].plus_minus:.1f} | +1.4 (3.3) | {reading} |" in text
    assert "with one seed, how much a run varies by itself is not known" in text and text.endswith("a note")


def test_the_plot_shows_every_difference_with_its_interval_filled_where_significant(table):
    rows = table.compare([FakeEffect("base"), FakeEffect("other", 1.4)], results_of(50, 80))
    axes = table.differences_figure(rows).axes[0]
    (bar,) = axes.containers
    assert bar[0].get_xdata() == pytest.approx([15.0])
    (segment,) = bar[2][0].get_segments()
    assert segment[:, 0] == pytest.approx([15.0 - rows[1].plus_minus, 15.0 + rows[1].plus_minus])
    assert bar[0].get_markerfacecolor() != "white"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["what other is"]
