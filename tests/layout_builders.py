"""Each layout built from a folder tree (train/<wnid>/*, val/<wnid>/*), to compare layouts image by image."""

import io
import shutil
import tarfile
from pathlib import Path

WNID_SUFFIX_SPLITS = {"train": "train", "val": "validation"}


def fill(root: Path, *names: str) -> Path:
    """Files of these names, each of them holding its name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def list_tree(tree: Path, split: str) -> list[tuple[str, Path]]:
    """(wnid, file) of a split, by class and name."""
    return [(path.parent.name, path) for path in sorted((tree / split).glob("*/*")) if path.is_file()]


def list_wnids(tree: Path) -> list[str]:
    return sorted(path.name for path in (tree / "train").iterdir())


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def build_tar(members: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members:
            add_member(tar, name, data)
    return buffer.getvalue()


def build_kaggle(tree: Path, root: Path) -> Path:
    folder = root / "ILSVRC/Data/CLS-LOC"
    shutil.copytree(tree / "train", folder / "train")
    (folder / "val").mkdir()
    (folder / "test").mkdir()
    rows = ["ImageId,PredictionString"]
    for wnid, path in reversed(list_tree(tree, "val")):  # the real list is in no order
        shutil.copy(path, folder / "val" / path.name)
        rows.append(f"{path.stem},{wnid} 85 1 499 272 {wnid} 1 2 3 4 ")
    (root / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} name of {wnid}\n" for wnid in list_wnids(tree)))
    return root


def build_meta(wnids: list[str], num_inner: int = 3) -> bytes:
    """A meta.mat as the development kit's: the classes in an order of their own, then synsets above them."""
    import numpy as np
    from scipy.io import savemat

    names = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children"]  # and two more, of no use
    rows = [(number, wnid, f"words of {wnid}", "gloss", 0, []) for number, wnid in enumerate(wnids, start=1)]
    for number in range(1, num_inner + 1):
        rows.append((len(wnids) + number, f"n9{number:07d}", "above", "gloss", 2, [1, 2]))
    synsets = np.zeros((len(rows), 1), dtype=[(name, object) for name in names])
    for place, row in enumerate(rows):
        synsets[place, 0] = tuple(cell if isinstance(cell, str) else np.array(cell, dtype=float) for cell in row)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets}, do_compression=True)
    return buffer.getvalue()


def build_devkit(meta: bytes, truth: list[int]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        add_member(tar, "ILSVRC2012_devkit_t12/readme.txt", b"read me")
        add_member(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta)
        lines = "".join(f"{number}\n" for number in truth).encode()
        add_member(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", lines)
    return buffer.getvalue()


def build_official(tree: Path, root: Path) -> Path:
    """Validation images must be called ILSVRC2012_val_00000001.JPEG and so on, without a gap."""
    root.mkdir(parents=True, exist_ok=True)
    by_class: dict[str, list[tuple[str, bytes]]] = {wnid: [] for wnid in list_wnids(tree)}
    for wnid, path in reversed(list_tree(tree, "train")):
        by_class[wnid].append((path.name, path.read_bytes()))
    inner = [(f"{wnid}.tar", build_tar(members)) for wnid, members in reversed(by_class.items())]
    (root / "ILSVRC2012_img_train.tar").write_bytes(build_tar(inner))
    val = sorted(list_tree(tree, "val"), key=lambda pair: pair[1].name)
    members = [(path.name, path.read_bytes()) for _, path in val]
    (root / "ILSVRC2012_img_val.tar").write_bytes(build_tar(members[::-1]))
    ids = sorted(by_class, key=lambda wnid: wnid[::-1])  # ILSVRC ids are in no order of wnids
    truth = [ids.index(wnid) + 1 for wnid, _ in val]
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(build_devkit(build_meta(ids), truth))
    return root


def build_parquet(tree: Path, root: Path, *, row_group_size: int = 100, num_files: int = 2, **options) -> Path:
    """As Hugging Face's: shuffled rows, `_<wnid>` behind the names, class names in the schema's metadata."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / "data").mkdir(parents=True)
    wnids = list_wnids(tree)
    feature = {"_type": "ClassLabel", "names": [f"name of {wnid}" for wnid in wnids]}
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": feature}}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata={"huggingface": json.dumps(info)})
    for split, called in WNID_SUFFIX_SPLITS.items():
        rows = [
            {
                "image": {"bytes": path.read_bytes(), "path": f"{path.stem}_{wnid}{path.suffix}"},
                "label": wnids.index(wnid),
            }
            for wnid, path in sorted(list_tree(tree, split), key=lambda pair: pair[1].name[::-1])
        ]
        for number in range(num_files):
            table = pa.Table.from_pylist(rows[number::num_files], schema=schema)
            path = root / f"data/{called}-{number:05d}-of-{num_files:05d}.parquet"
            pq.write_table(table, path, row_group_size=row_group_size, **options)
    test = pa.Table.from_pylist([{"image": {"bytes": b"x", "path": "t.JPEG"}, "label": -1}], schema=schema)
    pq.write_table(test, root / "data/test-00000-of-00001.parquet")
    return root


def build_webdataset(tree: Path, root: Path, *, num_files: int = 2) -> Path:
    """As WebDataset's writers make them: key without a dot, ending in lower case, label as text, JSON beside."""
    root.mkdir(parents=True, exist_ok=True)
    wnids = list_wnids(tree)
    for split, called in WNID_SUFFIX_SPLITS.items():
        pairs = sorted(list_tree(tree, split), key=lambda pair: pair[1].name[::-1])
        for number in range(num_files):
            members = []
            for wnid, path in pairs[number::num_files]:
                members.append((f"{path.stem}.cls", str(wnids.index(wnid)).encode()))
                members.append((f"{path.stem}.jpg", path.read_bytes()))
                members.append((f"{path.stem}.json", b"{}"))
            (root / f"set-{called}-{number:04d}.tar").write_bytes(build_tar(members))
    return root


def build_folder(tree: Path, root: Path) -> Path:
    return shutil.copytree(tree, root, dirs_exist_ok=True)


BUILDERS = {
    "folder": build_folder,
    "kaggle": build_kaggle,
    "official": build_official,
    "parquet": build_parquet,
    "webdataset": build_webdataset,
}
