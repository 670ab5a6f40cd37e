"""How fast are images prepared, and how well? Ours, peers and the codec's limits, alternated in one run.

    python benchmarks/prepare.py SOURCE --python PEERS/bin/python --json prepare.json

SOURCE holds images at any depth (default: a synthetic set). Every way turns the same files into 256x256 JPEGs of
quality 90 on the same cores. Before the clock runs, each one's output is decoded and compared with Pillow's LANCZOS
from a full decode: count, shape, and the mean PSNR that the table shows. README.md says how to install the peers.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import race
from harness.children import Child, Failed, closing_all
from harness.machine import describe_machine
from harness.racetable import report
from harness.rounds import Entry, Row, alternate
from harness.source_images import lay_out, list_photographs, make_synthetic
from PIL import Image

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "peers" / "prepare.py"
SIZE_PX = 256
ENDINGS = (".jpg", ".jpeg")
NUM_STAGED = 400  # images on which the stages of ours are timed
LEAST_PSNR_DB = 28.0  # photographs shifted by one pixel: 24
ENTRIES = (
    Entry("ours", "ours", "`tools.sharding.make.make_shards`"),
    Entry("simplejpeg", "peer", "simplejpeg decode, OpenCV AREA, simplejpeg encode, webdataset TarWriter"),
    Entry("opencv", "peer", "OpenCV alone, as img2dataset does, TarWriter"),
    Entry("ffcv", "peer", "FFCV DatasetWriter, jpg, longer side to 341, no crop"),
    Entry("dali-linear", "peer", "DALI linear resize, simplejpeg encode, TarWriter"),
    Entry("dali-lanczos3", "peer", "DALI lanczos3 resize, simplejpeg encode, TarWriter"),
    Entry("pillow", "peer", "Pillow pool, webdataset ShardWriter"),
    Entry("litdata", "peer", "LitData optimize around simplejpeg + AREA"),
    Entry("pyvips", "peer", "pyvips thumbnail, TarWriter"),
    Entry("vipsthumbnail", "peer", "vipsthumbnail, files in a folder"),
    Entry("decode", "limit", "simplejpeg full decode, nothing else"),
    Entry("decode+encode", "limit", "simplejpeg decode, 256x256 cut and encoded, not written"),
)


def main() -> None:
    race.run(parse_arguments(), ENTRIES, measure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Preparation of images: ours, peers and limits in alternation.")
    parser.add_argument("source", nargs="?", help="folder with JPEG photographs (default: a synthetic set)")
    parser.add_argument("--images", type=int, default=2000, help="images a round; the source is repeated to fill it")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--base", help="what ratios are to (default: the fastest peer)")
    parser.add_argument("--fidelity", type=int, default=400, help="distinct images whose pixels are compared")
    race.add_options(parser, ENTRIES)
    options = parser.parse_args()
    for name in ("images", "rounds", "fidelity"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected 1 or more")
    if options.base and options.base not in {entry.name for entry in ENTRIES}:
        parser.error(f"--base {options.base}: no such contestant")
    return options


def measure(
    options: argparse.Namespace, entries: Sequence[Entry], cpus: set[int], scratch: Path
) -> tuple[str, dict[str, Any]]:
    """Everything: the table and the JSON document."""
    source = Path(options.source) if options.source else make_synthetic(scratch / "synth", options.images)
    distinct, num_other = list_photographs(source)
    if not distinct:
        raise SystemExit(f"error: {source}: no RGB or grey JPEG at any depth, expected at least one")
    files = lay_out(distinct, scratch / "tree", options.images)
    lay_out(distinct, scratch / "tree-tiny", options.workers)
    lay_out(distinct, scratch / "tree-few", min(NUM_STAGED, options.images))
    (scratch / "files.txt").write_text("".join(f"{file}\n" for file in files), encoding="utf-8")
    num_compared = min(options.fidelity, len(distinct), options.images)

    rows = {entry.name: Row(entry) for entry in entries}
    children: dict[str, Child] = {}

    def describe(name: str) -> dict[str, Any]:
        return {
            "list": str(scratch / "files.txt"),
            "tree": str(scratch / "tree"),
            "out": str(scratch / f"out-{name}"),
            "workers": options.workers,
            # small enough that the last shard keeps nobody waiting
            "samples_per_shard": max(1, options.images // (4 * options.workers)),
            "paths": [str(HERE.parent)],
        }

    def look(child: Child, row: Row) -> None:
        warm_up(child, row, options, files[:num_compared], scratch / f"stored-{row.entry.name}")

    with closing_all(children):
        race.enter(children, rows, SCRIPT, describe, look, options=options, cpus=cpus, scratch=scratch)
        foreign = alternate(
            children,
            rows,
            num_rounds=options.rounds,
            arguments={"num": options.images},
            on_turn=race.say_turns(options),
        )
        stages = ask_stages(children["ours"]) if "ours" in children and rows["ours"].state == "ok" else {}

    sizes = np.array([Image.open(file).size for file in distinct])
    machine = {**describe_machine(cpus), "scratch": file_system(scratch)}
    settings = {
        "images a round": options.images,
        "distinct images": len(distinct),
        "mean size px": f"{sizes[:, 0].mean():.0f}x{sizes[:, 1].mean():.0f}",
        "files left out (not RGB or grey JPEG)": num_other,
        "images compared": num_compared,
        "cores": options.workers,
    }
    notes = [
        "PSNR: mean over images, stored against Pillow LANCZOS from a full decode, in dB. "
        "Start-up: seconds that a call takes for a handful of images, included in images/s."
    ]
    if stages:
        notes.append("Ours, one process, ms an image: " + ", ".join(f"{k} {v:.3f}" for k, v in stages.items()) + ".")
    base = options.base or fastest_peer(rows)
    text, document = report(
        "Preparation",
        list(rows.values()),
        base=base,
        machine=machine,
        settings=settings,
        foreign=foreign,
        columns={
            "PSNR dB": lambda row: f"{row.extra['psnr_db']:.1f}" if "psnr_db" in row.extra else "",
            "start-up s": lambda row: f"{row.extra['start_up_s']:.2f}" if "start_up_s" in row.extra else "",
        },
        notes=notes,
    )
    document["ours_stages_ms"] = stages
    return text, document


def warm_up(child: Child, row: Row, options: argparse.Namespace, files: Sequence[str], folder: Path) -> None:
    """One round, its output compared; then the cost of a call. Raises Failed for an output that is not the work."""
    done, _, _ = child.ask("run", num=options.images)
    if done != options.images:
        raise Failed(f"prepared {done} images of {options.images}")
    if row.entry.kind != "limit":
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        num_stored = child.ask("stored", folder=str(folder))
        if num_stored != options.images:
            raise Failed(f"stored {num_stored} images of {options.images}")
        row.extra["psnr_db"] = mean_psnr(folder, files, whole=row.entry.name == "ffcv")
        row.extra["mean_bytes"] = round(np.mean([file.stat().st_size for file in folder.glob("*.jpg")]))
        shutil.rmtree(folder)
        if row.extra["psnr_db"] < LEAST_PSNR_DB:
            raise Failed(f"mean PSNR {row.extra['psnr_db']:.1f} dB, expected {LEAST_PSNR_DB} or more: other pixels")
        row.extra["start_up_s"] = sorted(child.ask("run", num=options.workers)[1] for _ in range(3))[1]
    if row.entry.name == "vipsthumbnail":
        row.versions["libvips"] = child.ask("version")


def mean_psnr(folder: Path, files: Sequence[str], *, whole: bool) -> float:
    """Mean PSNR (dB) of `folder`/<position>.jpg against the reference of files[position]; `whole`: no crop, any size.

    Raises Failed for an image that is missing or not 256x256 RGB or grey.
    """
    values = []
    for position, file in enumerate(files):
        path = folder / f"{position:09d}.jpg"
        if not path.is_file():
            raise Failed(f"image {position} is not in the output")
        with Image.open(path) as image:
            # vipsthumbnail stores a grey image as it is
            if image.mode not in ("RGB", "L") or (image.size != (SIZE_PX, SIZE_PX) and not whole):
                raise Failed(f"image {position} is {image.mode} {image.size}, expected RGB of {SIZE_PX} x {SIZE_PX}")
            stored = np.asarray(image.convert("RGB"), np.float64)
        reference = np.asarray(refer(Path(file), (stored.shape[1], stored.shape[0]) if whole else None), np.float64)
        error = max(1e-3, float(np.mean((stored - reference) ** 2)))
        values.append(10 * np.log10(255**2 / error))
    return float(np.mean(values))


def refer(file: Path, size: tuple[int, int] | None) -> Image.Image:
    """Full decode, Pillow LANCZOS: to `size`, or the shorter side to 256 and the central 256x256 of that."""
    with Image.open(file) as image:
        pixels = image.convert("RGB")
    if size:
        return pixels.resize(size, Image.Resampling.LANCZOS)
    shorter = min(pixels.size)
    wide, high = (max(SIZE_PX, round(side * SIZE_PX / shorter)) for side in pixels.size)
    left, top = (wide - SIZE_PX) // 2, (high - SIZE_PX) // 2
    resized = pixels.resize((wide, high), Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + SIZE_PX, top + SIZE_PX))


def ask_stages(child: Child) -> dict[str, float]:
    return dict(child.ask("stages"))


def fastest_peer(rows: dict[str, Row]) -> str | None:
    peers = [row for row in rows.values() if row.entry.kind == "peer" and row.rates]
    return max(peers, key=lambda row: float(np.median(row.rates))).entry.name if peers else None


def file_system(path: Path) -> str:
    """Type of the file system that holds `path`."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    best = max((m for m in mounts if path.is_relative_to(m[1])), key=lambda mount: len(mount[1]))
    return best[2]


if __name__ == "__main__":
    main()
