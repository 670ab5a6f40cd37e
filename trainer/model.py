"""AlexNet as printed in 2012, and its local response normalisation.

The decision that shaped it: the two GPUs of the paper are groups of a convolution (`num_towers`), so one network is
both columns, and everything in which the paper and the released source differ is a field of the recipe. Left out: how
the towers are spread over real GPUs, and every other network.

P = Krizhevsky, Sutskever & Hinton, NIPS 2012, with the section; S = the 2012 source released in 2025, net 145.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from trainer.recipe import Recipe

HIDDEN_BIAS_LAYERS = ("conv2", "conv4", "conv5", "fc6", "fc7")  # P 5, with S: fc8's is 0
_PADS_PX = {"end": (0, 3), "both": (2, 1)}  # S: ceil geometry, 55 = ceil((224 - 11) / 4) + 1: zeros before and after
_PADDED_PX = 227  # an image that has them already (Caffe's crop) is taken as it is
_SPATIAL_SIZE, _SPATIAL_SCALE, _SPATIAL_POWER, _SPATIAL_K = 5, 0.001, 0.75, 1.0  # S, the second norm of conv2
_BLOCK_ELEMENTS = 1 << 17  # float32 temporaries of half a megabyte: a few fit into one core's second-level cache


class AlexNet(nn.Module):
    """The network of P 3.5. Weights are those of torch's layers until `from_recipe` or `initialise` draws the recipe's.

    In: images (B, 3, 224, 224), float32, float64 or, under autocast, any; channels_last is fastest. Images of 227 are
    taken to have the three extra pixels already.
    Out: logits (B, num_classes). Sizes in the margin are those of width 1.
    """

    def __init__(self, recipe: Recipe, num_classes: int = 1000) -> None:
        super().__init__()
        self.recipe, self.num_classes = recipe, num_classes
        towers = recipe.num_towers

        def scaled(size: int) -> int:
            return towers * max(1, round(size * recipe.width / towers))

        maps1, maps2, maps3, maps4, maps5 = map(scaled, recipe.maps)
        units6, units7 = scaled(4096), scaled(4096)
        self.conv1 = nn.Conv2d(3, maps1, 11, stride=4)  #                         11x11x3,  S: 48 + 48
        self.conv2 = nn.Conv2d(maps1, maps2, 5, padding=2, groups=towers)  #      5x5x48,   128 + 128
        self.conv3 = nn.Conv2d(maps2, maps3, 3, padding=1)  #                     3x3x256,  sees both towers
        self.conv4 = nn.Conv2d(maps3, maps4, 3, padding=1, groups=towers)  #      3x3x192,  192 + 192
        self.conv5 = nn.Conv2d(maps4, maps5, 3, padding=1, groups=towers)  #      3x3x192,  128 + 128
        self.fc6 = nn.Linear(maps5 * 6 * 6, units6)  #                            9216 -> 4096
        self.fc7 = nn.Linear(units6, units7)  #                                   4096 -> 4096
        self.fc8 = nn.Linear(units7, num_classes)  #                              4096 -> 1000, never scaled

    @classmethod
    def from_recipe(cls, recipe: Recipe, num_classes: int = 1000, seed: int = 0) -> "AlexNet":
        """The network on the CPU, its weights drawn as the recipe says: a function of the arguments alone."""
        with torch.device("meta"):  # torch's own initial weights would be drawn in vain
            model = cls(recipe, num_classes)
        model.to_empty(device="cpu")
        model.initialise(seed)
        return model

    def forward(self, images: Tensor) -> Tensor:
        recipe = self.recipe
        pad = (0, 0) if images.shape[-1] == _PADDED_PX else _PADS_PX[recipe.conv1_pad]
        x = functional.pad(images, pad * 2)  #                                227x227x3
        x = self.conv1(x)  #                                                  55x55x96
        if recipe.conv1_order == "relu-lrn-pool":
            x = self._pool(self._normalise(self._activate(x)))  #             27x27x96, P 3.5
        else:
            x = self._activate(self._pool(self._normalise(x)))  #             27x27x96, S
        x = self._normalise(self._activate(self.conv2(x)))  #                 27x27x256
        if recipe.spatial_norm:
            x = spatial_response_norm(x)
        x = self._pool(x)  #                                                  13x13x256
        x = self._activate(self.conv3(x))  #                                  13x13x384
        x = self._activate(self.conv4(x))  #                                  13x13x384
        x = self._pool(self._activate(self.conv5(x)))  #                      6x6x256; S pools first: the same function
        x = x.flatten(1)  #                            9216: map * 36 + row * 6 + column, whatever the memory format
        before, after = (self._drop, nn.Identity()) if recipe.dropout_at == "inputs" else (nn.Identity(), self._drop)
        x = after(self._activate(self.fc6(before(x))))  #                     4096
        x = after(self._activate(self.fc7(before(x))))  #                     4096
        return self.fc8(x)  #                                                 num_classes

    def initialise(self, seed: int) -> None:
        """Draw all weights anew, in the layers' order, from a generator of this seed, in float32 on the CPU (P 5)."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, layer in self.named_children():
                weight = layer.get_parameter("weight")
                std = init_std(self.recipe.init, name, weight)
                weight.copy_(torch.empty(weight.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))
                layer.get_parameter("bias").fill_(self.recipe.hidden_bias if name in HIDDEN_BIAS_LAYERS else 0.0)

    def _activate(self, x: Tensor) -> Tensor:
        return torch.tanh(x) if self.recipe.activation == "tanh" else torch.relu(x)

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.recipe.dropout, self.training)

    def _pool(self, x: Tensor) -> Tensor:
        return functional.max_pool2d(x, kernel_size=3 if self.recipe.overlapping_pool else 2, stride=2)

    def _normalise(self, x: Tensor) -> Tensor:
        r = self.recipe
        if not r.lrn:
            return x
        return local_response_norm(
            x,
            k=r.lrn_k,
            n=r.lrn_n,
            alpha=r.lrn_alpha,
            beta=r.lrn_beta,
            num_towers=1 if r.lrn_across_towers else r.num_towers,
            alpha_over_n=r.lrn_alpha_over_n,
        )


def init_std(init: str, layer: str, weight: Tensor) -> float:
    """Standard deviation of a layer's initial weights.

    "paper": 0.01 (P 5). "original": 0.01, but 0.03 in conv3, conv4, conv5 (S). "he": sqrt(2 / fan-in) before a ReLU (He
    et al., 2015), and 0.01 in fc8, so that training starts with all classes equally likely.
    """
    if init == "he" and layer != "fc8":
        return (2.0 / weight[0].numel()) ** 0.5
    if init == "original" and layer in ("conv3", "conv4", "conv5"):
        return 0.03
    return 0.01


def local_response_norm(
    x: Tensor,
    *,
    k: float = 2.0,
    n: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    num_towers: int = 1,
    alpha_over_n: bool = False,
) -> Tensor:
    """b = a / (k + alpha * sum of a^2 over the n maps around it)^beta (P 3.3), the window never crossing towers (S).

    x (B, C, H, W), any floating dtype, C divisible by num_towers; returns the same shape and dtype in channels_last.
    alpha_over_n: alpha / n * sum, as S and torch.nn.functional.local_response_norm have it. The arithmetic is float32
    for 16-bit maps. First derivatives only. Raises ValueError unless n is 3, 5, 7, ... and the towers divide C.
    """
    if n < 3 or n % 2 == 0 or x.shape[1] % num_towers:
        raise ValueError(
            f"n = {n} must be odd and at least 3, and {x.shape[1]} maps must be divisible by num_towers = {num_towers}"
        )
    maps_last = x.permute(0, 2, 3, 1)
    rows = maps_last.reshape(-1, x.shape[1] // num_towers)  # a tower of a pixel is a row: windows end with their tower
    normalised = _LocalResponseNorm.apply(rows, k, n, alpha / n if alpha_over_n else alpha, beta)
    return normalised.view(maps_last.shape).permute(0, 3, 1, 2)


def spatial_response_norm(x: Tensor) -> Tensor:
    """Each value by its own map's neighbourhood: a / (1 + 0.001 / 25 * sum over 5x5 of a^2)^0.75, zeros outside (S).

    x (B, C, H, W), any floating dtype; returns the same. The arithmetic is float32 for 16-bit maps.
    """
    a = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = functional.avg_pool2d(a * a, _SPATIAL_SIZE, stride=1, padding=_SPATIAL_SIZE // 2)
    return (a / _power(_SPATIAL_K + _SPATIAL_SCALE * mean_square, _SPATIAL_POWER)).to(x.dtype)


class _LocalResponseNorm(torch.autograd.Function):
    """b = a / s^beta with s = k + scale * window(a^2), over rows (R, maps), a block of rows at a time.

    With e the incoming gradient and t = e / s^beta: da = t - 2 * scale * beta * a * window(t * a / s). Nothing is kept
    but a: to compute s again, in cache, costs less than to store and to read it.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, k: float, n: int, scale: float, beta: float) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.constants = (k, n, scale, beta)
        result = torch.empty_like(rows, memory_format=torch.contiguous_format)
        window = _Window(rows, n)
        for block, out in zip(window.split(rows), window.split(result), strict=True):
            a = block.to(window.dtype)
            s = window.sum_products(a, a).mul_(scale).add_(k)
            torch.div(a, window.maps(_power(s, beta)), out=out)  # rounds once, to the maps' own dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        k, n, scale, beta = ctx.constants
        result = torch.empty_like(rows, memory_format=torch.contiguous_format)
        window = _Window(rows, n)
        for block, e, out in zip(*map(window.split, (rows, gradient, result)), strict=True):
            a = block.to(window.dtype)
            s = window.sum_products(a, a).mul_(scale).add_(k)
            t = e.to(window.dtype) / window.maps(_power(s, beta))
            sums = window.maps(window.sum_products(a / window.maps(s), t))
            torch.addcmul(t, a, sums, value=-2.0 * scale * beta, out=out)
        return result, None, None, None, None


class _Window:
    """Sums over n neighbouring maps, for blocks of rows that stay in the cache (on a GPU: all rows at once).

    The rows of a block stand in one flat buffer with n // 2 zeros between them, so that n - 1 shifted adds of the whole
    buffer are the sums of all rows. Sums stay in that layout, contiguous, because roots of strided tensors are slow;
    `maps` takes them out of it. Sixteen-bit rows are summed in float32.
    """

    def __init__(self, rows: Tensor, n: int) -> None:
        num_rows, self._num_maps = rows.shape
        self.dtype = torch.promote_types(rows.dtype, torch.float32)
        self._num_rows = max(1, num_rows if rows.is_cuda else min(num_rows, _BLOCK_ELEMENTS // self._num_maps))
        self._n, self._stride = n, self._num_maps + n // 2
        self._flat = rows.new_zeros(self._num_rows * self._stride + 2 * (n // 2), dtype=self.dtype)

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self._num_rows)

    def sum_products(self, x: Tensor, y: Tensor) -> Tensor:
        """Window sums of x * y for a block (R, maps), in a new flat tensor: view it with `maps`."""
        half, length = self._n // 2, len(x) * self._stride
        torch.mul(x, y, out=self.maps(self._flat[half : half + length]))
        total = self._flat[:length] + self._flat[1 : length + 1]
        for shift in range(2, self._n):
            total += self._flat[shift : shift + length]
        return total

    def maps(self, flat: Tensor) -> Tensor:
        return flat.view(-1, self._stride)[:, : self._num_maps]


def _power(s: Tensor, beta: float) -> Tensor:
    if beta == 0.75:  # P 3.3; two roots take a fraction of the time of a power
        root = s.sqrt()
        return root * root.sqrt()
    return s.pow(beta)
