"""The page of alexnet-report is complete in itself, says what the runs' files say, and takes no name for markup."""

import re
from html.parser import HTMLParser

import click
import pytest

from pipeline.common.errors import UserError
from pipeline.images.imagenet import load_ilsvrc2012
from tests.trainer.report.reporting import WILD_CLASS, WILD_RUN, make_run
from trainer.nets.tables import PUBLISHED
from trainer.record.metrics import MetricsLog
from trainer.record.runs import METRICS, read_config, write_config
from trainer.report.data import read_run
from trainer.report.page import list_errors, render, write_page

VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """Tags with their attributes, the text of each, and whether all that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def words(self, *inside):
        return [text for tag, text in self.texts if text and (not inside or tag in inside)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / WILD_RUN, num_predictions=40), make_run(folder / "other", seed=1, with_net=False)]


@pytest.fixture(scope="module")
def page(runs):
    return Page(render([read_run(runs[0])]))


def test_names_from_files_are_text_and_never_tags(page):
    assert "script" not in {tag for tag, _ in page.tags} and "b" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    words = " ".join(page.words())
    for name in (WILD_CLASS, WILD_RUN, "/data/<b>shards</b>", "Model <b>A</b>"):
        assert name in words


def test_nothing_is_loaded_from_anywhere_and_nothing_may_run(page):
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "script" not in policy
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert attributes.get("src", "data:image/png").startswith("data:image/")
        assert attributes.get("href", "#").startswith("#")
    style = " ".join(text for tag, text in page.texts if tag == "style")
    assert "url(" not in style and "@import" not in style


def test_every_link_leads_to_a_heading_and_every_picture_and_table_has_words(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for tag, a in page.tags if tag == "a"} <= set(ids)
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")
    assert all(a.get("aria-label") or "aria-hidden" in a for tag, a in page.tags if tag == "svg")
    assert all(a.get("tabindex") == "0" for _, a in page.tags if a.get("class") == "wide")


def test_the_summary_and_the_errors_are_the_files(runs, page):
    best = min(record["top1_error"] for record in read_run(runs[0]).records("eval"))
    assert f"{best:.2f}" in page.words("td")
    assert any(f"top-1 {best:.2f} %" in text for text in page.words("td"))
    ours, *theirs = list_errors([read_run(runs[0])])
    assert ours["whose"] == "ours" and "200 validation images, 4 classes" in ours["data"]
    assert [row["net"] for row in theirs] == [net for net, *_ in PUBLISHED]
    assert {row["data"] for row in theirs} == {"ILSVRC-2012 validation", "ILSVRC-2010 test"}
    (caffe,) = [row for row in theirs if "Caffe" in row["net"]]
    assert caffe["errors"] == ["42.90", "19.80", "", ""] and caffe["whose"] == "published"
    assert any("do not compare" in text for text in page.words())


def test_ten_crops_come_from_the_predictions_where_the_run_has_none(runs):
    data = read_run(runs[0])
    top1, top5 = data.predictions.errors
    assert list_errors([data])[0]["errors"][2:] == [f"{top1:.2f}", f"{top5:.2f}"]
    assert list_errors([read_run(runs[1])])[0]["errors"][2:] == ["", ""]


def test_predictions_of_a_run_that_does_not_hold_its_classes_are_left_out_with_the_remedy(tmp_path):
    run = make_run(tmp_path / "old", num_predictions=8, with_net=False)
    config = read_config(run)
    del config["classes"]
    write_config(run, config)
    data = read_run(run)
    assert data.predictions is None and "--shards" in data.left_out[0]
    assert any("predictions.csv" in text for text in Page(render([data])).words("p"))
    with pytest.raises(UserError, match="does not hold its classes"):
        read_run(run, predictions=run / "predictions.csv")


def test_a_run_on_imagenet_is_said_to_be_one(tmp_path):
    run = make_run(tmp_path / "paper", with_net=False)
    config = read_config(run)
    config["classes"] = [[wnid, name] for wnid, name in load_ilsvrc2012().items()]
    write_config(run, config)
    assert list_errors([read_run(run)])[0]["data"] != "ILSVRC-2012 validation"  # 200 images
    with MetricsLog.open(run / METRICS, 10**9) as log:
        log.eval(step=300, epoch=3, crops="ten", num_images=50_000, loss=1.0, top1_error=40.7, top5_error=18.2)
    assert list_errors([read_run(run)])[0]["data"] == "ILSVRC-2012 validation"
    assert "do not compare" not in render([read_run(run)])


def test_curves_of_several_runs_stand_in_the_same_charts_and_each_can_be_hidden(runs):
    text = render([read_run(run) for run in runs])
    page = Page(text)
    charts = [a for tag, a in page.tags if tag == "svg" and a.get("class") == "chart"]
    assert sum(a.get("class") == "chart swatch" for tag, a in page.tags if tag == "svg") == 2
    assert [chart["aria-label"] for chart in charts] == [
        "Top-1 error", "Top-5 error", "Loss", "Learning rate", "Throughput", "Waiting for data",
    ]  # fmt: skip
    classes = [a.get("class", "").split() for tag, a in page.tags if tag == "g"]
    for run in ("run0", "run1"):
        assert sum("mark" in c and run in c for c in classes) == 3  # one cut, in three charts
        for kind in ("raw", "smooth", "points"):
            assert any(kind in c and run in c for c in classes)
    boxes = {a["id"] for tag, a in page.tags if tag == "input"}
    assert boxes == {"show-raw", "show-smooth", "show-points", "show-marks", "show-run0", "show-run1"}
    assert all(f"#{box}:not(:checked)" in text for box in boxes)
    assert "other" in page.words("h3") and "No checkpoint yet." in page.words("p")


def test_kernels_predictions_neighbours_and_classes_come_from_the_net(ready_shards, tmp_path):
    from pipeline.shards import ShardSet
    from tests.trainer import trained

    run = trained.make_run(tmp_path, "demo", ready_shards, trained.PAPER)
    with MetricsLog.open(run / METRICS, None) as log:
        log.eval(step=32, epoch=1, crops="centre", num_images=24, loss=1.0, top1_error=50.0, top5_error=0.0)
    data = read_run(run, num_images=20)
    page = Page(render([data]))
    pictures = [a for tag, a in page.tags if tag == "img"]
    assert sum("kernels of conv1" in a["alt"] for a in pictures) == 2  # a tower each
    assert sum(a["alt"].startswith("A validation image") for a in pictures) == 8
    assert len(pictures) == 2 + 8 + 5 * 7
    right = sum(guess.classes[0] == guess.label for guess in data.examples.guesses)
    captions = page.words("figcaption")[:8]
    assert sum(text.startswith("✓") for text in captions) == right
    names = [entry.name for entry in ShardSet.open(ready_shards).manifest.classes]
    assert {text[2:] for text in captions} <= set(names)
    assert data.predictions.errors[0] == pytest.approx(
        100 * (data.predictions.best[:, 0] != data.predictions.labels).mean()
    )
    assert any("24 images, centre crop" in text for text in page.words("p"))


def test_the_same_runs_give_the_same_bytes_and_a_page_is_whole_or_not_there(runs, tmp_path):
    target = tmp_path / "new" / "page.html"
    write_page([read_run(runs[0])], target)
    first = target.read_bytes()
    write_page([read_run(runs[0])], target)
    assert target.read_bytes() == first and first.rstrip().endswith(b"</html>")
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]


def test_the_template_is_part_of_the_package():
    import tomllib
    from pathlib import Path

    root = Path(__file__).resolve().parents[3]
    setup = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert (
        "page.html" in setup["package-data"]["trainer.report"] and (root / "trainer" / "report" / "page.html").is_file()
    )
    assert not re.search(r"https?://", (root / "trainer" / "report" / "page.html").read_text())


def contrast(one, other):
    """WCAG 2.1: from 1 to 21."""

    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_letters_and_lines_stand_out_in_light_and_dark(page):
    style = " ".join(text for tag, text in page.texts if tag == "style")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for ground in ("page", "card"):
            for name in ("ink", "soft", "link", "good", "bad"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
            for name in ("c0", "c1", "c2", "c3", "c4"):
                assert contrast(colours[name], colours[ground]) >= 3.0, (name, ground)
        assert contrast(colours["ink"], colours["bar"]) >= 4.5


def call(*words):
    from trainer.commands.report import report

    return report.main([str(word) for word in words], standalone_mode=False)


def test_the_command_writes_the_page_where_it_is_told_and_reads_the_predictions_it_is_given(runs, tmp_path, capsys):
    predictions = tmp_path / "mine.csv"
    predictions.write_bytes((runs[0] / "predictions.csv").read_bytes())
    target = tmp_path / "page.html"
    call(runs[0], "--images", 0, "--predictions", predictions, "--out", target)
    assert "from mine.csv" in target.read_text() and str(target) in capsys.readouterr().out
    call(*runs, "--images", 0)
    assert (runs[0].with_name(f"{WILD_RUN}+other") / "report.html").is_file()
    assert not any((run / "report.html").exists() for run in runs)


def test_predictions_of_one_run_are_not_taken_for_those_of_two_and_a_target_is_checked_first(runs, tmp_path):
    with pytest.raises(click.UsageError, match="one RUN"):
        call(*runs, "--predictions", runs[0] / "predictions.csv")
    with pytest.raises(UserError, match="there is no folder"):
        call(runs[0], "--out", tmp_path / "gone" / "page.html")
