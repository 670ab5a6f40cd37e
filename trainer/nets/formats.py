"""Files of weights: ours as safetensors, torchvision's AlexNet, Caffe's bvlc_alexnet; told apart by content."""

import io
import json
import pickle
import re
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.colors import ColorStats
from pipeline.common.errors import UserError
from pipeline.common.files import write_atomic
from pipeline.images.imagenet import load_ilsvrc2012
from pipeline.manifest import IMAGE_SIZE_PX, ClassEntry
from pipeline.options import CROP_SIZE_PX
from pipeline.shards import ShardSet
from trainer import checkpoint
from trainer.nets.weights import Weights, check, list_classes, load_checkpoint, load_run, parse_classes
from trainer.recipe import RECIPES, Recipe, from_dict, to_dict
from trainer.record.runs import CONFIG

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
    if head.startswith(_NPY):
        raise UserError(
            f"{path}: a NumPy array (.npy), in which lists of blobs are pickled, so it may hold code; expected an "
            ".npz of arrays. If you trust it: d = np.load(FILE, allow_pickle=True, encoding='latin1').item(); "
            "np.savez('alexnet.npz', **{k + c: a for k, v in d.items() for c, a in zip(('_w', '_b'), v)})"
        )
    try:
        if head[8:] == b"{" and int.from_bytes(head[:8], "little") < size:
            with safe_open(path, framework="pt") as safe:
                return {name: safe.get_tensor(name) for name in safe.keys()}, safe.metadata() or {}  # noqa: SIM118
        if head.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
            if sum(member.file_size for member in members) > MAX_BYTES:
                raise UserError(f"{path}: unpacks to more than {MAX_BYTES >> 30} GiB, which no AlexNet has")
            if all(member.filename.endswith(".npy") for member in members):
                with np.load(path, allow_pickle=False) as arrays:
                    return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}, {}
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


LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
_MARK, _VERSION, _MEAN_IMAGE = "alexnet-dali", "1", "colors.mean_image"

OWT = RECIPES["owt"]
# torchvision's preset: mean and standard deviation of each channel, of pixels in [0, 1].
_OWT_MEAN, _OWT_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_OWT_LAYERS = dict(
    zip([*(f"features.{n}" for n in (0, 3, 6, 8, 10)), *(f"classifier.{n}" for n in (1, 4, 6))], LAYERS, strict=True)
)
# One GPU: LRN over all maps, with alpha / n and k 1 (caffe.proto's default). Its 227x227 crop has pixels where ours has
# the three zeros. Training as in its solver; only the weights of fc6 and fc7 began at 0.005 there.
CAFFE = replace(
    RECIPES["paper"],
    name="caffe",
    mean="channel",
    lighting=None,
    lrn_k=1.0,
    lrn_alpha_over_n=True,
    lrn_across_towers=True,
    hidden_bias=0.1,
    bias_decay=0.0,
    bias_lr=0.02,
    global_batch_size=256,
    schedule="milestones",
    lr_milestones=(21, 41, 61, 81),
)
_CAFFE_MEAN = (123.0, 117.0, 104.0)  # RGB; train_val.prototxt of the reference net: mean_value 104, 117, 123 (BGR)
_CAFFE_NAME = re.compile(r"(conv[1-5]|fc[6-8])[._/-]?(weights?|w|0|bias(?:es)?|b|1)(?::0)?")


def load_any(path: Path, which: str = "best", shards: ShardSet | None = None, *, is_completed: bool = True) -> Weights:
    """The net of a run's folder, or in a file of weights; see load_run. Raises UserError if it cannot be used."""
    if path.is_dir():
        return load_run(path, which, shards, is_completed=is_completed)
    if not checkpoint.is_sealed(path):
        return load_file(path)
    run = path.resolve().parent.parent
    if (run / CONFIG).is_file():
        return load_run(run, str(path), shards, is_completed=is_completed)
    return load_checkpoint(path)


def load_file(path: Path) -> Weights:
    """The net in a safetensors file, a state dict (.pth) or an .npz. Raises UserError for anything else."""
    tensors, metadata = read_tensors(path)
    if _MARK in metadata:
        return _from_ours(path, tensors, metadata)
    tensors = {re.sub(r"\bmodule\.", "", name): tensor for name, tensor in tensors.items()}  # torch's DataParallel
    if set(_OWT_LAYERS) <= {name.rpartition(".")[0] for name in tensors}:
        state = {_rename(name): tensor.detach().clone() for name, tensor in tensors.items()}
        mean, std = (255 * np.array(values) for values in (_OWT_MEAN, _OWT_STD))
        return _from_others(path, "torchvision", OWT, state, mean, std)
    if {match[1] for name in tensors if (match := _CAFFE_NAME.fullmatch(name))} == set(LAYERS):
        state = _order_caffe(path, tensors)
        return _from_others(path, "Caffe's bvlc_alexnet", CAFFE, state, np.array(_CAFFE_MEAN), np.ones(3))
    found = ", ".join(sorted(tensors)[:3]) or "nothing"
    raise UserError(
        f"{path}: holds tensors named {found:.100}; expected features.0.weight ... (torchvision's AlexNet), conv1 ... "
        "fc8 (Caffe's bvlc_alexnet), or a file of alexnet-export"
    )


def save_safetensors(path: Path, weights: Weights) -> None:
    """Everything to use the net with: tensors, the mean image, and as metadata recipe, classes and colours."""
    metadata = {"format": "pt", _MARK: _VERSION, "recipe": json.dumps(to_dict(weights.recipe))}
    tensors = {name: tensor.contiguous() for name, tensor in weights.state.items()}
    if weights.classes:
        metadata["classes"] = json.dumps(list_classes(weights.classes))
    if weights.shards_fingerprint:
        metadata["shards_fingerprint"] = weights.shards_fingerprint
    if weights.colors:
        colors = weights.colors
        metadata["colors"] = json.dumps(
            {"mean": colors.mean.tolist(), "covariance": colors.covariance.tolist(), "num_pixels": colors.num_pixels}
        )
        metadata["input"] = json.dumps(describe_input(weights))
        tensors[_MEAN_IMAGE] = torch.from_numpy(np.ascontiguousarray(colors.mean_image))
    write_atomic(path, save(tensors, metadata))


def save_torchvision(path: Path, weights: Weights) -> None:
    """A state dict that torchvision.models.AlexNet loads. Raises UserError for a net that computes something else."""
    _check_same(weights, OWT, "torchvision's AlexNet")
    state = {
        f"{name}.{kind}": weights.state[f"{layer}.{kind}"].contiguous().clone()
        for name, layer in sorted(_OWT_LAYERS.items())
        for kind in ("bias", "weight")
    }
    serialised = io.BytesIO()
    torch.save(state, serialised)
    write_atomic(path, serialised.getvalue())


def save_caffe(path: Path, weights: Weights) -> None:
    """An .npz of Caffe's blobs (BGR). Raises UserError for a net that bvlc_alexnet does not compute."""
    _check_same(weights, replace(CAFFE, width=weights.recipe.width), "Caffe's bvlc_alexnet")  # a prototxt has sizes
    state = {**weights.state, "conv1.weight": weights.state["conv1.weight"].flip(1)}
    serialised = io.BytesIO()
    np.savez(serialised, **{name: tensor.numpy() for name, tensor in state.items()})  # type: ignore[arg-type]
    write_atomic(path, serialised.getvalue())


def describe_input(weights: Weights) -> dict[str, Any]:
    """How pixels become the net's input, for other programs: (pixel - mean) / scale, RGB 0-255, 224x224."""
    assert weights.colors is not None
    colors, recipe = weights.colors, weights.recipe
    mean: Any = f"the central 224x224 of the tensor {_MEAN_IMAGE}" if recipe.mean == "image" else colors.mean.tolist()
    scale = colors.std.clip(min=1.0).tolist() if recipe.unit_variance else [1.0, 1.0, 1.0]
    return {"size_px": CROP_SIZE_PX, "channels": "RGB", "values": "0 to 255", "mean": mean, "scale": scale}


def compare_functions(ours: Recipe, theirs: Recipe, also: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """The fields, and those in `also`, in which two recipes' nets compute something else: our value and theirs."""
    always = ("maps", "width", "num_towers", "conv1_pad", "activation", "overlapping_pool", "spatial_norm", "lrn")

    def describe(recipe: Recipe) -> dict[str, Any]:
        found: dict[str, Any] = {field: getattr(recipe, field) for field in always}
        if recipe.lrn:
            found |= {field: getattr(recipe, field) for field in ("lrn_k", "lrn_n", "lrn_beta", "conv1_order")}
            found["lrn_alpha"] = recipe.lrn_alpha / (recipe.lrn_n if recipe.lrn_alpha_over_n else 1)
            found["lrn_across_towers"] = recipe.lrn_across_towers and recipe.num_towers > 1
        return found | {field: getattr(recipe, field) for field in also}

    here, there = describe(ours), describe(theirs)
    pairs = {field: (here.get(field), there.get(field)) for field in {**there, **here}}
    return {field: (one, other) for field, (one, other) in pairs.items() if one != other}


def _check_same(weights: Weights, wanted: Recipe, what: str) -> None:
    wrong = list(compare_functions(weights.recipe, wanted).items())
    if wrong:
        shown = ", ".join(f"{field} {ours} (there {theirs})" for field, (ours, theirs) in wrong[:4])
        raise UserError(f"{weights.source}: is not the net of {what}: {shown}; use --format safetensors or onnx")


def _from_ours(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Weights:
    image = tensors.pop(_MEAN_IMAGE, None)
    try:
        recipe = from_dict(json.loads(metadata["recipe"]))
        raw = json.loads(metadata["colors"]) if "colors" in metadata else None
        classes = json.loads(metadata["classes"]) if "classes" in metadata else None
        colors = None
        if raw is not None and image is not None:
            if image.dtype != torch.float32 or image.shape != (IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3):
                raise ValueError(f"{_MEAN_IMAGE} is {image.dtype} {tuple(image.shape)}")
            colors = ColorStats.from_moments(
                np.array(raw["mean"], np.float64), np.array(raw["covariance"], np.float64), image.numpy(),
                int(raw["num_pixels"]), metadata.get("shards_fingerprint", ""),
            )  # fmt: skip
    except (UserError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: its metadata cannot be read ({error}); export the net again") from error
    weights = check(Weights(str(path), recipe, tensors, colors, None, metadata.get("shards_fingerprint")))
    if classes is not None:
        weights = replace(weights, classes=parse_classes(classes, str(path), weights.num_classes))
    return weights


def _order_caffe(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and order. Caffe's own blobs are (kernels, channels, rows, columns), old ones with leading ones; those
    that went through TensorFlow are (rows, columns, channels, kernels), and fc6 counts the channel fastest."""
    state = {}
    for name, tensor in tensors.items():
        match = _CAFFE_NAME.fullmatch(name)
        if match is None:
            raise UserError(f"{path}: unknown tensor {name!r:.60} among the layers of Caffe's bvlc_alexnet")
        layer, kind = match[1], "weight" if match[2][0] in "w0" else "bias"
        wanted = 1 if kind == "bias" else 4 if layer.startswith("conv") else 2
        while tensor.dim() > wanted and tensor.shape[0] == 1:
            tensor = tensor[0]
        state[f"{layer}.{kind}"] = tensor
    first = state.get("conv1.weight", torch.empty(0))
    if first.dim() == 4 and first.shape[:3] == (11, 11, 3):
        for name, tensor in [item for item in state.items() if item[0].endswith("weight")]:
            if name == "fc6.weight" and tensor.dim() == 2 and len(tensor) % 36 == 0:
                tensor = tensor.reshape(6, 6, -1, tensor.shape[1]).permute(2, 0, 1, 3).reshape(tensor.shape)
            state[name] = tensor.permute(3, 2, 0, 1) if tensor.dim() == 4 else tensor.t()
    if first.dim() == 4:
        state["conv1.weight"] = state["conv1.weight"].flip(1)  # BGR -> RGB
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _from_others(
    path: Path, layout: str, recipe: Recipe, state: dict[str, Tensor], mean: NDArray[Any], std: NDArray[Any]
) -> Weights:
    """Of a recipe at the width that the tensors have; of ImageNet's classes, if there are as many. Colours known by
    three means and deviations alone, in grey levels."""
    units = state.get("fc6.bias")
    if not isinstance(units, Tensor) or units.dim() != 1 or not 0 < len(units) <= 4 * 4096:
        raise UserError(f"{path}: no bias of fc6 with one number a unit (4096 in AlexNet)")
    image = np.broadcast_to(np.float32(mean), (IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3)).copy()
    colors = ColorStats.from_moments(mean, np.diag(std**2), image, 0, "")
    recipe = replace(recipe, width=len(units) / 4096)
    weights, table = check(Weights(str(path), recipe, state, colors, layout=layout)), load_ilsvrc2012()
    if weights.num_classes != len(table):
        return weights
    return replace(weights, classes=tuple(ClassEntry(index, *entry) for index, entry in enumerate(table.items())))


def _rename(name: str) -> str:
    layer, _, kind = name.rpartition(".")
    return f"{_OWT_LAYERS[layer]}.{kind}" if layer in _OWT_LAYERS else name
