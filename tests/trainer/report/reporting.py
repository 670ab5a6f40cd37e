"""Runs made by hand for the tests of reports: of any size, with whatever names."""

import json
from pathlib import Path

import numpy as np

from tests.trainer.trained import PAPER, draw_state
from trainer import checkpoint
from trainer.nets.tables import write_csv
from trainer.recipe import to_dict
from trainer.record.metrics import MetricsLog
from trainer.record.runs import BEST, CHECKPOINTS, METRICS, write_config

WILD_CLASS, WILD_RUN = "<script>alert(1)</script>", "<img src=x onerror=alert(1)>"
ENVIRONMENT = {"started": "2026-01-01T00:00:00+00:00", "command": "alexnet-train", "cpu": None, "memory_bytes": 1 << 35,
               "gpus": [{"name": "Model <b>A</b>", "memory_bytes": 1}]}  # fmt: skip


class Guess:
    def __init__(self, wnid: str) -> None:
        self.wnid, self.name, self.probability = wnid, f"name of {wnid}", 0.5


def make_run(folder: Path, *, num_classes: int = 4, num_epochs: int = 3, records: int = 5, seed: int = 0,
             num_predictions: int = 0, with_net: bool = True) -> Path:  # fmt: skip
    """A finished run of `num_epochs` with `records` records each, its rate cut after two thirds of them; one class has
    a hostile name."""
    generator = np.random.default_rng(seed)
    (folder / CHECKPOINTS).mkdir(parents=True)
    classes = [[f"n{index:08d}", f"class {index}, and its synonym"] for index in range(num_classes)]
    classes[1][1] = WILD_CLASS
    config = {"recipe": to_dict(PAPER), "seed": seed, "shards": "/data/<b>shards</b>", "world_size": 1,
              "device": "cpu", "classes": classes, "num_classes": num_classes}  # fmt: skip
    write_config(folder, config)
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    total = num_epochs * records
    with MetricsLog.open(folder / METRICS, None) as log:
        for number in range(1, total + 1):
            error = 30 + 65 * float(np.exp(-3 * number / total)) + float(generator.normal())
            epoch = (number - 1) // records + 1
            log.train(step=20 * number, epoch=epoch, loss=error / 15, top1_error=error, top5_error=error / 3,
                      lr=0.01 if number <= 2 * total // 3 else 0.001, images_per_s=900 + float(generator.normal()),
                      data_wait_fraction=0.01, time_s=2.0 * number)  # fmt: skip
            if number == 2 * total // 3:
                log.event("lr_cut", step=20 * number, epoch=epoch, text="rate 0.001 from the next epoch")
            if number % records == 0:
                log.eval(step=20 * number, epoch=epoch, crops="centre", num_images=200, loss=error / 16,
                         top1_error=error - 2, top5_error=error / 3 - 1)  # fmt: skip
    if with_net:
        state = {"model": draw_state(PAPER, num_classes, seed), "recipe": to_dict(PAPER), "num_classes": num_classes}
        checkpoint.save(folder / CHECKPOINTS / BEST, state)
    if num_predictions:
        labels = np.arange(num_predictions) % num_classes
        best = (labels[:, None] + np.arange(5) + (generator.random((num_predictions, 1)) < 0.4)) % num_classes
        rows = (
            ([f"{key:09d}", "", label, classes[label][0]], [Guess(classes[index][0]) for index in guesses])
            for key, (label, guesses) in enumerate(zip(labels.tolist(), best.tolist(), strict=True))
        )
        write_csv(folder / "predictions.csv", ["key", "source", "label", "label_wnid"], rows)
    return folder
