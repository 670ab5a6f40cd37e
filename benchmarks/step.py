"""How fast is a training step on the CPU? Ours, the usual ways and the machine's limits, alternated on the same cores.

    python benchmarks/step.py --python PEERS/bin/python --json step.json         # about five minutes
    python benchmarks/step.py --only ours,usual --batch 8 --rounds 2 --seconds 0 # to see that it runs

All train on the same batch in memory, 224x224, 1000 classes. Rates are compared at equal precision and of equal
networks (the paper's, with its groups); whatever differs is a row of its own. The limits: operations of a step over the
rate of large matrix products, and bytes that its passes must move, counted, over the rate of a running sum.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import race
from harness.children import Child, closing_all
from harness.machine import describe_machine
from harness.racetable import report
from harness.rounds import Entry, Row, alternate

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "peers" / "step.py"
NUM_CLASSES = 1000
ENTRIES = (
    Entry("ours", "ours", "`trainer.step.Learner`, recipe paper, float32"),
    Entry("ours-no-lrn", "ours", "the same without normalisation"),
    Entry("ours-bf16", "ours", "the same, bfloat16 autocast"),
    Entry(
        "usual", "peer", "the usual reproduction, the paper's groups: nn.LocalResponseNorm, float32, NCHW, torch SGD"
    ),
    Entry("usual-ungrouped", "peer", "the same as it is mostly found, without groups (1.6 times the operations)"),
    Entry("usual-nhwc", "control", "the usual reproduction in channels_last"),
    Entry("usual-bf16", "peer", "the usual reproduction, bfloat16 autocast"),
    Entry("torchvision", "peer", "torchvision's AlexNet and reference recipe (no normalisation), float32"),
    Entry("ours-owt", "ours", "recipe owt: torchvision's network"),
    Entry("limit-products", "limit", "a step's operations at the rate of 2048x2048 float32 products"),
    Entry("limit-memory", "limit", "a step's bytes, counted, at the rate of b += a"),
)
DEFAULT = "ours,ours-no-lrn,usual,usual-ungrouped,torchvision,ours-owt,limit-products,limit-memory"
PAIRS = (
    ("ours", "usual"),
    ("ours", "usual-ungrouped"),
    ("ours-bf16", "usual-bf16"),
    ("ours-owt", "torchvision"),
    ("ours", "limit-products"),
    ("ours", "limit-memory"),
)


def main() -> None:
    race.run(parse_arguments(), ENTRIES, measure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training steps: ours, peers and limits in alternation.")
    parser.add_argument("--batch", type=int, default=64, help="images a step; each contestant keeps its memory")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn; two steps at least")
    race.add_options(parser, ENTRIES, only=DEFAULT)
    options = parser.parse_args()
    if options.batch < 1 or options.rounds < 1 or options.seconds < 0:
        parser.error("--batch, --rounds: expected 1 or more; --seconds: 0 or more")
    return options


def measure(
    options: argparse.Namespace, entries: Sequence[Entry], cpus: set[int], scratch: Path
) -> tuple[str, dict[str, Any]]:
    """Everything: the table and the JSON document."""
    sys.path.insert(0, str(HERE.parent))
    from trainer.bench.tasks import count_step_bytes, count_step_flops
    from trainer.recipe import RECIPES

    paper = RECIPES["paper"]
    job = {
        "batch": options.batch,
        "classes": NUM_CLASSES,
        "workers": options.workers,
        "flops": count_step_flops(paper, NUM_CLASSES),
        "bytes": count_step_bytes(paper, options.batch, NUM_CLASSES),
        "paths": [str(HERE.parent)],
    }
    rows = {entry.name: Row(entry) for entry in entries}
    children: dict[str, Child] = {}

    def look(child: Child, row: Row) -> None:
        row.extra.update(child.ask("look"))
        child.ask("run", seconds=0)

    with closing_all(children):
        race.enter(children, rows, SCRIPT, lambda _: job, look, options=options, cpus=cpus, scratch=scratch)
        foreign = alternate(
            children,
            rows,
            num_rounds=options.rounds,
            arguments={"seconds": options.seconds},
            on_turn=race.say_turns(options),
        )
        for name, child in children.items():
            if rows[name].state == "ok":
                note_lrn(rows[name], child.ask("lrn_s"), options.batch)
    pairs, notes = race.compare_pairs(rows, PAIRS)
    found = rows["torchvision"].extra.get("note") if "torchvision" in rows else None
    notes += [f"torchvision's network: {found}."] * bool(found)
    text, document = report(
        "Training steps",
        list(rows.values()),
        base="usual" if "usual" in rows else None,
        machine=describe_machine(cpus),
        settings={
            "batch": options.batch,
            "seconds a turn": options.seconds,
            "cores": options.workers,
            "operations an image": f"{job['flops'] / 1e9:.2f} G",
            "bytes an image": f"{job['bytes'] / 1e6:.1f} MB",
        },
        foreign=foreign,
        columns={
            "parameters": lambda row: f"{row.extra['num_parameters']:,}" if row.extra.get("num_parameters") else "",
            "ReLU and LRN, % of the step": lambda row: (
                f"{100 * row.extra['lrn_fraction']:.1f}" if "lrn_fraction" in row.extra else ""
            ),
        },
        notes=notes,
    )
    document["pairs"] = pairs
    return text, document


def note_lrn(row: Row, lrn_s: float | None, batch: int) -> None:
    """The normalisations alone, with the ReLU before them, in seconds and as a fraction of the median step."""
    if lrn_s and row.rates:
        step_s = batch / sorted(row.rates)[len(row.rates) // 2]
        row.extra |= {"lrn_s": lrn_s, "lrn_fraction": lrn_s / step_s}


if __name__ == "__main__":
    main()
