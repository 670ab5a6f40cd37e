"""A trained net as an ONNX file: pixels 0-255 in, logits out, for any runtime that has no PyTorch.

The decision that shaped it: the graph is written operator by operator, a dozen kinds of them with the layers' own
names, instead of traced, so that normalisation becomes ONNX's own LRN on each tower's maps and the input's mean and
scale are part of the file. Where onnxruntime is installed the file is run before it gets its name. Left out: training,
sixteen bits, and reading ONNX.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.common.files import write_atomic
from pipeline.options import CROP_SIZE_PX
from trainer.kernels.lrn import _SPATIAL_K, _SPATIAL_POWER, _SPATIAL_SCALE, _SPATIAL_SIZE
from trainer.model import _PADS_PX
from trainer.nets.weights import Weights, list_classes, make_net
from trainer.recipe import to_dict

TOLERANCE = 1e-4  # of the largest logit
_OPSET, _IR_VERSION = 17, 8
_CONVOLUTIONS = {"conv1": (4, 0), "conv2": (1, 2), "conv3": (1, 1), "conv4": (1, 1), "conv5": (1, 1)}  # stride, padding


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
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError as error:
        raise UserError(f"--format onnx: {error}; pip install 'alexnet-dali[onnx]'") from error
    graph, recipe = _Graph(), weights.recipe
    mean, factor = input_constants(weights)
    graph.add("Sub", "pixels", graph.constant("mean", mean), out="centred")
    if factor is not None:
        graph.add("Mul", graph.last, graph.constant("factor", factor), out="images")
    before, after = _PADS_PX[recipe.conv1_pad]
    pads = graph.constant("pads", np.array([0, 0, before, before, 0, 0, after, after], np.int64))
    graph.add("Pad", graph.last, pads, out="padded")

    def convolve(layer: str) -> None:
        stride, padding = _CONVOLUTIONS[layer]
        groups = recipe.num_towers if layer in ("conv2", "conv4", "conv5") else 1
        inputs = [graph.constant(f"{layer}.{kind}", weights.state[f"{layer}.{kind}"]) for kind in ("weight", "bias")]
        graph.add("Conv", graph.last, *inputs, out=layer, strides=[stride] * 2, pads=[padding] * 4, group=groups)

    def activate(layer: str) -> None:
        graph.add("Tanh" if recipe.activation == "tanh" else "Relu", graph.last, out=f"{layer}.active")

    def pool(layer: str) -> None:
        size = 3 if recipe.overlapping_pool else 2
        graph.add("MaxPool", graph.last, out=f"{layer}.pooled", kernel_shape=[size] * 2, strides=[2, 2])

    def normalise(layer: str) -> None:
        if recipe.lrn:
            towers = 1 if recipe.lrn_across_towers else recipe.num_towers
            _add_lrn(graph, layer, weights, towers)

    convolve("conv1")
    steps = [activate, normalise, pool] if recipe.conv1_order == "relu-lrn-pool" else [normalise, pool, activate]
    for step in steps:
        step("conv1")
    convolve("conv2")
    activate("conv2")
    normalise("conv2")
    if recipe.spatial_norm:
        _add_spatial_norm(graph)
    pool("conv2")
    for layer in ("conv3", "conv4", "conv5"):
        convolve(layer)
        activate(layer)
    pool("conv5")
    graph.add("Flatten", graph.last, out="features", axis=1)
    for layer in ("fc6", "fc7", "fc8"):
        inputs = [graph.constant(f"{layer}.{kind}", weights.state[f"{layer}.{kind}"]) for kind in ("weight", "bias")]
        graph.add("Gemm", graph.last, *inputs, out="logits" if layer == "fc8" else layer, transB=1)
        if layer != "fc8":
            activate(layer)
    size = [CROP_SIZE_PX] * 2
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "alexnet",
            [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", 3, *size])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", weights.num_classes])],
            graph.initializers,
        ),
        producer_name="alexnet-dali",
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
    )
    facts = {"recipe": json.dumps(to_dict(recipe)), "input": "RGB, 0 to 255, 224x224, as float32"}
    if weights.classes:
        facts["classes"] = json.dumps(list_classes(weights.classes))
    helper.set_model_props(model, facts)
    onnx.checker.check_model(model, full_check=True)
    return model


def compare(data: bytes, weights: Weights) -> float | None:
    """Largest difference between onnxruntime's logits and ours on random pixels, relative to the largest logit."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, CROP_SIZE_PX, CROP_SIZE_PX)).astype(np.float32)
    (theirs,) = session.run(["logits"], {"pixels": pixels})
    mean, factor = input_constants(weights)
    images = torch.from_numpy((pixels - mean) * (np.float32(1) if factor is None else factor))
    with torch.no_grad():
        ours = make_net(weights, torch.device("cpu"))(images).numpy()
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


def input_constants(weights: Weights) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """What is subtracted from pixels, then multiplied by, (1, 3, 1 or 224, 1 or 224). Raises UserError if unknown."""
    if weights.colors is None:
        raise UserError(f"{weights.source}: does not hold the colours it was trained with; export from its run instead")
    recipe = weights.recipe
    constants = recipe.transform(train=False).constants(weights.colors)
    mean = constants.mean.reshape(1, 3, 1, 1)
    if constants.mean_image is not None:
        mean = np.ascontiguousarray(constants.mean_image.transpose(2, 0, 1)[None])
    return mean, constants.factor.reshape(1, 3, 1, 1) if recipe.unit_variance else None


class _Graph:
    """Operators one after another; `last` is the name of what the latest gave."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.last = "pixels"

    def constant(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        if isinstance(value, torch.Tensor):
            value = value.float().numpy()
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, kind: str, *inputs: str, out: str | list[str], **attributes: Any) -> None:
        from onnx import helper

        outputs = [out] if isinstance(out, str) else out
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, name=outputs[0], **attributes))
        self.last = outputs[-1]


def _add_lrn(graph: _Graph, layer: str, weights: Weights, num_towers: int) -> None:
    """ONNX's LRN divides alpha by n, as S; P's printed formula does not. The window ends with its tower."""
    recipe = weights.recipe
    alpha = recipe.lrn_alpha * (1 if recipe.lrn_alpha_over_n else recipe.lrn_n)
    options = {"alpha": alpha, "beta": recipe.lrn_beta, "bias": recipe.lrn_k, "size": recipe.lrn_n}
    if num_towers == 1:
        graph.add("LRN", graph.last, out=f"{layer}.normalised", **options)
        return
    maps = len(weights.state[f"{layer}.bias"]) // num_towers
    parts = graph.constant(f"{layer}.towers", np.full(num_towers, maps, np.int64))
    towers = [f"{layer}.tower{number}" for number in range(num_towers)]
    graph.add("Split", graph.last, parts, out=towers, axis=1)
    for tower in towers:
        graph.add("LRN", tower, out=f"{tower}.normalised", **options)
    graph.add("Concat", *(f"{tower}.normalised" for tower in towers), out=f"{layer}.normalised", axis=1)


def _add_spatial_norm(graph: _Graph) -> None:
    """S: a / (k + scale * mean of a^2 over 5x5, zeros outside)^power."""
    a, pad = graph.last, _SPATIAL_SIZE // 2
    numbers = {"scale": _SPATIAL_SCALE, "k": _SPATIAL_K, "power": _SPATIAL_POWER}
    scale, k, power = (graph.constant(f"spatial.{name}", np.float32(value)) for name, value in numbers.items())
    graph.add("Mul", a, a, out="spatial.squares")
    graph.add("AveragePool", graph.last, out="spatial.mean", kernel_shape=[_SPATIAL_SIZE] * 2, pads=[pad] * 4,
              strides=[1, 1], count_include_pad=1)  # fmt: skip
    graph.add("Mul", graph.last, scale, out="spatial.scaled")
    graph.add("Add", graph.last, k, out="spatial.sum")
    graph.add("Pow", graph.last, power, out="spatial.divisor")
    graph.add("Div", a, graph.last, out="spatial.normalised")
