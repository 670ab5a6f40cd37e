"""Which classes are wrong, and for what they are taken, against counting by hand; misfits are named."""

import numpy as np
import pytest

from pipeline.common.errors import UserError
from trainer.nets.tables import write_csv
from trainer.report.confusion import Predictions, choose_worst, count_pairs, list_classes, read_predictions

LABELS = [0, 0, 0, 0, 1, 1, 2, 2, 2]
FIRST = [0, 1, 1, 2, 1, 1, 0, 0, 1]


def predictions(labels=LABELS, first=FIRST, second=None):
    best = np.full((len(labels), 5), -1)
    best[:, 0] = first
    best[:, 1] = second if second is not None else [(one + 1) % 3 for one in first]
    return Predictions(np.array(labels), best, "ten", "here")


def test_classes_come_worst_first_with_what_they_are_taken_for():
    found = list_classes(predictions())
    assert [one.index for one in found] == [2, 0, 1]
    assert [one.top1_error for one in found] == [100.0, 75.0, 0.0]
    assert found[0].instead == ((0, 2), (1, 1)) and found[0].num_images == 3
    assert found[1].instead == ((1, 2), (2, 1)) and found[2].instead == ()
    # class 2: guesses 0, 0, 1 with 1, 1, 2 as second best: only the last has it among the best
    assert found[0].top5_error == pytest.approx(200 / 3)


def test_the_errors_of_all_are_counted_as_ever():
    top1, top5 = predictions().errors
    assert top1 == pytest.approx(100 * 6 / 9) and top5 == pytest.approx(100 * 4 / 9)


def test_pairs_count_every_image_of_a_shown_class_once():
    shown = choose_worst(list_classes(predictions()), most=2)
    assert shown == [2, 0]  # the worst, and what it is mostly taken for
    counts = count_pairs(predictions(), shown)
    assert counts.tolist() == [[0, 2, 1], [1, 1, 2]]  # columns: 2, 0, any other
    assert choose_worst(list_classes(predictions()), most=10) == [2, 0, 1]


class Guess:
    def __init__(self, wnid):
        self.wnid, self.name, self.probability = wnid, f"name of {wnid}", 0.5


def write(path, rows):
    write_csv(path, ["key", "source", "label", "label_wnid"], rows)
    return path


def test_a_file_of_alexnet_eval_is_read_as_it_was_meant(tmp_path):
    rows = [(["000000001", "a.jpg", 1, "n1"], [Guess("n0"), Guess("n1")]), (["2", "b", 0, "n0"], [Guess("n0")])]
    found = read_predictions(write(tmp_path / "p.csv", rows), ["n0", "n1"])
    assert found.labels.tolist() == [1, 0] and found.crops == "ten" and found.source == "p.csv"
    assert found.best.tolist() == [[0, 1, -1, -1, -1], [0, -1, -1, -1, -1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n", "no column label, label_wnid"),
        (b"", "no column label"),
        (b"\xff\xfe\x00", "no column label|not a CSV"),
        (None, "cannot be read"),
    ],
)
def test_another_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "p.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        read_predictions(path, ["n0"])
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_predictions_of_another_net_or_none_are_refused(tmp_path):
    rows = [(["1", "a", 0, "n0"], [Guess("n0")]), (["2", "a", 0, "n9"], [Guess("n0")])]
    with pytest.raises(UserError, match=r"line 3: class 'n9' is none of the net's 1"):
        read_predictions(write(tmp_path / "p.csv", rows), ["n0"])
    with pytest.raises(UserError, match="no predictions"):
        read_predictions(write(tmp_path / "q.csv", []), ["n0"])
