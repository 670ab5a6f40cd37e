"""`alexnet-eval`, `alexnet-predict`, `alexnet-export`: flags and words of the commands that use a trained net.

Everything is checked before anything heavy is imported. Results go to stdout as they come, so that a folder of a
million files begins to answer at once.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.common import console
from pipeline.common.errors import printable
from trainer.commands.options import RUNS, SETTINGS, VERSION, add_common_options, choose_devices
from trainer.nets.tables import check_target, format_line, write_csv

if TYPE_CHECKING:
    from trainer.nets.predict import Guess, Prediction
    from trainer.nets.weights import Weights

_CHECKPOINT = click.option("--checkpoint", default="best", metavar="best|last|PATH",
                           help="Which checkpoint of the run.")  # fmt: skip


@click.command(cls=console.Command, context_settings=SETTINGS)
@add_common_options
@click.argument("nets", nargs=-1, required=True, metavar="RUN...")
@_CHECKPOINT
@click.option("--predictions", type=click.Path(path_type=Path), show_default=False,
              help="Write what each image is taken for (ten crops, all nets averaged) to this CSV file.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the errors as one JSON object.")
def evaluate(
    shards: str | None,
    runs: Path,
    cache_dir: str | None,
    num_gpus: int | None,
    num_threads: int | None,
    nets: tuple[str, ...],
    checkpoint: str,
    predictions: Path | None,
    as_json: bool,
) -> int:
    """Error of RUN on the validation images: centre crop and ten crops.

    RUN is a run's name or folder, or a file of weights. Of several, each, and the average of their softmax outputs, as
    the paper averages 5 CNNs; all must have been trained on the same shards.
    """
    if predictions:
        check_target(predictions)
    from trainer.record.runs import read_whole_config

    found = [_find_net(runs, text) for text in nets]
    trained_on = [read_whole_config(path)["shards"] for path in found if path.is_dir()]
    num_ranks, use_gpu = choose_devices(num_gpus)
    from pipeline.options import LoaderOptions
    from trainer.distributed import under_launcher
    from trainer.launch import launch, run_as_rank
    from trainer.nets.ensemble import Job, run_rank

    job = Job(
        nets=tuple(found),
        checkpoint=checkpoint,
        shards=shards or (trained_on[0] if trained_on else "shards"),
        use_gpu=use_gpu,
        loader=LoaderOptions(num_threads=num_threads),
        cache_dir=cache_dir,
        as_json=as_json,
        predictions=predictions,
    )
    if under_launcher():
        return run_as_rank(run_rank, job)
    return launch(run_rank, (job,), num_ranks) if num_ranks > 1 else run_rank(job)


@click.command(cls=console.Command, context_settings=SETTINGS)
@VERSION
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--run", show_default="the newest", help="The run whose net to ask: a name or a folder.")
@click.option("--weights", "weights_file", type=click.Path(path_type=Path), show_default=False,
              help="A file of weights instead of a run: of alexnet-export, torchvision's, Caffe's.")  # fmt: skip
@_CHECKPOINT
@RUNS
@click.option("--crops", type=click.Choice(["centre", "ten"]), default="ten",
              help="The centre alone, or four corners, centre and their mirror images, averaged.")  # fmt: skip
@click.option("--gpus", "num_gpus", type=click.IntRange(0, 1), show_default="1 if visible",
              help="0 computes on the CPU.")  # fmt: skip
@click.option("--threads", "num_threads", type=click.IntRange(min=1), show_default="one per CPU",
              help="Decoding threads.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), show_default=False,
              help="Write a table to this file, a row an image.")  # fmt: skip
def predict(
    images: tuple[Path, ...],
    run: str | None,
    weights_file: Path | None,
    checkpoint: str,
    runs: Path,
    crops: Any,
    num_gpus: int | None,
    num_threads: int | None,
    as_json: bool,
    csv_file: Path | None,
) -> int:
    """The five best classes of each of IMAGES, files or folders, with their probabilities.

    An image is prepared as for training: shorter side to 256, the central 256x256. One that cannot be used is named
    with the reason, the others are still predicted, and the exit status is 1.
    """
    if run and weights_file:
        raise click.UsageError("--run and --weights name two nets; leave out one of them")
    if csv_file:
        check_target(csv_file)
    _, use_gpu = choose_devices(num_gpus)
    from trainer.nets.predict import Predictor, list_images
    from trainer.nets.predict import predict as predict_files

    paths = list_images(images)
    import torch

    weights = _find_weights(runs, run, weights_file, checkpoint)
    device = torch.device("cuda" if use_gpu else "cpu")
    predictor = Predictor(weights, crops=crops, device=device, num_threads=num_threads)
    found: list[Prediction] = []
    failed: list[Prediction] = []
    for one in predict_files(paths, predictor):
        if one.failure is not None:
            failed.append(one)
            console.note(f"error: {printable(one.path)}: {printable(one.failure)}")
            continue
        if as_json or csv_file:
            found.append(one)
        if not as_json:
            _print_best(one.path, one.best)
    if csv_file:
        write_csv(csv_file, ["image"], [([one.path], one.best) for one in found])
        console.note(f"{csv_file}: {len(found):,} images")
    if as_json:
        images_found = [{"image": str(one.path), "classes": [asdict(guess) for guess in one.best]} for one in found]
        failures = [{"image": str(one.path), "reason": one.failure} for one in failed]
        answer = {"weights": weights.source, "crops": crops, "images": images_found, "failures": failures}
        console.print_json(answer)
    return console.STATUS_FAILED if failed else 0


@click.command(cls=console.Command, context_settings=SETTINGS)
@VERSION
@click.argument("net", metavar="RUN")
@_CHECKPOINT
@RUNS
@click.option("--format", "kind", type=click.Choice(["safetensors", "torchvision", "caffe", "onnx"]),
              default="safetensors", help="safetensors: all that alexnet-predict and alexnet-train need.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True, show_default=False, help="The file to write.")
def export(net: str, checkpoint: str, runs: Path, kind: str, out: Path) -> None:
    """Write the net of RUN, a run's name or folder or a file of weights, for other programs.

    torchvision: a state dict, for nets of recipe owt. caffe: an .npz of bvlc_alexnet's blobs, for nets that came from
    there. onnx: pixels 0-255 in, logits out.
    """
    check_target(out)
    from trainer.nets import formats

    weights = formats.load_any(_find_net(runs, net), checkpoint)
    said = f"{weights.num_classes} classes"
    if kind == "onnx":
        from trainer.nets.onnx import save_onnx

        difference = save_onnx(out, weights)
        said += ", not checked: no onnxruntime" if difference is None else f", onnxruntime within {difference:.1e}"
    else:
        {
            "safetensors": formats.save_safetensors,
            "torchvision": formats.save_torchvision,
            "caffe": formats.save_caffe,
        }[kind](out, weights)
    if kind in ("torchvision", "caffe") and weights.colors:
        told = formats.describe_input(weights)
        console.note(f"input: {told['channels']} {told['values']}, minus {told['mean']}, divided by {told['scale']}")
    console.say(f"{out}: {weights.source}, {said}, {out.stat().st_size:,} bytes")


def _find_net(runs: Path, text: str) -> Path:
    """A file of weights, or the folder of a run. Raises UserError."""
    from trainer.record.runs import resolve_run

    return Path(text) if Path(text).is_file() else resolve_run(runs, text)


def _print_best(what: object, best: "tuple[Guess, ...]") -> None:
    if not sys.stdout.isatty():
        console.say(format_line(what, best))
        return
    from rich.markup import escape

    rows = [[escape(printable(guess.name)), f"{100 * guess.probability:.1f} %"] for guess in best]
    console.say(printable(what))  # not as the table's title, which would be broken to the table's width
    console.print_table("", ["class", "probability"], rows)


def _find_weights(runs: Path, run: str | None, weights_file: Path | None, checkpoint: str) -> "Weights":
    from trainer.nets.formats import load_any
    from trainer.nets.weights import find_newest, load_run
    from trainer.record.runs import resolve_run

    if weights_file:
        return load_any(weights_file)
    if run is None:
        folder = find_newest(runs)
        console.note(f"{folder}: the newest run")
    else:
        folder = resolve_run(runs, run)
    return load_run(folder, checkpoint)
