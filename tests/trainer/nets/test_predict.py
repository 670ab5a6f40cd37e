"""A prediction is that of an evaluation on the same stored image; any file is tried, and a bad one harms no other."""

import csv
import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from pipeline.common.errors import UserError
from pipeline.images.resize import read_square
from pipeline.options import LoaderOptions
from pipeline.shards import ShardSet
from tests.docs.pictures import noise, picture, save
from tests.trainer.trained import DEMO, PAPER, draw_state, make_run
from trainer.commands.nets import predict as command
from trainer.distributed import Ranks
from trainer.evaluate import log_probabilities, make_eval_loader
from trainer.nets.predict import Predictor, find_best, list_images, predict
from trainer.nets.weights import Weights, load_run, make_net

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(ready_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nets") / "runs"
    make_run(folder, "paper", ready_shards, PAPER)
    make_run(folder, "demo", ready_shards, DEMO)
    return folder


def stored_images(folder: Path) -> list[np.ndarray]:
    """The validation images, in key order, decoded and prepared from their bytes as any file would be."""
    images = []
    for path in ShardSet.open(folder).tars("val"):
        with tarfile.open(path) as tar:
            members = [member for member in tar if member.name.endswith(".jpg")]
            images += [read_square(tar.extractfile(member).read()).pixels for member in members]
    return images


def ask(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(command, [*map(str, arguments), "--gpus", "0"], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.return_value, done.stdout, done.stderr


@pytest.mark.parametrize("crops", ["centre", "ten"])
@pytest.mark.parametrize("name", ["paper", "demo"])
def test_a_prediction_is_that_of_the_evaluation_on_the_same_stored_image(runs, ready_shards, name, crops):
    weights = load_run(runs / name)
    predictor = Predictor(weights, crops=crops, device=CPU)
    loader = make_eval_loader(
        ShardSet.open(ready_shards), weights.colors, weights.recipe, Ranks(0, 1, CPU), crops, LoaderOptions()
    )
    net = make_net(weights, CPU)
    with torch.no_grad():
        expected = torch.cat([log_probabilities(net, images, torch.float32) for images, _ in loader])
    images = stored_images(ready_shards)
    assert len(images) == 24
    got = predictor(images)
    assert got.std(dim=0).min() > 1e-3  # the images are told apart
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_run_without_its_own_colours_and_names_takes_those_of_its_shards(runs, tmp_path):
    whole, old = load_run(runs / "paper"), shutil.copytree(runs / "paper", tmp_path / "old")
    (old / "color.json").unlink()
    config = json.loads((old / "config.json").read_text())
    del config["classes"]
    (old / "config.json").write_text(json.dumps(config))
    completed = load_run(old)
    assert completed.classes == whole.classes
    np.testing.assert_array_equal(completed.colors.mean_image, whole.colors.mean_image)
    (old / "config.json").write_text(json.dumps({**config, "shards": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="gone"):
        load_run(old)


def test_weights_without_colours_are_refused_with_the_remedy():
    with pytest.raises(UserError, match=r"net\.pt: does not hold the colours.*--run"):
        Predictor(Weights("net.pt", PAPER, draw_state(PAPER, 4)), device=CPU)


def test_the_best_are_five_or_all_in_order_and_ties_go_to_the_lower_index():
    probabilities = torch.tensor([0.1, 0.3, 0.05, 0.3, 0.2, 0.05])
    best = find_best(probabilities.log(), None)
    assert [guess.index for guess in best] == [1, 3, 4, 0, 2]
    assert [guess.probability for guess in best] == pytest.approx([0.3, 0.3, 0.2, 0.1, 0.05])
    assert best[0].name == "class 1"
    assert len(find_best(probabilities[:3].log(), None)) == 3


def test_odd_files_are_predicted_and_broken_ones_named_in_their_places(runs, tmp_path):
    files = {
        "a.jpg": save(picture(300, 200), "JPEG"),
        "b-cmyk.jpg": save(picture(300, 200).convert("CMYK"), "JPEG"),
        "c-broken.jpg": save(noise(300, 200), "JPEG")[:5000],
        "d-tiny.png": save(Image.new("RGB", (1, 1), "red"), "PNG"),
        "e-not.jpg": b"<html>no image</html>",
        "f-grey.gif": save(picture(90, 400).convert("L"), "GIF"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    paths = [*list_images([tmp_path]), tmp_path / "missing.jpg"]
    assert [path.name for path in paths] == [*files, "missing.jpg"]
    predictor = Predictor(load_run(runs / "paper"), crops="centre", device=CPU)
    predictor.batch_size = 2  # so that a batch begins, and ends, with a broken one
    found = list(predict(paths, predictor))
    assert [one.path for one in found] == paths
    failures = {one.path.name: one.failure for one in found if one.failure}
    assert list(failures) == ["c-broken.jpg", "e-not.jpg", "missing.jpg"]
    assert "not one of JPEG" in failures["e-not.jpg"] and "No such file" in failures["missing.jpg"]
    for one in found:
        if not one.failure:
            assert len(one.best) == 4 and sum(guess.probability for guess in one.best) == pytest.approx(1, abs=1e-5)
            alone = predictor([read_square(files[one.path.name]).pixels])[0]
            assert one.best[0].probability == pytest.approx(alone.exp().max().item(), abs=1e-5)


def test_lines_json_and_csv_say_the_same_and_a_broken_image_makes_the_status_1(runs, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.asarray(picture(300, 200))).save(tmp_path / "in" / "a,b.png")
    (tmp_path / "in" / "broken\x1b[31m.jpg").write_bytes(b"\xff\xd8")
    base = [tmp_path / "in", "--run", runs / "paper"]
    status, lines, errors = ask(*base)
    assert status == 1 and len(lines.splitlines()) == 1
    assert "\x1b" not in errors and r"broken\x1b[31m.jpg: " in errors
    status, text, _ = ask(*base, "--json", "--csv", tmp_path / "out.csv")
    result = json.loads(text)
    assert status == 1 and result["crops"] == "ten"
    assert [Path(one["image"]).name for one in result["failures"]] == ["broken\x1b[31m.jpg"]
    classes = result["images"][0]["classes"]
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert len(rows) == 1 and rows[0]["image"].endswith("a,b.png")
    for place, guess in enumerate(classes, start=1):
        assert rows[0][f"wnid_{place}"] == guess["wnid"] and rows[0][f"name_{place}"] == guess["name"]
        assert float(rows[0][f"probability_{place}"]) == pytest.approx(guess["probability"], rel=1e-6)
        assert lines.split("\t")[place].split(" ", 1)[1].strip() == guess["name"]
    assert rows[0]["wnid_5"] == ""  # four classes


def test_the_newest_run_is_asked_unless_another_is_named(ready_shards, runs, tmp_path):
    mine = shutil.copytree(runs, tmp_path / "runs")
    make_run(mine, "aaa", ready_shards, replace(PAPER, width=1 / 32))
    (tmp_path / "a.png").write_bytes(save(picture(300, 200), "PNG"))
    _, text, errors = ask(tmp_path / "a.png", "--runs", mine, "--json")
    assert "aaa: the newest run" in errors and "aaa/checkpoints/best.pt" in json.loads(text)["weights"]
    _, text, _ = ask(tmp_path / "a.png", "--runs", mine, "--run", "demo", "--json")
    assert "demo/checkpoints/best.pt" in json.loads(text)["weights"]


def test_what_cannot_be_asked_is_refused_before_any_work(runs, tmp_path):
    (tmp_path / "a.png").write_bytes(save(picture(30, 20), "PNG"))
    with pytest.raises(UserError, match="no run with a checkpoint"):
        ask(tmp_path / "a.png", "--runs", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no image in this folder"):
        ask(tmp_path / "empty", "--run", runs / "paper")
    with pytest.raises(UserError, match="there is no folder"):
        ask(tmp_path / "a.png", "--run", runs / "paper", "--csv", tmp_path / "no" / "out.csv")


def test_predicting_needs_no_dali(runs, tmp_path):
    (tmp_path / "a.png").write_bytes(save(picture(300, 200), "PNG"))
    program = (
        "import sys\n"
        "sys.modules['nvidia.dali'] = None\n"
        "from trainer.commands.train import predict\n"
        f"sys.argv = ['alexnet-predict', {str(tmp_path / 'a.png')!r}, '--run', {str(runs / 'demo')!r}, '--gpus', '0']\n"
        "predict()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "a.png") + "\t")
