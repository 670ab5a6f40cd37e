"""AlexNet as printed in 2012; everything in which the paper and the released source differ is a field of the recipe.

The two GPUs of the paper are groups of a convolution (`num_towers`), so one network is both columns.
P = Krizhevsky, Sutskever & Hinton, NIPS 2012, with the section; S = the 2012 source released in 2025, net 145.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.options import CROP_SIZE_PX
from trainer.kernels.lrn import local_response_norm, spatial_response_norm
from trainer.recipe import Recipe

HIDDEN_BIAS_LAYERS = ("conv2", "conv4", "conv5", "fc6", "fc7")  # P 5, with S: fc8's is 0
_PADS_PX = {"end": (0, 3), "both": (2, 1)}  # S: ceil geometry, 55 = ceil((224 - 11) / 4) + 1: zeros before and after
_PADDED_PX = 227  # an image that has them already (Caffe's crop) is taken as it is


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
            x = self._pool(self._activate_and_normalise(x))  #                27x27x96, P 3.5
        else:
            x = self._activate(self._pool(self._normalise(x)))  #             27x27x96, S
        x = self._activate_and_normalise(self.conv2(x))  #                    27x27x256
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

    def _activate_and_normalise(self, x: Tensor) -> Tensor:
        if self.recipe.lrn and self.recipe.activation == "relu":  # in one pass over the maps
            return self._normalise(x, relu=True)
        return self._normalise(self._activate(x))

    def _normalise(self, x: Tensor, relu: bool = False) -> Tensor:
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
            relu=relu,
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


class Shapes(NamedTuple):
    """One layer's weight and bias, and what it takes and gives for an image: (maps, rows, columns) or (units,)."""

    weight: tuple[int, ...]
    bias: tuple[int, ...]
    taken: tuple[int, ...]
    given: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        return math.prod(self.weight) + math.prod(self.bias)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image's forward pass."""
        return math.prod(self.given) * math.prod(self.weight[1:])


def shapes_of(recipe: Recipe, num_classes: int = 1000) -> dict[str, Shapes]:
    """Every layer's, in order, read from a net that sees one image on the "meta" device: no memory, no arithmetic."""
    shapes: dict[str, Shapes] = {}
    with torch.device("meta"):
        model, image = AlexNet(recipe, num_classes), torch.empty(1, 3, CROP_SIZE_PX, CROP_SIZE_PX)
    for name, layer in model.named_children():

        def note(layer: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            weight, bias = (tuple(layer.get_parameter(kind).shape) for kind in ("weight", "bias"))
            shapes[name] = Shapes(weight, bias, tuple(inputs[0].shape[1:]), tuple(output.shape[1:]))

        layer.register_forward_hook(note)
    model(image)
    return shapes
