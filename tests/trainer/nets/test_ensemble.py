"""Errors of nets and of their average against NumPy; each image once over any ranks; nets that do not go together."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pipeline.common.errors import UserError
from pipeline.shards import ShardSet
from tests import oracle
from tests.trainer.trained import DEMO, PAPER, make_run
from trainer.commands.nets import evaluate as command
from trainer.distributed import Ranks
from trainer.launch import launch
from trainer.model import AlexNet
from trainer.nets.ensemble import Job, check_belongs, evaluate_nets, read_sources, run_rank, summarise
from trainer.nets.tables import list_errors
from trainer.nets.weights import load_run

ALONE = Ranks(0, 1, torch.device("cpu"))
ERRORS = ("top1_error", "top5_error", "ten_crop_top1_error", "ten_crop_top5_error")


@pytest.fixture(scope="module")
def runs(ready_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three nets, one of them prepared for otherwise (three means, unit variance)."""
    folder = tmp_path_factory.mktemp("nets") / "runs"
    for seed, recipe in enumerate((PAPER, PAPER, DEMO)):
        make_run(folder, "net", ready_shards, recipe, seed)
    return folder


def names(runs: Path) -> list[str]:
    return [str(runs / name) for name in ("net", "net-2", "net-3")]


def ask(*arguments: object) -> tuple[str, str]:
    done = CliRunner().invoke(command, [*map(str, arguments), "--gpus", "0"], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout, done.stderr


def outputs_by_hand(run: Path, folder: Path, *, ten: bool) -> np.ndarray:
    """(24, classes) float64: crops, mean and scale from the oracle, each crop through the net, softmax, mean."""
    weights = load_run(run)
    net = AlexNet(weights.recipe, weights.num_classes).double().eval()
    net.load_state_dict(weights.state)
    colors, is_image = weights.colors, weights.recipe.mean == "image"
    mean = colors.mean_image[16:240, 16:240].astype(np.float64) if is_image else colors.mean
    scale = colors.std if weights.recipe.unit_variance else np.ones(3)
    rows = []
    for pixels, _ in samples(folder).values():
        corners = [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)] if ten else [(16, 16)]
        crops = [pixels[y : y + 224, x : x + 224] for y, x in corners]
        crops += [crop[:, ::-1] for crop in crops] if ten else []
        images = np.stack([((crop - mean) / scale).transpose(2, 0, 1) for crop in crops])
        with torch.no_grad():
            logits = net(torch.from_numpy(images)).numpy()
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        rows.append((shifted / shifted.sum(axis=1, keepdims=True)).mean(axis=0))
    return np.array(rows)


def samples(folder: Path) -> dict[str, tuple[np.ndarray, int]]:
    return oracle.read_samples(ShardSet.open(folder).tars("val"))


def error(outputs: np.ndarray, labels: list[int], k: int) -> float:
    best = np.argsort(-outputs, axis=1)[:, :k]
    return 100 * float(np.mean([label not in row for label, row in zip(labels, best, strict=True)]))


@pytest.mark.slow
def test_each_net_and_the_average_of_their_outputs_have_the_errors_counted_by_hand(runs, ready_shards, tmp_path):
    text, _ = ask(*names(runs), "--json", "--predictions", tmp_path / "out.csv")
    result = json.loads(text)
    labels = [label for _, label in samples(ready_shards).values()]
    views = {"": False, "ten_crop_": True}
    by_hand = {
        p: [outputs_by_hand(Path(run), ready_shards, ten=ten) for run in names(runs)] for p, ten in views.items()
    }
    for prefix, outputs in by_hand.items():
        for net, one in zip(outputs, result["runs"], strict=True):
            assert one[f"{prefix}top1_error"] == pytest.approx(error(net, labels, 1))
        mean = np.mean(outputs, axis=0)
        assert result["average"][f"{prefix}top1_error"] == pytest.approx(error(mean, labels, 1))
        assert result["average"][f"{prefix}top5_error"] == error(mean, labels, 5) == 0  # of four classes
    assert result["average"]["num_nets"] == 3 and result["average"]["num_images"] == 24
    assert len({one["top1_error"] for one in result["runs"]}) > 1  # else nothing would tell nets apart

    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    mean = np.mean(by_hand["ten_crop_"], axis=0)
    classes = ShardSet.open(ready_shards).manifest.classes
    sources = read_sources(ShardSet.open(ready_shards))
    assert [row["key"] for row in rows] == sorted(samples(ready_shards)) and len(sources) == 24
    for row, outputs, label in zip(rows, mean, labels, strict=True):
        order = np.argsort(-outputs)
        assert row["source"] == sources[int(row["key"])] and row["source"].startswith("val/")
        assert (int(row["label"]), row["label_wnid"]) == (label, classes[label].wnid)
        assert [row[f"wnid_{place}"] for place in range(1, 5)] == [classes[index].wnid for index in order]
        got = [float(row[f"probability_{place}"]) for place in range(1, 5)]
        np.testing.assert_allclose(got, outputs[order], atol=2e-5)
        assert row["wnid_5"] == row["probability_5"] == ""


def test_one_run_keeps_its_form_and_logs_its_ten_crops_once(runs, tmp_path):
    run = shutil.copytree(runs / "net", tmp_path / "net")
    (run / "metrics.jsonl").write_text("")
    text, _ = ask(run, "--json")
    assert set(json.loads(text)) == {"run", "checkpoint", "num_images", *ERRORS}
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == 1 and logged[0]["crops"] == "ten" and (logged[0]["step"], logged[0]["epoch"]) == (32, 1)
    assert logged[0]["top1_error"] == json.loads(text)["ten_crop_top1_error"]
    ask(run / "checkpoints" / "best.pt", "--shards", json.loads((run / "config.json").read_text())["shards"])
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1  # a file is nobody's run


@pytest.mark.slow
def test_two_ranks_give_the_same_errors_and_predictions_each_image_once(runs, ready_shards, tmp_path, capfd):
    texts, tables = [], []
    for num_ranks in (1, 2):
        table = tmp_path / f"{num_ranks}.csv"
        job = Job(tuple(map(Path, names(runs)[1:])), "best", str(ready_shards), False, as_json=True, predictions=table)
        assert (launch(run_rank, (job,), 2) if num_ranks == 2 else run_rank(job)) == 0
        texts.append(json.loads(capfd.readouterr().out))
        tables.append(list(csv.reader(table.open())))
    assert texts[0] == texts[1]
    assert [row[:4] for row in tables[0]] == [row[:4] for row in tables[1]] and len(tables[0]) == 25
    for one, other in zip(tables[0][1:], tables[1][1:], strict=True):
        assert float(one[6]) == pytest.approx(float(other[6]), abs=1e-5)


def test_nets_that_do_not_belong_to_the_shards_are_refused_by_name(runs, ready_shards):
    shards, net = ShardSet.open(ready_shards), load_run(runs / "net")
    check_belongs(net, shards)
    with pytest.raises(UserError, match=r"net/checkpoints/best.pt: was trained on shards 000000000000.*--shards"):
        check_belongs(replace(net, shards_fingerprint="0" * 64), shards)
    fewer = {**net.state, "fc8.bias": net.state["fc8.bias"][:3], "fc8.weight": net.state["fc8.weight"][:3]}
    with pytest.raises(UserError, match=r"best.pt: a net of 3 classes, but .* has 4"):
        check_belongs(replace(net, state=fewer), shards)
    others = (replace(net.classes[0], wnid="zebra"), *net.classes[1:])
    with pytest.raises(UserError, match=r"class 0 is 'zebra', but that of .* is"):
        check_belongs(replace(net, classes=others), shards)
    with pytest.raises(UserError, match="was trained on shards 0000"):
        evaluate_nets([net, replace(net, shards_fingerprint="0" * 64)], shards, ALONE)


def test_the_papers_rows_stand_beside_results_on_the_papers_images_only():
    result = dict.fromkeys(ERRORS, 40.0) | {"run": "runs/mine"}
    average = dict.fromkeys(ERRORS, 38.0) | {"num_nets": 5}
    rows = list_errors([result], average, is_ilsvrc2012=True)
    assert rows[:2] == [["mine", *["40.00"] * 4], ["5 CNNs averaged", *["38.00"] * 4]]
    assert ["the paper, 1 CNN", "", "", "40.7", "18.2"] in rows
    assert ["the paper, 5 CNNs averaged", "", "", "38.1", "16.4"] in rows
    assert ["the 2012 source, epoch 135", "", "", "40.25", "17.99"] in rows
    assert len(list_errors([result], None, is_ilsvrc2012=False)) == 1


def test_the_table_is_printed_with_a_row_for_each_net_and_their_average(runs):
    text, _ = ask(*names(runs)[:2])
    words = [line.split()[0] for line in text.splitlines()[4:] if line.strip()]
    assert words == ["net", "net-2", "2"] and "2 CNNs averaged" in text and "24 validation images" in text


def test_a_single_net_is_not_averaged(runs, ready_shards):
    found, average, answers = evaluate_nets([load_run(runs / "net-3")], ShardSet.open(ready_shards), ALONE)
    assert average is None and answers == [] and summarise(found[0])["num_images"] == 24
