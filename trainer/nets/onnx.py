"""A trained net as an ONNX file: pixels 0-255 in, logits out, for any runtime that has no PyTorch."""

import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.common.errors import UserError
from pipeline.common.files import write_atomic
from pipeline.options import CROP_SIZE_PX
from trainer.model import AlexNet
from trainer.nets.weights import Weights, list_classes, make_net
from trainer.recipe import to_dict

TOLERANCE = 1e-4  # of the largest logit
_OPSET = 17
_SHAPE = (2, 3, CROP_SIZE_PX, CROP_SIZE_PX)


def save_onnx(path: Path, weights: Weights) -> float | None:
    """Write the net; returns its largest difference from ours, relative to the largest logit, None if not run.

    Raises UserError without the colours of the input, without the package onnx, and if onnxruntime gives other logits.
    """
    data = build(weights).SerializeToString()
    difference = compare(data, weights)
    if difference is not None and not difference <= TOLERANCE:
        raise UserError(
            f"{path}: onnxruntime's logits differ from ours by {difference:.1e}, allowed is {TOLERANCE:.0e}; "
            "not written: use another onnxruntime"
        )
    write_atomic(path, data)
    return difference


def build(weights: Weights) -> Any:
    """The onnx.ModelProto. In: "pixels" float32 (N, 3, 224, 224), RGB, 0 to 255; out: "logits" float32 (N, classes)."""
    net = _make_net_of_pixels(weights)
    try:
        import onnx
    except ImportError as error:
        raise UserError(f"--format onnx: {error}; pip install 'alexnet-dali[onnx]'") from error
    written, batch = io.BytesIO(), {0: "N"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo=True is newer, and needs onnxscript
        torch.onnx.export(
            net, (torch.zeros(_SHAPE),), written, dynamo=False, opset_version=_OPSET,  # type: ignore[arg-type]
            input_names=["pixels"], output_names=["logits"], dynamic_axes={"pixels": batch, "logits": batch},
        )  # fmt: skip
    model = onnx.load_from_string(written.getvalue())
    model.producer_name = "alexnet-dali"
    facts = {"recipe": json.dumps(to_dict(weights.recipe)), "input": "RGB, 0 to 255, 224x224, as float32"}
    if weights.classes:
        facts["classes"] = json.dumps(list_classes(weights.classes))
    onnx.helper.set_model_props(model, facts)
    onnx.checker.check_model(model, full_check=True)
    return model


@torch.no_grad()
def compare(data: bytes, weights: Weights) -> float | None:
    """Largest difference between onnxruntime's logits and ours on random pixels, relative to the largest logit."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).integers(0, 256, _SHAPE).astype(np.float32)
    (theirs,) = session.run(["logits"], {"pixels": pixels})
    ours = _make_net_of_pixels(weights)(torch.from_numpy(pixels)).numpy()
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


def _make_net_of_pixels(weights: Weights) -> AlexNet:
    """The net with its input's mean and scale before it."""
    if weights.colors is None:
        raise UserError(f"{weights.source}: does not hold the colours it was trained with; export from its run instead")
    constants = weights.recipe.transform(train=False).constants(weights.colors)
    mean = constants.mean.reshape(1, 1, 3) if constants.mean_image is None else constants.mean_image
    means, factors = torch.from_numpy(mean).permute(2, 0, 1), torch.from_numpy(constants.factor).view(3, 1, 1)
    net = make_net(weights, torch.device("cpu"))
    net.register_forward_pre_hook(lambda _, inputs: (inputs[0] - means) * factors)
    return net
