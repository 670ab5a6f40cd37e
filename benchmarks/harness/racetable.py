"""What a race found, as a table in Markdown and as a document for JSON: medians, spread, ratios taken round by round.

Every row that took part stays, with its rates or with the reason why there are none.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.rounds import Row


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """n, median, min, max and quartiles, and the values themselves."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "n": len(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "q1": quartiles[0],
        "q3": quartiles[2],
        "rounds": [round(value, 4) for value in values],
    }


def compare(rates: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Ratios round by round: neighbours in time share the machine's mood."""
    return summarise([ours / theirs for ours, theirs in zip(rates, base, strict=True)])


def report(
    title: str,
    rows: Sequence[Row],
    *,
    base: str | None,
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    foreign: Sequence[float],
    columns: Mapping[str, Callable[[Row], str]],
    notes: Sequence[str] = (),
) -> tuple[str, dict[str, Any]]:
    """The table as Markdown, and the same and more for a JSON file. Rows in order of speed, those without one last."""
    base_rates = next((row.rates for row in rows if row.entry.name == base and row.rates), None)
    found = []
    for row in sorted(rows, key=lambda row: -statistics.median(row.rates) if row.rates else 1.0):
        result: dict[str, Any] = {**vars(row.entry), "state": row.state, "versions": row.versions, **row.extra}
        if row.rates:
            result["images_per_s"] = summarise(row.rates)
            result["cpu_ms_per_image"] = summarise(row.cpu_ms)
            if base_rates:
                result["ratio"] = compare(row.rates, base_rates)
        found.append((row, result))

    lines = [f"### {title}", ""]
    heads = ["way", "kind", "images/s: median (min to max)", f"ratio to {base}: median (min to max)"]
    heads += ["CPU ms an image", *columns]
    lines += ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for row, result in found:
        rate, ratio = result.get("images_per_s"), result.get("ratio")
        cells = [
            f"{row.entry.name}: {row.entry.what}",
            row.entry.kind,
            _show(rate, "{:,.0f}") if rate else row.state.replace("|", "/"),
            _show(ratio, "{:.2f}") if ratio else "",
            f"{statistics.median(row.cpu_ms):.3f}" if row.cpu_ms else "",
            *(column(row) for column in columns.values()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    num_rounds = max((len(row.rates) for row in rows), default=0)
    load = f"{statistics.median(foreign):.2f} cores, at most {max(foreign):.2f}" if foreign else "not watched"
    lines += [
        "",
        f"n = {num_rounds} alternated rounds after a warm-up. {machine['date']}, {machine['cpu']}, "
        f"{machine['cores_used']} of {machine['cores_of_machine']} cores, {machine['memory_gib']} GiB. "
        f"Other work between the turns: median {load}.",
        "Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".",
        *notes,
        "Versions: " + _list_versions(rows) + ".",
    ]
    document = {
        "benchmark": title,
        "machine": dict(machine),
        "settings": dict(settings),
        "base": base,
        "foreign_cores": summarise(foreign) if foreign else None,
        "notes": list(notes),
        "contestants": [result for _, result in found],
    }
    return "\n".join(lines), document


def _show(summary: Mapping[str, Any], form: str) -> str:
    median, low, high = (form.format(summary[name]) for name in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def _list_versions(rows: Sequence[Row]) -> str:
    seen: dict[str, set[str]] = {}
    for row in rows:
        for package, number in row.versions.items():
            seen.setdefault(package, set()).add(number)
    return ", ".join(f"{package} {' and '.join(sorted(numbers))}" for package, numbers in sorted(seen.items()))
