"""What the races share besides their rounds: options, scratch folder, a start for everyone, the results of pairs."""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.children import Child, Failed, unwind_when_terminated
from harness.machine import choose_cpus
from harness.racetable import compare
from harness.rounds import Entry, Row, choose, start_child

Measured = tuple[str, dict[str, Any]]


def add_options(parser: argparse.ArgumentParser, entries: Sequence[Entry], *, only: str | None = None) -> None:
    """Those that every race has. `only`: what --only is by default, all if None."""
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PATH",
        help="interpreter of an environment with peers; may be repeated (default: this one alone)",
    )
    parser.add_argument("--workers", type=int, default=2, help="cores, and threads or processes of every contestant")
    names = ",".join(entry.name for entry in entries)
    parser.add_argument("--only", metavar="NAMES", default=only, help=f"some of: {names}")
    parser.add_argument("--scratch", metavar="DIR", help="folder for data and logs, kept (default: a temporary one)")
    parser.add_argument("--json", metavar="FILE", help="write everything measured there")


def run(
    options: argparse.Namespace,
    entries: Sequence[Entry],
    measure: Callable[[argparse.Namespace, Sequence[Entry], set[int], Path], Measured],
) -> None:
    """Print the table that `measure(options, entries chosen, cores, scratch folder)` gives, and write its document."""
    unwind_when_terminated()
    cpus = choose_cpus(options.workers)
    chosen = choose(entries, options.only)
    scratch = Path(options.scratch or tempfile.mkdtemp(prefix="race-")).absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        text, document = measure(options, chosen, cpus, scratch)
    finally:
        if not options.scratch:
            shutil.rmtree(scratch, ignore_errors=True)
    print(text)
    if options.json:
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def enter(
    children: dict[str, Child],
    rows: Mapping[str, Row],
    script: Path,
    job: Callable[[str], Mapping[str, Any]],
    look: Callable[[Child, Row], None],
    *,
    options: argparse.Namespace,
    cpus: set[int],
    scratch: Path,
) -> None:
    """Start everyone with its `job(name)`, and `look` at it, which raises Failed for what is not the work. Who is left
    is in `children`; the others' rows say why they are not."""
    pythons = [Path(sys.executable), *map(Path, options.python)]
    for name, row in rows.items():
        say(f"{name}: start, warm up, look")
        order = pythons if row.entry.kind == "ours" else pythons[::-1]
        child = start_child(row, order, script, job(name), cpus, scratch)
        if child is None:
            say(f"{name}: {row.state}")
            continue
        children[name] = child
        try:
            look(child, row)
        except Failed as error:
            row.state = f"failed: {error}"
            say(f"{name}: {row.state}")
            children.pop(name).close()  # its memory is wanted


def say_turns(options: argparse.Namespace) -> Callable[[int, str, float], None]:
    def on_turn(number: int, name: str, rate: float) -> None:
        shown = f"{rate:,.0f}" if rate >= 1000 else f"{rate:.1f}"
        say(f"round {number + 1}/{options.rounds} {name}: {shown} images/s")

    return on_turn


def compare_pairs(
    rows: Mapping[str, Row], pairs: Sequence[tuple[str, str]]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """{"left / right": ratios of the rounds' rates, and "cpu_ms", those of processor time an image} of the pairs in
    which both have run, and lines about them, if any."""
    compared: dict[str, dict[str, Any]] = {}
    for left, right in pairs:
        if left in rows and right in rows and rows[left].rates and rows[right].rates:
            found = compared[f"{left} / {right}"] = compare(rows[left].rates, rows[right].rates)
            if all(rows[right].cpu_ms):  # a turn shorter than the clock's tick has none
                found["cpu_ms"] = compare(rows[left].cpu_ms, rows[right].cpu_ms)

    def show(what: str, ratios: Mapping[str, Mapping[str, Any]]) -> str:
        words = [f"{name} {p['median']:.2f} ({p['min']:.2f} to {p['max']:.2f})" for name, p in ratios.items()]
        return f"{what}, ratios of rounds, median (min to max): {'; '.join(words)}."

    cpu_ms = {name: pair["cpu_ms"] for name, pair in compared.items() if "cpu_ms" in pair}
    return compared, [show(what, p) for what, p in (("Rates", compared), ("CPU time an image", cpu_ms)) if p]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
