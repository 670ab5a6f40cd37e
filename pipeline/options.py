"""What a batch is (Transform) and where and how it is made (LoaderOptions), checked before anything is built."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.colors import ORIGINAL_DIVISOR, ColorStats
from pipeline.common.errors import UserError
from pipeline.manifest import IMAGE_SIZE_PX, SPLITS
from pipeline.shards import ShardSet

if TYPE_CHECKING:
    import torch

CROP_SIZE_PX = 224
MAX_OFFSET_PX = IMAGE_SIZE_PX - CROP_SIZE_PX  # offsets 0..32: 33 of them, as the released source draws
CENTRE_PX = (MAX_OFFSET_PX // 2, MAX_OFFSET_PX // 2)
# Offsets (y, x) of the five views: four corners and the centre (paper, section 4.1; source: corners at 0 and 32).
FIVE_OFFSETS_PX = ((0, 0), (0, 32), (32, 0), (32, 32), CENTRE_PX)
PADDED_SIZE_PX = 227  # with the three zero pixels that conv1 of the paper's net wants at the right and at the bottom

Device = Literal["cpu", "gpu"]
Decode = Literal["auto", "cpu", "mixed", "hybrid"]
Crops = Literal["centre", "ten"]
_DECODERS = ("auto", "cpu", "mixed", "hybrid")


@dataclass(frozen=True)
class Transform:
    """How a stored image becomes network input: output = (pixel + colour shift - mean) / scale (paper, section 4.1).

    mean: "image" (the central 224x224 of the mean image, whatever the crop, subtracted after the flip, as in the
    source) or "channel" (three numbers). lighting: "paper", "original" (which also divides by 1.1) or None. crop: a
    random offset, else the centre. flip: mirror with probability 0.5. unit_variance: divide by the standard deviation
    of each channel. dtype: "float32", "float16", or "uint8" (cropped and flipped pixels, no arithmetic). layout: "NCHW"
    or "NHWC" in memory. size_px: 224, or 227 with three zero pixels at the right and bottom; channels: 3, or 4 with a
    fourth of zeros. Raises UserError for any other value.
    """

    mean: str = "image"
    lighting: str | None = "paper"
    crop: bool = True
    flip: bool = True
    unit_variance: bool = False
    dtype: str = "float32"
    layout: str = "NCHW"
    size_px: int = CROP_SIZE_PX
    channels: int = 3

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[object, ...]] = {
            "mean": ("image", "channel"),
            "lighting": ("paper", "original", None),
            "crop": (True, False),
            "flip": (True, False),
            "unit_variance": (True, False),
            "dtype": ("float32", "float16", "uint8"),
            "layout": ("NCHW", "NHWC"),
            "size_px": (CROP_SIZE_PX, PADDED_SIZE_PX),
            "channels": (3, 4),
        }
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise UserError(f"{field} is {getattr(self, field)!r}, expected one of {', '.join(map(str, values))}")
        if self.dtype == "uint8" and self.is_padded:
            raise UserError(f"dtype 'uint8' is for crops as they are: leave out size_px {self.size_px} and channels 4")

    @property
    def is_padded(self) -> bool:
        return (self.size_px, self.channels) != (CROP_SIZE_PX, 3)

    @property
    def torch_dtype(self) -> "torch.dtype":
        import torch

        return getattr(torch, self.dtype)

    def constants(self, colors: ColorStats) -> "Constants":
        """What is subtracted and multiplied by, for the shards that `colors` describes."""
        divisor = ORIGINAL_DIVISOR if self.lighting == "original" else 1.0
        scale = divisor * (colors.std.clip(min=1.0) if self.unit_variance else np.ones(3))
        top, left = CENTRE_PX
        central = colors.mean_image[top : top + CROP_SIZE_PX, left : left + CROP_SIZE_PX]
        with_image = self.mean == "image"
        return Constants(
            mean=(np.zeros(3) if with_image else colors.mean).astype(np.float32),
            mean_image=np.ascontiguousarray(central) if with_image else None,
            factor=(1 / scale).astype(np.float32),
            basis=None if self.lighting is None else colors.lighting_basis(self.lighting).astype(np.float32),
        )


class Constants(NamedTuple):
    """The numbers of a transform, float32: output = (pixel + basis @ noise - mean - mean_image) * factor.

    mean (3,), mean_image (224, 224, 3) or None, factor (3,), basis (3, 3) or None without lighting.
    """

    mean: NDArray[np.float32]
    mean_image: NDArray[np.float32] | None
    factor: NDArray[np.float32]
    basis: NDArray[np.float32] | None = None

    def finisher(self, device: "torch.device") -> "Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]":
        """The graph's formula in torch, for pixels that come from elsewhere: crops uint8 (N, 224, 224, 3) and their
        colour shift float32 (N, 3) or None -> float32 (N, 3, 224, 224), channels last in memory, all on `device`."""
        import torch

        mean, factor = (torch.from_numpy(value).to(device) for value in (self.mean, self.factor))
        image = None if self.mean_image is None else torch.from_numpy(self.mean_image).to(device)

        def finish(crops: "torch.Tensor", shift: "torch.Tensor | None" = None) -> "torch.Tensor":
            bias = -mean if shift is None else (shift - mean)[:, None, None, :]
            out = crops.to(torch.float32).add_(bias)
            if image is not None:
                out.sub_(image)
            return out.mul_(factor).permute(0, 3, 1, 2)

        return finish


@dataclass(frozen=True)
class LoaderOptions:
    """Where and how batches are made. None of it changes the samples or what is drawn for them.

    decode, of JPEG shards: "cpu" (the cores), "mixed" (the GPU), "hybrid" (`host_share` of each batch on the cores, the
    rest on the GPU), "auto" ("mixed" on a GPU, else "cpu"). hw_decoder_load: of what the GPU decodes, the share of its
    JPEG engine. cache_gib: GPU memory in which decoded images are kept (decode "mixed" alone). num_threads: of each
    rank (default: its share of the cores). num_local_ranks: ranks that share this machine's cores (default:
    LOCAL_WORLD_SIZE, or all). prefetch_batches: made ahead.
    """

    decode: Decode = "auto"
    host_share: float | None = None
    hw_decoder_load: float = 0.9
    cache_gib: float = 0.0
    num_threads: int | None = None
    num_local_ranks: int | None = None
    prefetch_batches: int = 3

    def __post_init__(self) -> None:
        if self.decode not in _DECODERS:
            raise UserError(f"decode {self.decode!r}: expected one of {', '.join(_DECODERS)}")
        for name in ("num_threads", "num_local_ranks", "prefetch_batches"):
            count = getattr(self, name)
            if count is not None and (not isinstance(count, Integral) or count < 1):
                raise UserError(f"{name} {count!r}: expected a whole number, 1 or more")
        for name in ("host_share", "hw_decoder_load"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise UserError(f"{name} {share}: expected 0 to 1")
        if self.host_share is not None and self.decode != "hybrid":
            raise UserError(
                f"host_share {self.host_share}: of no use to decode {self.decode!r}; set decode 'hybrid', or leave it "
                "out"
            )
        if not 0 <= self.cache_gib < float("inf"):
            raise UserError(f"cache_gib {self.cache_gib}: expected a number of GiB, 0 or more")


@dataclass(frozen=True, kw_only=True)
class GraphSpec(LoaderOptions):
    """What a graph is built from besides shards and transform: this rank's part of a split, the devices, and the
    options as `make_spec` has settled them: decode is never "auto", and "cpu" for raw shards.
    """

    num_threads: int = 1
    split: str
    encoding: str
    batch_size: int
    rank: int
    world_size: int
    seed: int
    device: Device
    device_id: int | None

    @property
    def num_on_host(self) -> int:
        """How many samples of each batch the cores decode."""
        share = 0.5 if self.host_share is None else self.host_share
        return round({"cpu": 1.0, "hybrid": share}.get(self.decode, 0.0) * self.batch_size)


def make_spec(
    shards: ShardSet,
    split: str,
    options: LoaderOptions,
    *,
    batch_size: int,
    device: str,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
) -> GraphSpec:
    """The options as this machine and these shards have them. Raises UserError for what they cannot do."""
    if split not in SPLITS:
        raise UserError(f"split {split!r}: expected {' or '.join(map(repr, SPLITS))}")
    if device not in ("cpu", "gpu"):
        raise UserError(f"device {device!r}: expected 'cpu' or 'gpu'")
    device_id = None
    if device == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise UserError("device 'gpu': no CUDA GPU is visible; use device 'cpu' (alexnet-train --gpus 0)")
        device_id = torch.cuda.current_device()
    decode = _choose_decoder(shards, options.decode, device)
    if options.cache_gib and (device, decode) != ("gpu", "mixed"):
        raise UserError(
            f"cache_gib {options.cache_gib:g}: keeps what a GPU has decoded, got device {device!r} and decode "
            f"{decode!r}; set decode 'mixed' on a GPU, or leave it out"
        )
    num_threads = options.num_threads or count_threads(options.num_local_ranks or count_local_ranks(world_size)) + 1
    return GraphSpec(
        **asdict(replace(options, decode=decode, num_threads=num_threads)),
        split=split,
        encoding=shards.manifest.encoding,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        device="gpu" if device == "gpu" else "cpu",
        device_id=device_id,
    )


def _choose_decoder(shards: ShardSet, decode: Decode, device: str) -> Decode:
    if shards.manifest.encoding == "raw":
        if decode not in ("auto", "cpu"):
            raise UserError(f"{shards.root}: raw shards need no decoder, got decode {decode!r}; leave it out")
        return "cpu"
    if decode == "auto":
        return "mixed" if device == "gpu" else "cpu"
    return decode


def check_kinds(shards: ShardSet, colors: ColorStats, **counts: int) -> None:
    """Raises UserError for a folder's name in place of what is in it, and for `counts` that are no whole numbers."""
    if not isinstance(shards, ShardSet):
        raise UserError(f"shards is {shards!r}, expected a ShardSet: ShardSet.open({str(shards)!r})")
    if not isinstance(colors, ColorStats):
        raise UserError(f"colors is {colors!r}, expected ColorStats: ColorStats.load(shards.root, shards.fingerprint)")
    for name, count in counts.items():
        if not isinstance(count, Integral):
            raise UserError(f"{name} is {count!r}, expected a whole number")


def check_ranks(rank: int, world_size: int) -> None:
    """Raises UserError for a rank that there is not."""
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} of {world_size}: expected 0 <= rank < world size")


def check_global_batch(shards: ShardSet, global_batch_size: int, world_size: int) -> None:
    """Raises UserError for a batch that the ranks cannot share, or that is larger than the training set."""
    if global_batch_size < 1 or global_batch_size % world_size:
        raise UserError(
            f"global batch size {global_batch_size}: expected a positive multiple of the {world_size} ranks; "
            "set --global-batch-size"
        )
    num_samples = shards.num_samples("train")
    if num_samples < global_batch_size:
        raise UserError(
            f"{shards.root}: {num_samples} training images, fewer than one global batch of {global_batch_size}; "
            "set --global-batch-size lower"
        )


def count_local_ranks(world_size: int) -> int:
    """Ranks that share this machine's cores and memory: what the launcher says, else all."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(int(said), world_size) if said.isdecimal() and int(said) else world_size


def count_threads(num_local_ranks: int = 1) -> int:
    """This rank's share of the cores, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // num_local_ranks)


def stream_seed(seed: int, *names: object) -> int:
    """A 31-bit seed for one random stream, a function of the run's seed and the stream's names."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:4], "little") & 0x7FFFFFFF
