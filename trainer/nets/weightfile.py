"""Tensors by name out of a file that somebody else made: safetensors, a torch state dict, or an .npz.

The decision that shaped it: the content says what a file is, not its name; readers that run no code open it
(safetensors, torch's weights_only, NumPy without pickles), after its size was looked at, and whatever they raise is
told in one line. Left out: what the tensors mean (interchange.py).
"""

import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.common.errors import UserError

_NPY = b"\x93NUMPY"
MAX_BYTES = 8 << 30  # AlexNet at four times its width, the most that a recipe allows, has 4 GB


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file, by its content. Raises UserError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); name a file of weights") from error
    if not 9 <= size <= MAX_BYTES:
        raise UserError(f"{path}: {size:,} bytes, expected the weights of an AlexNet (at most {MAX_BYTES >> 30} GiB)")
    try:
        if head.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
            if sum(member.file_size for member in members) > MAX_BYTES:
                raise UserError(f"{path}: unpacks to more than {MAX_BYTES >> 30} GiB, which no AlexNet has")
            if all(member.filename.endswith(".npy") for member in members):
                return _read_npz(path), {}
        elif head[8:] == b"{" and int.from_bytes(head[:8], "little") < size:
            return _read_safetensors(path)
        if head.startswith(_NPY):
            raise UserError(
                f"{path}: a NumPy array (.npy), in which lists of blobs are pickled, so it may hold code; expected an "
                ".npz of arrays. If you trust it: d = np.load(FILE, allow_pickle=True, encoding='latin1').item(); "
                "np.savez('alexnet.npz', **{k + c: a for k, v in d.items() for c, a in zip(('_w', '_b'), v)})"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's age: what cannot be read is told below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than tensors (code in its pickle?), which is refused; save its state dict alone"
        ) from error
    except Exception as error:  # readers raise anything when fed broken bytes
        what = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: cannot be read as weights ({type(error).__name__}: {what})") from error
    nested = loaded.get("state_dict") if isinstance(loaded, dict) else None
    found = nested if isinstance(nested, dict) else loaded
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path}: not a state dict (names with a tensor each); save model.state_dict() alone")
    return {str(name): tensor for name, tensor in found.items()}, {}


def _read_npz(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
