"""How fast do batches come? Ours, peers and physical limits, alternated in one run on the same cores.

    python benchmarks/feed.py SOURCE --python PEERS/bin/python --json feed.json
    python benchmarks/feed.py SOURCE --against ../before --only ours,other,ours-uint8,other-uint8,ours-raw,other-raw

SOURCE holds images at any depth (default: a synthetic set). They become 256x256 JPEGs of quality 90, and every
contestant is fed the same encoded bytes, converted to its own format beforehand. Output, but for the rows marked
uint8 and the limits: float32 NCHW batches of 128, random 224x224 crop, flip, PCA lighting, mean subtracted. Before
the clock runs, a batch of each is compared with the stored pixels: for every image the label says which one it is,
and its offset, flip and colour shift are found again. A steady state is timed: endless streams, the batches that lay
ready thrown away. `--against` races the loader of another checkout of this project. GPUs: gpu.py.
"""

import argparse
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from harness import race
from harness.children import Child, Failed, closing_all
from harness.feed_data import prepare_data
from harness.machine import describe_machine
from harness.racetable import report
from harness.rounds import Entry, Row, alternate
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "peers" / "feed.py"
SIZE_PX, CROP_PX, BATCH = 256, 224, 128
LARGEST_ERROR = 4.0  # grey levels, mean over an image: another chroma filter is 1 to 3, a neighbouring crop 10 and more
LOOK_AT_EVERY = 4  # of a batch's images
ENTRIES = (
    Entry("ours", "ours", "`pipeline.TrainLoader`, JPEG shards, channel mean"),
    Entry("ours-mean-image", "ours", "the same, mean image"),
    Entry("dali", "peer", "plain DALI CPU graph: image_crop, crop_mirror_normalize"),
    Entry("ffcv", "peer", "FFCV, jpg mode, one numba operation"),
    Entry("by-hand", "control", "simplejpeg, one numba kernel, threads"),
    Entry("tfdata", "peer", "tf.data, decode_and_crop_jpeg"),
    Entry("spdl", "peer", "SPDL, its own decoder, NumPy"),
    Entry("dataloader", "peer", "torch DataLoader, Pillow"),
    Entry("webdataset", "peer", "webdataset, Pillow"),
    Entry("mosaic", "peer", "Mosaic Streaming, Pillow"),
    Entry("litdata", "peer", "LitData, Pillow"),
    Entry("grain", "peer", "Grain, Pillow"),
    Entry("limit-full", "limit", "libjpeg-turbo, full decode, pixels thrown away"),
    Entry("limit-crop", "limit", "libjpeg-turbo, 224 crop to uint8 batches"),
    Entry("ours-uint8", "ours", "`pipeline.TrainLoader`, uint8 crops, the host's part of GPU training"),
    Entry("dali-uint8", "peer", "plain DALI CPU graph: image_crop alone, uint8"),
    Entry("ours-raw", "ours", "`pipeline.TrainLoader`, raw shards"),
    Entry("stock", "ours", "`pipeline.TrainLoader` by DALI's stock operators, JPEG shards, channel mean"),
    Entry("stock-uint8", "ours", "the same, uint8 crops"),
    Entry("stock-raw", "ours", "the same, raw shards"),
    Entry("dali-raw", "peer", "plain DALI CPU graph, raw: crop_mirror_normalize"),
    Entry("ffcv-raw", "peer", "FFCV, raw mode, the same numba operation"),
    Entry("by-hand-raw", "control", "numba kernel on mapped raw pixels, threads"),
    Entry("limit-convert", "limit", "C: raw pixels to float32 batches, streaming stores"),
)
AGAINST = (
    Entry("other", "ours", "the same loader of {}, JPEG shards, channel mean"),
    Entry("other-uint8", "ours", "the same, uint8 crops"),
    Entry("other-raw", "ours", "the same, raw shards"),
)
PAIRS = (
    *(("ours", "ffcv"), ("ours", "by-hand"), ("ours-uint8", "limit-crop"), ("ours-raw", "ffcv-raw")),
    *((f"ours{kind}", f"stock{kind}") for kind in ("", "-uint8", "-raw")),
    *((f"ours{kind}", f"other{kind}") for kind in ("", "-uint8", "-raw")),
)


def main() -> None:
    options = parse_arguments()
    race.run(options, [*ENTRIES, *(list_others(options.against) if options.against else ())], measure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Feeding a network: ours, peers and limits in alternation.")
    parser.add_argument("source", nargs="?", help="folder with JPEG photographs (default: a synthetic set)")
    parser.add_argument("--images", type=int, default=2048, help="samples; the source is repeated to fill them")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn")
    parser.add_argument("--skip", type=int, default=8, help="batches thrown away before the clock of a turn starts")
    parser.add_argument("--base", default="dali", help="what ratios are to")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help=f"a checkout of another version of this project: {', '.join(entry.name for entry in AGAINST)} race too",
    )
    race.add_options(parser, ENTRIES)
    options = parser.parse_args()
    if options.against and not (options.against / "pipeline" / "loader.py").is_file():
        parser.error(f"--against {options.against}: no pipeline/loader.py in it; expected a checkout of this project")
    if options.images < BATCH:
        parser.error(f"--images {options.images}: expected a batch, {BATCH}, or more")
    if options.rounds < 1 or options.seconds <= 0 or options.skip < 0:
        parser.error("--rounds, --seconds: expected more than 0; --skip: 0 or more")
    if options.base not in {entry.name for entry in ENTRIES}:
        parser.error(f"--base {options.base}: no such contestant")
    return options


def list_others(folder: Path) -> list[Entry]:
    """The contestants of another checkout, named by its commit."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = folder.absolute().name
    return [replace(entry, what=entry.what.format(commit)) for entry in AGAINST]


def measure(
    options: argparse.Namespace, entries: Sequence[Entry], cpus: set[int], scratch: Path
) -> tuple[str, dict[str, Any]]:
    """Everything: the table and the JSON document."""
    race.say("prepare: shards, samples, colours")
    data = prepare_data(options, scratch / "data")
    rows = {entry.name: Row(entry) for entry in entries}
    children: dict[str, Child] = {}

    def describe(name: str) -> dict[str, Any]:
        project = options.against.absolute() if name.startswith("other") else HERE.parent
        return {
            "samples": str(scratch / "data" / "samples"),
            "shards": data["shards"],
            # the same conversion serves both of a library's rows
            "out": str(scratch / name.removesuffix("-raw")),
            "workers": options.workers,
            "mean": data["mean"],
            "basis": data["basis"],
            "project": str(project),
            "paths": [str(project)],
        }

    def look(child: Child, row: Row) -> None:
        check_batch(child, row, scratch / f"batch-{row.entry.name}.npz", data)
        child.ask("run", skip=options.skip, seconds=options.seconds)  # warm-up

    with closing_all(children):
        race.enter(children, rows, SCRIPT, describe, look, options=options, cpus=cpus, scratch=scratch)
        foreign = alternate(
            children,
            rows,
            num_rounds=options.rounds,
            arguments={"skip": options.skip, "seconds": options.seconds},
            on_turn=race.say_turns(options),
        )
    pairs, notes = race.compare_pairs(rows, PAIRS)
    settings = {
        "samples": options.images,
        "distinct images": data["num_distinct"],
        "mean JPEG bytes": data["mean_bytes"],
        "batch": BATCH,
        "seconds a turn": options.seconds,
        "batches skipped before": options.skip,
        "cores": options.workers,
    }
    text, document = report(
        "Feeding",
        list(rows.values()),
        base=options.base,
        machine=describe_machine(cpus),
        settings=settings,
        foreign=foreign,
        columns={"mean error": lambda row: f"{row.extra['mean_error']:.2f}" if "mean_error" in row.extra else ""},
        notes=[*notes, "Mean error: a checked batch against the stored pixels by Pillow, grey levels."],
    )
    document["pairs"] = pairs
    return text, document


def check_batch(child: Child, row: Row, path: Path, data: dict[str, Any]) -> None:
    """Compare one batch with the stored pixels. Raises Failed for a batch that is not what was asked for."""
    if row.entry.name == "limit-full":
        return  # its pixels are thrown away; limit-crop shows that the codec's are right
    row.extra["comes_as"] = child.ask("check", path=str(path))
    with np.load(path, allow_pickle=False) as batch:
        images, labels = batch["images"], batch["labels"]
    path.unlink()
    is_uint8 = row.entry.name.endswith("-uint8") or row.entry.name == "limit-crop"
    if labels.ndim == 2 and labels.shape[1] == 5:  # DALI's readers give the five digits
        labels = np.array([int(bytes(digits)) for digits in labels.astype(np.uint8)])
    labels = labels.reshape(-1)
    if is_uint8:
        if images.shape == (BATCH, CROP_PX, CROP_PX, 3):
            images = images.transpose(0, 3, 1, 2)
        wanted: tuple[str, tuple[int, ...]] = ("uint8", (BATCH, 3, CROP_PX, CROP_PX))
    else:
        wanted = ("float32", (BATCH, 3, CROP_PX, CROP_PX))
    if (str(images.dtype), images.shape) != wanted or labels.shape != (BATCH,):
        raise Failed(f"batch is {images.dtype} {images.shape}, labels {labels.shape}, expected {wanted}")
    stored = load_by_label(Path(data["shards"]["jpeg"]).parent / "samples")
    images, labels = images[::LOOK_AT_EVERY], labels[::LOOK_AT_EVERY]
    unknown = sorted(set(labels.tolist()) - stored.keys())
    if unknown:
        raise Failed(f"label {unknown[0]} is none of the {len(stored)} there are")
    found = [find_crop(image, stored[label]) for image, label in zip(images, labels.tolist(), strict=True)]
    errors = np.array([crop.error for crop in found])
    if row.entry.name == "ours-mean-image":
        limit = 100.0  # a mean image is no constant: the crop is found all the same, the residue is the mean image's
    else:
        limit = LARGEST_ERROR
    if errors.mean() > limit:
        raise Failed(f"pixels differ from the stored ones by {errors.mean():.1f} grey levels, limit {limit}")
    if len({(crop.y, crop.x) for crop in found}) < len(found) // 2:
        raise Failed("crops are not at random offsets")
    if not is_uint8:
        num_flipped = sum(crop.flip for crop in found)
        if not 0.15 < num_flipped / len(found) < 0.85:  # beyond that by chance once in 100,000
            raise Failed(f"{num_flipped} of {len(found)} images are mirrored, expected about half")
        spread = np.std([crop.shift for crop in found], axis=0)
        expected = np.sqrt((np.array(data["basis"]) ** 2).sum(1))
        if (spread < expected / 2).any() or (spread > expected * 2).any():
            raise Failed(f"colour shifts spread by {spread.round(2)}, expected about {expected.round(2)} (lighting)")
    row.extra["mean_error"] = float(errors.mean())


class Crop:
    """Where a picture was found in a stored image, what was added to each channel, and the mean error left over."""

    def __init__(self, y: int, x: int, flip: bool, shift: NDArray[np.float32], error: float) -> None:
        self.y, self.x, self.flip, self.shift, self.error = y, x, flip, shift, error


def find_crop(image: NDArray[Any], stored: NDArray[np.uint8]) -> Crop:
    """The offset, flip and shift per channel that make `stored` (256, 256, 3) most like `image` (3, 224, 224)."""
    step = 32  # a grid of samples finds the place, all pixels give the error
    target = image.astype(np.float32)
    grid = target[:, ::step, ::step]
    windows = np.lib.stride_tricks.sliding_window_view(
        stored.transpose(2, 0, 1).astype(np.float32), (CROP_PX, CROP_PX), axis=(1, 2)
    )
    best: tuple[float, int, int, bool] = (np.inf, 0, 0, False)
    for flip in (False, True):
        # (3, 33, 33, rows, columns)
        seen = (windows[..., ::-1] if flip else windows)[..., ::step, ::step]
        residue = grid[:, None, None] - seen
        residue -= residue.mean((3, 4), keepdims=True)
        cost = np.abs(residue).mean((0, 3, 4))
        y, x = np.unravel_index(cost.argmin(), cost.shape)
        best = min(best, (float(cost[y, x]), int(y), int(x), flip))
    _, y, x, flip = best
    crop = stored[y : y + CROP_PX, x : x + CROP_PX].transpose(2, 0, 1).astype(np.float32)
    residue = target - (crop[..., ::-1] if flip else crop)
    shift = residue.mean((1, 2))
    return Crop(y, x, flip, shift, float(np.abs(residue - shift[:, None, None]).mean()))


def load_by_label(folder: Path) -> dict[int, NDArray[np.uint8]]:
    """A stored image's pixels by label: every distinct image is a class of its own."""
    labels = np.load(folder / "labels.npy", allow_pickle=False)
    raw = np.memmap(folder / "raw.bin", np.uint8, "r").reshape(len(labels), SIZE_PX, SIZE_PX, 3)
    return {int(label): raw[index] for index, label in enumerate(labels)}


if __name__ == "__main__":
    main()
