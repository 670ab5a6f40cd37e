"""What `alexnet-bench` prints: the object of bench_run.py as a table, each number beside its limit.

The decision that shaped it: a view of the JSON object and of nothing else, so that both say the same. Left out: the
numbers.
"""

from typing import Any

from pipeline.common import console


def show(result: dict[str, Any]) -> None:
    """The object as a table: each number beside its limit."""
    hardware, memory = result["hardware"], result["memory"]
    rows = {"loader": _loader_rows, "step": _step_rows, "train": _train_rows}[result["bench"]](result)
    cores = hardware["num_cores"]
    rows.append(["CPU cores used", f"{result['cores_used']:.1f}", f"{cores}", f"{result['cores_used'] / cores:.0%}"])
    rows.append(_memory_row("memory, peak", memory["peak_rss_bytes"], hardware["memory_bytes"]))
    if memory["gpu_bytes"] is not None:
        total = sum(gpu["memory_bytes"] for gpu in hardware["gpus"][: result["num_ranks"]])
        rows.append(_memory_row("GPU memory", memory["gpu_bytes"], total))
    what = [f"recipe {result['recipe']}", f"batch {result['global_batch_size']}", *_optional(result)]
    title = f"{result['bench']} on {result['num_ranks']} x {result['device']}: {', '.join(what)}"
    columns = ["", f"median of {result['num_rounds']} rounds (range)", "limit", "of it"]
    console.print_table(title, columns, rows)
    if "limit" in result:
        console.say(f"limit: {result['limit']['what']}")
    for line in _say_diagnosis(result.get("diagnosis")):
        console.say(line)


def _optional(result: dict[str, Any]) -> list[str]:
    words = [result["precision"]] if "precision" in result else []
    if "encoding" in result:
        words += [
            f"{result['encoding']} shards",
            f"decode {result['decode']}",
            f"threads a rank {result['num_threads']}",
        ]
    return words


def _rate_cell(rate: dict[str, Any]) -> str:
    return f"{rate['images_per_s']:,.0f} ({rate['lowest']:,.0f} to {rate['highest']:,.0f})"


def _memory_row(name: str, used: int, total: int) -> list[str]:
    return [name, f"{used / 2**30:.2f} GiB", f"{total / 2**30:.1f} GiB", f"{used / total:.0%}"]


def _loader_rows(result: dict[str, Any]) -> list[list[str]]:
    return [["images/s", _rate_cell(result), f"{result['limit']['images_per_s']:,.0f}", f"{result['ratio']:.0%}"]]


def _step_rows(result: dict[str, Any]) -> list[list[str]]:
    limit_rate = result["images_per_s"] / result["ratio"]
    rows = [
        ["images/s", _rate_cell(result), f"{limit_rate:,.0f}", f"{result['ratio']:.0%}"],
        ["TFLOP/s", f"{result['tflops']:.3g}", f"{result['limit']['tflops']:.3g}", f"{result['ratio']:.0%}"],
        ["ms a step", f"{result['ms_per_step']:,.2f}", f"{result['ms_per_step'] * result['ratio']:,.2f}", ""],
    ]
    for name, part_ms in result["parts_ms"].items():
        rows.append([f"  {name}", f"{part_ms:,.2f}", "", f"{part_ms / result['ms_per_step']:.0%} of the step"])
    return rows


def _train_rows(result: dict[str, Any]) -> list[list[str]]:
    loader, step, limit = result["loader"], result["step"], result["limit"]
    bound = min(loader["images_per_s"], step["images_per_s"])
    return [
        ["feeding alone, images/s", _rate_cell(loader), f"{limit['images_per_s']:,.0f}", f"{loader['ratio']:.0%}"],
        ["step alone, images/s", _rate_cell(step), "", ""],
        ["together, images/s", _rate_cell(result), f"{bound:,.0f}", f"{result['images_per_s'] / bound:.0%}"],
        ["waiting for data", f"{result['data_wait_fraction']:.0%} of the time", "", ""],
    ]


def _say_diagnosis(diagnosis: dict[str, Any] | None) -> list[str]:
    if diagnosis is None:
        return []
    return [diagnosis["finding"], *(f"  - {advice}" for advice in diagnosis["advice"])]
