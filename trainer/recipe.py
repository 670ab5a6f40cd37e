"""What a run is made of: every constant of the network, the data and the optimisation, with its source."""

import difflib
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from pipeline.common.errors import UserError

if TYPE_CHECKING:
    from pipeline.options import Transform


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, else the hint alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def has_type(value: object, hint: Any) -> bool:
    """Whether the value is of exactly this type; for float an int will do, infinities and NaN will not."""
    if len(_options(hint)) > 1:
        return any(has_type(value, option) for option in _options(hint))
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if get_origin(hint) is tuple:
        items = get_args(hint)
        if not isinstance(value, tuple):
            return False
        if items[-1] is Ellipsis:
            return all(has_type(item, items[0]) for item in value)
        return len(value) == len(items) and all(map(has_type, value, items))
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]
    return type(value) is hint  # so that True is no int


def parse(text: str, hint: Any) -> Any:
    """The value of this type that the text spells, or something that `has_type` refuses. Raises ValueError."""
    options = _options(hint)
    if NoneType in options:
        return None if text.lower() == "none" else parse(text, options[0])
    if get_origin(hint) is Literal:
        return next((choice for choice in get_args(hint) if str(choice) == text), text)
    if get_origin(hint) is tuple:
        items = get_args(hint)
        if items[-1] is Ellipsis:
            return () if text.lower() in ("", "none") else tuple(parse(item, items[0]) for item in text.split(","))
        return tuple(parse(item, kind) for item, kind in zip(text.split(":"), items, strict=True))
    if hint is bool:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(text.lower(), text)
    return hint(text)


def describe(hint: Any) -> str:
    """What a field takes, in words."""
    if len(_options(hint)) > 1:
        return " or ".join(describe(option) for option in _options(hint))
    if get_origin(hint) is Literal:
        return " or ".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        pairs = get_origin(get_args(hint)[0]) is tuple
        return "epoch:rate pairs with commas between" if pairs else "whole numbers with commas between"
    names = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a name", NoneType: "none"}
    return names[hint]


def listed(value: Any) -> Any:
    """Tuples as lists, at any depth: what JSON gives back."""
    return [listed(item) for item in value] if isinstance(value, tuple) else value


def tupled(value: Any) -> Any:
    """The inverse of `listed`."""
    return tuple(tupled(item) for item in value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Recipe:
    """One recipe, checked when made. Raises UserError naming the field, what was got and what was expected.

    Two things hold for every recipe and are no fields: crop offsets are the integers 0..32 (S; P's "2048" counts 32),
    and crop and flip are drawn per image (S draws one for 32 consecutive images).
    """

    name: str = "paper"

    # Data. Pixels are 0-255 RGB, cut to 224x224 out of 256x256.
    mean: Literal["image", "channel"] = (
        "image"  # P 2: "the mean activity ... from each pixel"; S: the central mean image
    )
    unit_variance: bool = False  # P 2: raw values, no division; for small sets: divide by the standard deviation
    crop: bool = True  # P 4.1: random 224x224 patches; false: the centre
    flip: bool = True  # P 4.1: horizontal reflections, p 0.5
    lighting: Literal["paper", "original"] | None = "paper"  # P 4.1, colour noise; "original": S's scale, then / 1.1
    lighting_off_epoch: int | None = None  # S: no colour noise (and no / 1.1) from the start of epoch 67; P is silent

    # Network.
    width: float = 1.0  # fraction of every layer's kernels and units; 1.0 is P 3.5
    maps: tuple[int, ...] = (96, 256, 384, 384, 256)  # P 3.5: kernels of conv1 to conv5 at width 1
    num_towers: Literal[1, 2] = 2  # P 3.2: one half of the kernels per GPU
    conv1_pad: Literal["end", "both"] = "end"  # S: 3 zero pixels right and bottom; "both": 2 before, 1 after (2014)
    activation: Literal["relu", "tanh"] = "relu"  # P 3.1
    lrn: bool = True  # P 3.3
    lrn_k: float = 2.0  # P 3.3
    lrn_n: int = 5  # P 3.3
    lrn_alpha: float = 1e-4  # P 3.3
    lrn_beta: float = 0.75  # P 3.3
    lrn_alpha_over_n: bool = False  # P 3.3 prints alpha * sum; S (and torch) alpha / n * sum
    lrn_across_towers: bool = False  # S: each GPU saw its own maps; true: windows over all maps, as Caffe's one GPU
    spatial_norm: bool = False  # S: a second, spatial normalisation after conv2's; not in P
    conv1_order: Literal["relu-lrn-pool", "lrn-pool-relu"] = "relu-lrn-pool"  # P 3.5; the other is S
    overlapping_pool: bool = True  # P 3.4: 3x3 windows at stride 2; false: 2x2 at stride 2
    dropout: float = 0.5  # P 4.2
    dropout_at: Literal["outputs", "inputs"] = "outputs"  # of fc6 and fc7; P 4.2: outputs, torchvision: inputs
    init: Literal["paper", "original", "he"] = "paper"  # P 5: N(0, 0.01); S: 0.03 in conv3-5; "he": He et al. 2015
    hidden_bias: float = 1.0  # P 5: in conv2, conv4, conv5, fc6, fc7; the others start at 0

    # Optimisation.
    global_batch_size: int = 128  # P 5, summed over ranks
    epochs: int = 90  # P 5: "roughly 90 cycles"
    momentum: float = 0.9  # P 5
    weight_decay: float = 0.0005  # P 5
    bias_decay: float | None = None  # None: as the weights (P 5, as printed); S: 0
    lr: float = 0.01  # P 5
    bias_lr: float | None = None  # None: as the weights, cuts included (P 5); S: 0.02, when it was cut is not noted
    schedule: Literal["plateau", "milestones", "cosine"] = "plateau"  # P 5: cut when the validation error stalls
    plateau_cuts: int = 3  # P 5: "reduced three times", each time by ten
    plateau_patience: int = 5  # epochs without improvement before a cut; ours, P 5 gives no number
    plateau_min_drop: float = 0.1  # points of top-1 error that count as an improvement; ours
    lr_milestones: tuple[int, ...] = ()  # S: rate / 10 at the start of epochs 25, 51, 79 (from 1)
    conv1_lr_events: tuple[tuple[int, float], ...] = ()  # S: (epoch, conv1's rate from its start); 0 freezes
    warmup_epochs: float = 0.0  # cosine only: linear rise from 0; not in P
    precision: Literal["float32", "bf16", "auto"] = "float32"  # S; "auto": bf16 autocast where it is faster

    def __post_init__(self) -> None:
        for field, hint in _HINTS.items():
            value = getattr(self, field)
            if not has_type(value, hint):
                raise _error(field, value, describe(hint))
            if field in _LIMITS and value is not None and not _LIMITS[field][0](value):
                raise _error(field, value, _LIMITS[field][1])

    def transform(self, *, train: bool) -> "Transform":
        """What a batch is: for training augmented (P 4.1), else the crops that evaluation asks for."""
        from pipeline.options import Transform  # here: it needs NumPy, which `--help` does not

        return Transform(
            mean=self.mean,
            lighting=self.lighting if train else None,
            crop=self.crop and train,
            flip=self.flip and train,
            unit_variance=self.unit_variance,
            layout="NHWC",
        )


def _rising(epochs: list[int]) -> bool:
    return all(a < b for a, b in zip([0, *epochs], epochs, strict=False))


_HINTS: dict[str, Any] = get_type_hints(Recipe)
_NOT_NEGATIVE = (lambda value: value >= 0, "0 or more")
_POSITIVE = (lambda value: value > 0, "more than 0")
_AT_LEAST_1 = (lambda value: value >= 1, "a whole number of 1 or more")
_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda value: re.fullmatch(r"[A-Za-z0-9_-]+", value) is not None, "letters, digits, - and _"),
    "lighting_off_epoch": _AT_LEAST_1,
    "maps": (lambda value: len(value) == 5 and min(value) >= 1, "five whole numbers of 1 or more, of conv1 to conv5"),
    "width": (lambda value: 0 < value <= 4, "more than 0 and at most 4"),
    "lrn_k": _POSITIVE,
    "lrn_n": (lambda value: value >= 3 and value % 2 == 1, "an odd number of 3 or more"),
    "lrn_alpha": _NOT_NEGATIVE,
    "lrn_beta": _NOT_NEGATIVE,
    "dropout": (lambda value: 0 <= value < 1, "at least 0 and less than 1"),
    "global_batch_size": _AT_LEAST_1,
    "epochs": _AT_LEAST_1,
    "momentum": (lambda value: 0 <= value < 1, "at least 0 and less than 1"),
    "weight_decay": _NOT_NEGATIVE,
    "bias_decay": _NOT_NEGATIVE,
    "lr": _POSITIVE,
    "bias_lr": _NOT_NEGATIVE,
    "plateau_cuts": _NOT_NEGATIVE,
    "plateau_patience": _AT_LEAST_1,
    "plateau_min_drop": _NOT_NEGATIVE,
    "lr_milestones": (lambda value: _rising(list(value)), "rising epochs, counted from 1"),
    "conv1_lr_events": (
        lambda value: _rising([epoch for epoch, _ in value]) and all(lr >= 0 for _, lr in value),
        "rising epochs, counted from 1, with rates of 0 or more",
    ),
    "warmup_epochs": _NOT_NEGATIVE,
}


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """The recipe with each "field=value" applied, typed by the field: true/false, numbers, names, "none" for no value.

    Tuples are written with commas, their pairs with a colon: `lr_milestones=25,51` `conv1_lr_events=67:1e-5,72:0`.
    Raises UserError for a setting without "=", an unknown field, or a value that does not fit its field.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        field, equals, text = (part.strip() for part in setting.partition("="))
        if not equals:
            raise UserError(f"{setting!r}: got no '=', expected field=value, such as lr=0.02")
        if field not in _HINTS:
            close = difflib.get_close_matches(field, _HINTS, n=3, cutoff=0.5)
            known = f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(_HINTS)}"
            raise UserError(f"recipe field {field!r} does not exist; {known}")
        try:
            changes[field] = parse(text, _HINTS[field])
        except ValueError:
            raise _error(field, text, describe(_HINTS[field])) from None
    return replace(recipe, **changes)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Every field as JSON holds it (tuples as lists); `from_dict` is its exact inverse."""
    return {field: listed(value) for field, value in asdict(recipe).items()}


def from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe that `to_dict` wrote, an earlier version's too.

    Raises UserError for unknown or missing fields and values that do not fit.
    """
    values = {**_CAME_LATER, **values}
    known = [field.name for field in fields(Recipe)]
    unknown, missing = sorted(set(values) - set(known)), [field for field in known if field not in values]
    if unknown or missing:
        faults = [f"{kind} {', '.join(map(str, n))}" for kind, n in (("unknown", unknown), ("missing", missing)) if n]
        raise UserError(f"recipe: got fields {' and '.join(faults)}, expected those of this version of alexnet-dali")
    return Recipe(**{field: tupled(value) for field, value in values.items()})


# Fields that the first runs do not have in their files, as they were then.
_CAME_LATER: dict[str, Any] = {
    "maps": [96, 256, 384, 384, 256],
    "conv1_pad": "end",
    "lrn_across_towers": False,
    "dropout_at": "outputs",
}


def _error(field: str, got: object, expected: str) -> UserError:
    return UserError(f"recipe field {field}: got {got!r}, expected {expected}")


_PAPER = Recipe()
_ORIGINAL = replace(
    _PAPER,
    name="original",
    lighting="original",
    lighting_off_epoch=67,
    lrn_alpha_over_n=True,
    spatial_norm=True,
    conv1_order="lrn-pool-relu",
    init="original",
    bias_decay=0.0,
    bias_lr=0.02,
    schedule="milestones",
    lr_milestones=(25, 51, 79),
    conv1_lr_events=((67, 1e-5), (72, 0.0)),
)
# Some thousands of photographs, from scratch: too few steps to wait for the paper's biases of 1, which can keep the
# loss flat for thousands of them, so He's initial weights and biases of 0, which want input of unit variance.
_SMALL = replace(
    _PAPER,
    name="small",
    mean="channel",
    unit_variance=True,
    init="he",
    hidden_bias=0.0,
    bias_decay=0.0,
    width=0.5,
    global_batch_size=64,
    epochs=24,
    schedule="cosine",
    warmup_epochs=2.0,
    precision="auto",
)
# The synthetic thousand of `make demo`, in two minutes of two CPU cores; at a rate of 0.01 the loss once fell back.
_DEMO = replace(_SMALL, name="demo", width=0.25, dropout=0.2, lr=0.005, global_batch_size=32, epochs=20)

# "One weird trick for parallelizing convolutional neural networks" (Krizhevsky 2014), in the form that torchvision
# trained: its net layer by layer, and its reference script's batch, rate, decay and cuts. Initial weights: He's, where
# torchvision keeps torch's own. Crops and flips stay ours, where torchvision's are of random size and shape.
_OWT = replace(
    _PAPER,
    name="owt",
    mean="channel",
    unit_variance=True,
    lighting=None,
    maps=(64, 192, 384, 256, 256),
    num_towers=1,
    conv1_pad="both",
    lrn=False,
    dropout_at="inputs",
    init="he",
    hidden_bias=0.0,
    global_batch_size=256,
    weight_decay=0.0001,
    schedule="milestones",
    lr_milestones=(31, 61),
)

# ImageNet in minutes instead of days: NOT YET RUN on ImageNet. The paper's network at full size, trained as `small` is,
# which learns from the first step on. Batch 1024: as far as AlexNet without batch normalisation had been taken without
# loss (You, Gitman & Ginsburg 2017); at less, the 488 MB of weights and velocity are updated more often. The rate: 0.01
# at 256 in proportion, and also small's 0.01 at 64 times the root of 16. Forty epochs, not ninety, on half a cosine: a
# rate that falls steadily was the best of the policies for CaffeNet (Mishkin, Sergievskiy & Matas 2017).
_FAST = replace(_SMALL, name="fast", width=1.0, global_batch_size=1024, lr=0.04, epochs=40, warmup_epochs=2.0)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (_PAPER, _ORIGINAL, _SMALL, _DEMO, _OWT, _FAST)}
