"""Slow, obvious NumPy versions of everything numeric, in float64: what the tests compare with.

Written from the formulas, index by index, and importing nothing of the project, so that a mistake would have to be made
twice. Maps are (B, C, H, W).

P = Krizhevsky, Sutskever & Hinton, NIPS 2012, with the section; S = the 2012 source released in 2025, net 145.
"""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float64]


def conv2d(x: Array, weight: Array, bias: Array, *, stride: int = 1, padding: int = 0, groups: int = 1) -> Array:
    """Grouped convolution (correlation, as in every network): weight (kernels, C / groups, size, size)."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    kernels, group_maps, size, _ = weight.shape
    height, width = (x.shape[2] - size) // stride + 1, (x.shape[3] - size) // stride + 1
    y = np.zeros((len(x), kernels, height, width))
    for kernel in range(kernels):
        group = kernel // (kernels // groups)
        seen = x[:, group * group_maps : (group + 1) * group_maps]
        for row in range(size):
            for column in range(size):
                patch = seen[:, :, row : row + stride * height : stride, column : column + stride * width : stride]
                y[:, kernel] += np.einsum("bchw,c->bhw", patch, weight[kernel, :, row, column])
        y[:, kernel] += bias[kernel]
    return y


def max_pool(x: Array, *, size: int, stride: int) -> Array:
    """The largest value of each window that fits (P 3.4: size 3, stride 2)."""
    height, width = (x.shape[2] - size) // stride + 1, (x.shape[3] - size) // stride + 1
    y = np.zeros((*x.shape[:2], height, width))
    for row in range(height):
        for column in range(width):
            window = x[:, :, row * stride : row * stride + size, column * stride : column * stride + size]
            y[:, :, row, column] = window.max(axis=(2, 3))
    return y


def lrn(
    x: Array,
    *,
    k: float = 2.0,
    n: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    num_towers: int = 1,
    alpha_over_n: bool = False,
) -> Array:
    """Local response normalisation as P 3.3 prints it, inside each tower; alpha_over_n: S's alpha / n."""
    return x * _lrn_scale(x, k, n, alpha, num_towers, alpha_over_n) ** -beta


def lrn_backward(
    x: Array,
    gradient: Array,
    *,
    k: float = 2.0,
    n: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    num_towers: int = 1,
    alpha_over_n: bool = False,
) -> Array:
    """The gradient with respect to x, by the chain rule over every pair of maps (i, j) that see each other."""
    s = _lrn_scale(x, k, n, alpha, num_towers, alpha_over_n)
    scale = alpha / n if alpha_over_n else alpha
    result = np.zeros_like(x)
    for i in range(x.shape[1]):
        for j in _neighbours(i, n, x.shape[1] // num_towers):  # b_j = a_j * s_j^-beta, ds_j / da_i = 2 * scale * a_i
            result[:, i] -= gradient[:, j] * x[:, j] * beta * s[:, j] ** (-beta - 1) * 2 * scale * x[:, i]
        result[:, i] += gradient[:, i] * s[:, i] ** -beta
    return result


def spatial_response_norm(x: Array) -> Array:
    """S: a / (1 + 0.001 / 25 * sum of a^2 over the 5x5 positions around it in the same map)^0.75."""
    y = np.zeros_like(x)
    for row in range(x.shape[2]):
        for column in range(x.shape[3]):
            window = x[:, :, max(0, row - 2) : row + 3, max(0, column - 2) : column + 3]
            s = 1.0 + 0.001 / 25 * (window**2).sum(axis=(2, 3))
            y[:, :, row, column] = x[:, :, row, column] / s**0.75
    return y


def alexnet(recipe: Any, weights: Mapping[str, Array], images: Array) -> Array:
    """Logits of the whole network without dropout; weights by name ("conv1.weight"), images (B, 3, 224, 224)."""
    towers = recipe.num_towers

    def convolve(x: Array, name: str, **geometry: int) -> Array:
        return conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **geometry)

    def connect(x: Array, name: str) -> Array:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def activate(x: Array) -> Array:
        return np.tanh(x) if recipe.activation == "tanh" else np.maximum(x, 0.0)

    def pool(x: Array) -> Array:
        return max_pool(x, size=3 if recipe.overlapping_pool else 2, stride=2)

    def normalise(x: Array) -> Array:
        if not recipe.lrn:
            return x
        constants = {"k": recipe.lrn_k, "n": recipe.lrn_n, "alpha": recipe.lrn_alpha, "beta": recipe.lrn_beta}
        return lrn(
            x, num_towers=1 if recipe.lrn_across_towers else towers, alpha_over_n=recipe.lrn_alpha_over_n, **constants
        )

    zeros = (2, 1) if recipe.conv1_pad == "both" else (0, 3)
    x = np.pad(images, ((0, 0), (0, 0), zeros, zeros))
    x = convolve(x, "conv1", stride=4)
    if recipe.conv1_order == "relu-lrn-pool":
        x = pool(normalise(activate(x)))
    else:
        x = activate(pool(normalise(x)))
    x = normalise(activate(convolve(x, "conv2", padding=2, groups=towers)))
    if recipe.spatial_norm:
        x = spatial_response_norm(x)
    x = pool(x)
    x = activate(convolve(x, "conv3", padding=1))
    x = activate(convolve(x, "conv4", padding=1, groups=towers))
    x = pool(activate(convolve(x, "conv5", padding=1, groups=towers)))
    x = x.reshape(len(x), -1)  # map, row, column
    x = activate(connect(x, "fc6"))
    x = activate(connect(x, "fc7"))
    return connect(x, "fc8")


def caffe_alexnet(blobs: Mapping[str, Array], images: Array) -> Array:
    """Logits of BVLC's bvlc_alexnet: blobs by layer and "_w" or "_b", images (B, 3, 227, 227) BGR, minus their mean.

    train_val.prototxt: conv, ReLU, LRN (lrn_layer.cpp: over all maps, alpha / n, k 1), pooling (pooling_layer.cpp: the
    last window may reach over the edge), groups of 2 in conv2, conv4 and conv5; InnerProduct sees (map, row, column).
    """

    def convolve(x: Array, layer: str, **geometry: int) -> Array:
        return np.maximum(conv2d(x, blobs[f"{layer}_w"], blobs[f"{layer}_b"], **geometry), 0)

    def pool(x: Array) -> Array:
        missing = -(x.shape[2] - 3) % 2
        x = np.pad(x, ((0, 0), (0, 0), (0, missing), (0, missing)), constant_values=-np.inf)
        return max_pool(x, size=3, stride=2)

    def normalise(x: Array) -> Array:
        y = np.zeros_like(x)
        for i in range(x.shape[1]):
            squares = (x[:, max(0, i - 2) : i + 3] ** 2).sum(axis=1)
            y[:, i] = x[:, i] / (1 + 1e-4 / 5 * squares) ** 0.75
        return y

    x = pool(normalise(convolve(images, "conv1", stride=4)))
    x = pool(normalise(convolve(x, "conv2", padding=2, groups=2)))
    x = convolve(x, "conv3", padding=1)
    x = convolve(x, "conv4", padding=1, groups=2)
    x = pool(convolve(x, "conv5", padding=1, groups=2))
    x = x.reshape(len(x), -1)
    for layer in ("fc6", "fc7"):
        x = np.maximum(x @ blobs[f"{layer}_w"].T + blobs[f"{layer}_b"], 0)
    return x @ blobs["fc8_w"].T + blobs["fc8_b"]


def paper_update(
    w: Array, v: Array, gradient: Array, *, lr: float, momentum: float = 0.9, decay: float = 0.0005
) -> tuple[Array, Array]:
    """One step of P 5: (w, v) after it. The rate multiplies the gradient on its way into the velocity."""
    v = momentum * v - decay * lr * w - lr * gradient
    return w + v, v


def read_samples(tars: Iterable[Path]) -> dict[str, tuple[NDArray[np.uint8], int]]:
    """Every sample of some shards by key, in stored order: pixels (256, 256, 3) as Pillow decodes them, and label."""
    pixels: dict[str, NDArray[np.uint8]] = {}
    labels: dict[str, int] = {}
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                if suffix == "jpg":
                    pixels[key] = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
                else:
                    labels[key] = int(data)
    return {key: (pixels[key], labels[key]) for key in pixels}


def bicubic_weights(size_in: int, size_out: int, wanted: range) -> Array:
    """(wanted, size_in): Keys' cubic (a = -0.5), stretched by the scale where that shrinks, so that it antialiases."""
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    weights = np.zeros((len(wanted), size_in))
    for row, output in enumerate(wanted):
        centre = (output + 0.5) * scale
        x = np.abs(np.arange(size_in) + 0.5 - centre) / stretch
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights[row] = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        weights[row] /= weights[row].sum()
    return weights


def central_square(pixels: NDArray[np.uint8], size: int = 256) -> Array:
    """(H, W, 3) -> (size, size, 3), P 2: resize until the shorter side is `size`, keep the central square.

    Columns, then rows, as Pillow does it, so that both clip what overshoots between the two.
    """
    height, width, _ = pixels.shape
    weights = []
    for side in (height, width):
        resized = max(size, round(side * size / min(height, width)))
        start = (resized - size) // 2
        weights.append(bicubic_weights(side, resized, range(start, start + size)))
    across = np.einsum("xw,hwc->hxc", weights[1], pixels.astype(np.float64), optimize=True).clip(0, 255)
    return np.einsum("yh,hxc->yxc", weights[0], across, optimize=True).clip(0, 255)


def augment(
    pixels: NDArray[np.uint8],
    offset: tuple[int, int],
    flip: bool,
    shift: Array,
    *,
    mean: Array | None = None,
    mean_image: Array | None = None,
    std: Array | None = None,
    divisor: float = 1.0,
) -> Array:
    """(3, 224, 224): crop at (y, x), flip, add the colour shift, subtract a mean, divide.

    `mean` (3,) or `mean_image` (256, 256, 3), of which S subtracts the centre from every crop, after the flip.
    """
    y, x = offset
    result = np.zeros((3, 224, 224))
    for channel in range(3):
        crop = pixels[y : y + 224, x : x + 224, channel].astype(np.float64)
        if flip:
            crop = crop[:, ::-1]
        crop = crop + shift[channel]
        if mean is not None:
            crop = crop - mean[channel]
        if mean_image is not None:
            crop = crop - mean_image[16:240, 16:240, channel].astype(np.float64)
        result[channel] = crop / divisor / (1.0 if std is None else std[channel])
    return result


def central_crop(pixels: NDArray[np.uint8], **normalisation: Any) -> Array:
    """(3, 224, 224): 16 pixels off each edge, no flip, no colour shift."""
    return augment(pixels, (16, 16), False, np.zeros(3), **normalisation)


def ten_crops(pixels: NDArray[np.uint8], **normalisation: Any) -> Array:
    """(10, 3, 224, 224), P 4.1: upper left and right, lower left and right, centre; then the same five flipped."""
    corners = [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]
    upright = [augment(pixels, corner, False, np.zeros(3), **normalisation) for corner in corners]
    flipped = [augment(pixels, corner, True, np.zeros(3), **normalisation) for corner in corners]
    return np.stack(upright + flipped)


def color_moments(images: Iterable[NDArray[np.uint8]]) -> tuple[Array, Array]:
    """Mean (3,) and covariance (3, 3) of all pixels, in two passes: first the mean, then the deviations from it."""
    flat = np.concatenate([image.reshape(-1, 3) for image in images]).astype(np.float64)
    mean = np.array([flat[:, channel].mean() for channel in range(3)])
    covariance = np.zeros((3, 3))
    for i in range(3):
        for j in range(3):
            covariance[i, j] = ((flat[:, i] - mean[i]) * (flat[:, j] - mean[j])).mean()
    return mean, covariance


def lighting_shift(eigenvalues: Array, eigenvectors: Array, alpha: Array, *, kind: str) -> Array:
    """(3,) grey levels 0-255, for alpha ~ N(0, 0.1) and the eigenbasis of the covariance of pixels 0-255.

    "paper" (P 4.1): [p1 p2 p3][a1 l1, a2 l2, a3 l3] with l those of pixels in [0, 1]; "original" (S): the root of l.
    """
    shift = np.zeros(3)
    for k in range(3):
        step = 255 * eigenvalues[k] / 255**2 if kind == "paper" else eigenvalues[k] ** 0.5
        shift += eigenvectors[:, k] * alpha[k] * step
    return shift


def _neighbours(i: int, n: int, tower_maps: int) -> range:
    """The maps whose squares enter map i's sum: n around it, none of another tower."""
    first = i // tower_maps * tower_maps
    return range(max(first, i - n // 2), min(first + tower_maps - 1, i + n // 2) + 1)


def _lrn_scale(x: Array, k: float, n: int, alpha: float, num_towers: int, alpha_over_n: bool) -> Array:
    s = np.full_like(x, k)
    for i in range(x.shape[1]):
        for j in _neighbours(i, n, x.shape[1] // num_towers):
            s[:, i] += (alpha / n if alpha_over_n else alpha) * x[:, j] ** 2
    return s


def nearest(query: Array, vectors: Array, num: int) -> list[tuple[int, float]]:
    """Positions and Euclidean distances of the `num` nearest vectors, one sum after the other; ties by position."""
    away = []
    for position, vector in enumerate(vectors):
        total = 0.0
        for a, b in zip(query, vector, strict=True):
            total += (float(a) - float(b)) ** 2
        away.append((total**0.5, position))
    return [(position, distance) for distance, position in sorted(away)[:num]]
