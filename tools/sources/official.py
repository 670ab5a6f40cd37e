"""ImageNet as image-net.org gives it: ILSVRC2012_img_train.tar (a tar of a thousand tars) and ILSVRC2012_img_val.tar,
whose headers are read once, and the development kit that says what val shows. Nothing is extracted."""

import gzip
import io
import re
import tarfile
import zlib
from pathlib import Path

from pipeline.common.errors import UserError
from pipeline.images.imagenet import load_ilsvrc2012
from tools.sources.archive import MemberReader, scan_all, scan_tar
from tools.sources.listing import Entry, Listing, name_some

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
EXPECTED = f"SOURCE/{TRAIN}, SOURCE/{VAL} and SOURCE/{DEVKIT}"
_META, _TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
_VAL_NAME = re.compile(r"ILSVRC2012_val_([0-9]{8})\.JPEG")
_MAX_DEVKIT_BYTES = 64 << 20  # of either file: they have less than one megabyte
_NUM_TRAIN_IMAGES = 1_281_167


def find(root: Path) -> Path | None:
    """`root`, if one of the official tars is in it."""
    return root if (root / TRAIN).is_file() or (root / VAL).is_file() else None


def scan(root: Path, remarks: list[str] | None = None) -> Listing:
    """List the tars in `root`. Raises UserError for a missing, truncated or foreign file."""
    if not (root / TRAIN).is_file():
        raise UserError(f"{root}: holds {VAL} and no {TRAIN}, which has the training images; fetch it")
    has_val = (root / VAL).is_file()
    # The kit comes first: it takes a moment, and what is missing should be said before a scan of minutes.
    kit = _read_devkit(root) if has_val else None
    listing = Listing(
        "official", root, MemberReader(str(root), (TRAIN, VAL)), remarks=[] if remarks is None else remarks
    )
    _add_train(listing)
    if kit:
        wnids, titles, truth = kit
        listing.titles = titles
        _add_val(listing, wnids, truth)
    others = sorted(path.name for path in root.glob("ILSVRC2012_*.tar") if path.name not in (TRAIN, VAL))
    if others:
        listing.remarks.append(f"{name_some(others)} not used: not of the classification task, or without labels")
    return listing


def _add_train(listing: Listing) -> None:
    path = listing.root / TRAIN
    tars: dict[str, tarfile.TarInfo] = {}
    for member in scan_tar(path):
        wnid = member.name.rpartition("/")[2].removesuffix(".tar")
        if not member.isreg() or not member.name.endswith(".tar") or not wnid:
            raise UserError(
                f"{path}: holds {member.name!r}, expected a tar of tars, one per class, such as 'n01440764.tar'"
            )
        if wnid in tars:
            raise UserError(f"{path}: holds {wnid + '.tar'!r} twice, expected one tar per class; fetch it again")
        tars[wnid] = member
    if not tars:
        raise UserError(f"{path}: is empty, expected a tar per class; fetch it again")
    wnids, empty = sorted(tars), []
    for wnid, images in zip(wnids, scan_all(lambda wnid: _list_images(path, tars[wnid]), wnids, "scan"), strict=True):
        head = f"{TRAIN}/{wnid}.tar/"
        listing.train += [Entry(head + base, listing.label_of(wnid), (0, *place)) for base, place in images.items()]
        if not images:
            empty.append(wnid)
    if empty:
        listing.remarks.append(f"{TRAIN}: {len(empty)} class tars without an image passed over: {name_some(empty)}")
    if wnids == list(load_ilsvrc2012()) and len(listing.train) != _NUM_TRAIN_IMAGES:
        listing.remarks.append(f"{TRAIN}: {len(listing.train):,} images, ImageNet has {_NUM_TRAIN_IMAGES:,}")


def _list_images(path: Path, inner: tarfile.TarInfo | None = None) -> dict[str, tuple[int, int]]:
    """Offset and size of each file, by its base name, of a tar or of one inside it."""
    images: dict[str, tuple[int, int]] = {}
    odd, twice = [], []
    for member in scan_tar(path, inner.offset_data, inner.size, name=inner.name) if inner else scan_tar(path):
        base = member.name.rpartition("/")[2]
        if not member.isreg() or not base:
            odd.append(member.name)
        if base in images:
            twice.append(base)
        images[base] = member.offset_data, member.size
    where = f"{path}, {inner.name!r}" if inner else path
    if odd:
        raise UserError(f"{where}: {len(odd)} members are no plain files: {name_some(sorted(odd))}; fetch it again")
    if twice:
        raise UserError(f"{where}: {len(twice)} images are there twice: {name_some(sorted(twice))}; fetch it again")
    return images


def _add_val(listing: Listing, wnids: dict[int, str], truth: list[int]) -> None:
    """The line of the ground truth is the number in the image's name."""
    path = listing.root / VAL
    images = _list_images(path)
    for base, place in images.items():
        match = _VAL_NAME.fullmatch(base)
        if not match or not 1 <= int(match[1]) <= len(truth):
            raise UserError(
                f"{path}: holds {base!r}, expected 'ILSVRC2012_val_00000001.JPEG' to "
                f"'ILSVRC2012_val_{len(truth):08d}.JPEG', as many as the development kit has labels"
            )
        label = listing.label_of(wnids[truth[int(match[1]) - 1]])
        listing.val.append(Entry(f"{VAL}/{base}", label, (1, *place)))
    if num_absent := len(truth) - len(images):
        listing.remarks.append(f"{VAL}: {num_absent:,} of the {len(truth):,} images with labels are not there")


def _read_devkit(root: Path) -> tuple[dict[int, str], dict[str, str], list[int]]:
    """Wnid by ILSVRC id, name by wnid, ILSVRC id of each validation image."""
    path = root / DEVKIT
    if path.is_file():
        files = _unpack(path)
    elif (folder := root / DEVKIT.removesuffix(".tar.gz")).is_dir():
        path = folder
        files = {name: (folder / name).read_bytes() for name in (_META, _TRUTH) if (folder / name).is_file()}
    else:
        raise UserError(
            f"{root}: holds {VAL} and no {DEVKIT}, which has the labels of the validation images; fetch it from "
            f"image-net.org and put it there, or move {VAL} away to go without validation"
        )
    if missing := [name for name in (_META, _TRUTH) if name not in files]:
        raise UserError(
            f"{path}: has no {' and no '.join(missing)}, expected the kit of 2012's tasks 1 and 2; fetch it again"
        )
    wnids, titles = read_meta(files[_META], f"{path}, {_META}")
    return wnids, titles, read_truth(files[_TRUTH], f"{path}, {_TRUTH}", wnids)


def _unpack(path: Path) -> dict[str, bytes]:
    """The two files we need, by their last two names; whatever else the archive says is not looked at."""
    files = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                name = "/".join(member.name.split("/")[-2:])
                if member.isreg() and name in (_META, _TRUTH):
                    if member.size > _MAX_DEVKIT_BYTES:
                        raise UserError(f"{path}: {member.name!r} has {member.size} bytes, expected fewer than "
                                        f"{_MAX_DEVKIT_BYTES}; fetch it again")  # fmt: skip
                    content = tar.extractfile(member)
                    files[name] = content.read() if content else b""
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged ({error}), expected a gzipped tar; fetch it again") from error
    return files


def read_meta(data: bytes, where: str) -> tuple[dict[int, str], dict[str, str]]:
    """Wnid by ILSVRC id and name by wnid of the lowest synsets of meta.mat (1000 of its 1860)."""
    from scipy.io import loadmat

    try:
        rows = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        leaves = [row for row in rows if int(row["num_children"]) == 0]
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        titles = {str(row["WNID"]): str(row["words"]) for row in leaves}
    except Exception as error:  # a broken file makes scipy raise almost anything
        reason = " ".join(str(error).split())
        raise UserError(
            f"{where}: unreadable ({type(error).__name__}: {reason}), expected MATLAB's synsets; fetch it again"
        ) from error
    if not wnids or len(wnids) != len(leaves) or len(titles) != len(leaves):
        raise UserError(f"{where}: {len(leaves)} lowest synsets, {len(wnids)} ids and {len(titles)} wnids, expected as "
                        "many of each; fetch it again")  # fmt: skip
    return wnids, titles


def read_truth(data: bytes, where: str, wnids: dict[int, str]) -> list[int]:
    """ILSVRC ids, a line each."""
    ids = []
    for number, line in enumerate(data.splitlines(), start=1):
        text = line.strip().decode("ascii", "replace")
        if not text.isdigit() or int(text) not in wnids:
            raise UserError(
                f"{where}, line {number}: {text[:40]!r}, expected an id of meta.mat ({min(wnids)} to {max(wnids)})"
            )
        ids.append(int(text))
    if not ids:
        raise UserError(f"{where}: is empty, expected a line per validation image; fetch it again")
    return ids
