"""What `alexnet-prep pca` learns from the training pixels: their mean, their RGB covariance, its eigenbasis.

Sums are exact integers, so that the basis does not depend on the order of work, the threads or the device.
"""

import io
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from shlex import quote

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.common.files import read_json, write_atomic, write_json
from pipeline.manifest import IMAGE_SIZE_PX

COLOR_FILE = "color.json"
MEAN_IMAGE_FILE = "mean_image.npy"
LIGHTING_STD = 0.1  # paper, section 4.1: alpha ~ N(0, 0.1); source: the same coefficient
ORIGINAL_DIVISOR = 1.1  # source: with colour noise on, (pixel - mean + noise) / (1 + coefficient)
_UNITS = "pixel values 0-255"
_MAX_IMAGE_BYTES = IMAGE_SIZE_PX * IMAGE_SIZE_PX * 3 * 8 + 4096  # float32 is expected, another type gets its own words

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ColorStats:
    """Colour statistics of the training pixels of one set of shards, in units of pixel values 0 to 255.

    mean (3,), covariance (3, 3), eigenvalues (3,) descending, eigenvectors (3, 3) as columns, each with its largest
    component positive; mean_image (256, 256, 3) float32, RGB.
    """

    mean: Array
    covariance: Array
    eigenvalues: Array
    eigenvectors: Array
    num_pixels: int
    shards_fingerprint: str
    mean_image: NDArray[np.float32]

    @classmethod
    def from_sums(
        cls,
        num_images: int,
        products: list[list[int]],
        image_sum: NDArray[np.int64],
        shards_fingerprint: str,
    ) -> "ColorStats":
        """From exact integers: products[i][j] sums c_i * c_j over all pixels; image_sum (256, 256, 3)."""
        height, width, _ = image_sum.shape
        pixels = num_images * height * width
        sums = [int(total) for total in image_sum.sum(axis=(0, 1))]
        covariance = np.array(
            [
                [float(Fraction(pixels * products[i][j] - sums[i] * sums[j], pixels * pixels)) for j in range(3)]
                for i in range(3)
            ]
        )
        mean = np.array([float(Fraction(total, pixels)) for total in sums])
        mean_image = (image_sum / num_images).astype(np.float32)
        return cls.from_moments(mean, covariance, mean_image, pixels, shards_fingerprint)

    @classmethod
    def from_moments(
        cls,
        mean: Array,
        covariance: Array,
        mean_image: NDArray[np.float32],
        num_pixels: int,
        shards_fingerprint: str,
    ) -> "ColorStats":
        """From mean (3,), covariance (3, 3) and mean image, 0-255 units. Raises ValueError for other shapes or NaNs."""
        eigenvalues, eigenvectors = np.linalg.eigh(_array(covariance, (3, 3)))
        eigenvalues, eigenvectors = eigenvalues[::-1].clip(min=0.0), eigenvectors[:, ::-1]
        largest = np.abs(eigenvectors).argmax(axis=0)
        return cls(
            mean=_array(mean, (3,)),
            covariance=covariance,
            eigenvalues=eigenvalues,
            eigenvectors=eigenvectors * np.sign(eigenvectors[largest, range(3)]),
            num_pixels=num_pixels,
            shards_fingerprint=shards_fingerprint,
            mean_image=mean_image,
        )

    @property
    def std(self) -> Array:
        """Standard deviation per channel (3,), 0-255 units."""
        return np.sqrt(np.diag(self.covariance))

    def lighting_basis(self, kind: str) -> Array:
        """(3, 3) matrix B: the colour shift of an image is B @ z with z ~ N(0, 1), in 0-255 units.

        "paper" (section 4.1): [p1 p2 p3][a1 l1, a2 l2, a3 l3]^T with l the eigenvalues of the covariance of pixels in
        [0, 1] (on 0-255 pixels the printed formula would shift by over a thousand grey levels), scaled back to 0-255.
        "original" (released source): the root of l, on 0-255 pixels. Raises ValueError for another kind.
        """
        if kind == "paper":
            scale = 255.0 * (self.eigenvalues / 255.0**2)
        elif kind == "original":
            scale = np.sqrt(self.eigenvalues)
        else:
            raise ValueError(f"lighting {kind!r}: expected 'paper' or 'original'")
        return self.eigenvectors * (LIGHTING_STD * scale)

    def save(self, folder: Path) -> None:
        """Write mean_image.npy, then color.json (the completion mark), each atomically."""
        buffer = io.BytesIO()
        np.save(buffer, self.mean_image)
        write_atomic(folder / MEAN_IMAGE_FILE, buffer.getvalue())
        write_json(
            folder / COLOR_FILE,
            {
                "mean": self.mean.tolist(),
                "covariance": self.covariance.tolist(),
                "eigenvalues": self.eigenvalues.tolist(),
                "eigenvectors": self.eigenvectors.tolist(),
                "num_pixels": self.num_pixels,
                "units": _UNITS,
                "shards_fingerprint": self.shards_fingerprint,
            },
        )

    @classmethod
    def load(cls, folder: str | Path, shards_fingerprint: str) -> "ColorStats":
        """The statistics in `folder`, for any set of shards its `root`. Raises UserError if missing, damaged, or
        computed on other shards."""
        if "://" in str(folder):
            raise UserError(
                f"{folder}: is a URL, expected the folder that holds its files here: ShardSet.open(...).root"
            )
        folder = Path(folder)
        path, remedy = folder / COLOR_FILE, f"run `alexnet-prep pca --shards {quote(str(folder))}`"
        if not path.is_file():
            raise UserError(f"{path}: missing; {remedy}")
        raw = read_json(path)
        try:
            stats = cls(
                mean=_array(raw["mean"], (3,)),
                covariance=_array(raw["covariance"], (3, 3)),
                eigenvalues=_array(raw["eigenvalues"], (3,)),
                eigenvectors=_array(raw["eigenvectors"], (3, 3)),
                num_pixels=int(raw["num_pixels"]),
                shards_fingerprint=str(raw["shards_fingerprint"]),
                mean_image=_read_image(folder / MEAN_IMAGE_FILE),
            )
            units = raw["units"]
        except (KeyError, TypeError, ValueError, OverflowError, OSError, EOFError) as error:
            raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); {remedy}") from error
        if units != _UNITS:
            raise UserError(f"{path}: units are {units!r}, expected {_UNITS!r}; {remedy}")
        if stats.mean_image.shape != (IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3) or stats.mean_image.dtype != np.float32:
            got = f"{stats.mean_image.dtype} {stats.mean_image.shape}"
            raise UserError(
                f"{folder / MEAN_IMAGE_FILE}: {got}, expected float32 ({IMAGE_SIZE_PX}, {IMAGE_SIZE_PX}, 3); {remedy}"
            )
        if not (stats.mean_image >= 0).all() or not (stats.mean_image <= 255).all():  # not a number: neither
            raise UserError(f"{folder / MEAN_IMAGE_FILE}: damaged, expected pixel values 0 to 255; {remedy}")
        if stats.shards_fingerprint != shards_fingerprint:
            raise UserError(
                f"{path}: computed on shards {stats.shards_fingerprint[:12]}, but these are {shards_fingerprint[:12]}; "
                f"{remedy}"
            )
        return stats


def _read_image(path: Path) -> NDArray[np.float32]:
    """Whatever array is in a file that is not much larger than a mean image's."""
    if path.stat().st_size > _MAX_IMAGE_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, expected at most {_MAX_IMAGE_BYTES}")
    try:
        return np.load(path, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # NumPy's reader of headers raises anything, and MemoryError for one that promises much
        raise ValueError(f"{path.name}: {' '.join(str(error).split())[:120]}") from error


def _array(value: object, shape: tuple[int, ...]) -> Array:
    array = np.array(value, dtype=np.float64)
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"expected finite numbers of shape {shape}, got shape {array.shape}")
    return array
