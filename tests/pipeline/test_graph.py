"""What the DALI graphs do to pixels and what they draw, against `oracle` on the JPEGs that Pillow reads from the tars.

DALI's CPU decoder gives Pillow's bits, whole or cropped, so a decoded pixel counts as exact. Tolerances: float32 1e-3
grey level, float16 and bfloat16 one unit in the last place of the result.
"""

import numpy as np
import pytest
import torch
from pipeline.finish import FIVE_OFFSETS_PX, Transform

from pipeline.colors import LIGHTING_STD
from pipeline.common.errors import UserError
from pipeline.loader import EvalLoader, TrainLoader, read_pixels
from tests import oracle
from tests.pipeline.loading import list_images, record

FLOAT32_TOLERANCE_GREY = 1e-3
FLOAT16_EPSILON = 2.0**-10
BFLOAT16_EPSILON = 2.0**-7

NORMALISATIONS = {
    "mean image": {},
    "mean channel": {"mean": "channel"},
    "unit variance": {"unit_variance": True},
    "unit variance, mean channel": {"mean": "channel", "unit_variance": True},
    "NHWC": {"layout": "NHWC"},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16, mean channel, NHWC": {"mean": "channel", "dtype": "float16", "layout": "NHWC"},
}
AUGMENTATIONS = {
    "lighting original": {"lighting": "original"},
    "lighting original, mean channel": {"lighting": "original", "mean": "channel"},
    "lighting original, unit variance, NHWC": {"lighting": "original", "unit_variance": True, "layout": "NHWC"},
    "no lighting": {"lighting": None},
    "no crop": {"crop": False},
    "no flip": {"flip": False},
    "no augmentation": {"lighting": None, "crop": False, "flip": False},
}


@pytest.fixture(scope="module")
def stored(shards):
    return {split: oracle.read_samples(shards.tars(split)) for split in ("train", "val")}


@pytest.fixture(scope="module")
def many_draws(shards, colors):
    """Offsets, flips and shifts of 20 epochs: 1280 images."""
    draws = collect_draws(make_loader(shards, colors), num_epochs=20)
    return {name: np.concatenate([getattr(draw, name).numpy() for draw in draws]) for name in draws[0]._fields[:3]}


def make_loader(shards, colors, **options) -> TrainLoader:
    options = {"global_batch_size": 16, "seed": 7, "num_threads": 2, "with_draws": True, **options}
    return TrainLoader(shards, colors, **options)


def collect_draws(loader, num_epochs=1):
    return [loader.draws for _ in range(num_epochs) for _ in loader]


def oracle_options(colors, *, mean="image", unit_variance=False, lighting=None, **_) -> dict:
    return {
        "mean": colors.mean if mean == "channel" else None,
        "mean_image": colors.mean_image if mean == "image" else None,
        "std": np.sqrt(np.diag(colors.covariance)) if unit_variance else None,
        "divisor": 1.1 if lighting == "original" else 1.0,
    }


def assert_close(images: torch.Tensor, expected: np.ndarray, options: dict, colors) -> None:
    assert images.dtype == getattr(torch, options.get("dtype", "float32"))
    atol = FLOAT32_TOLERANCE_GREY / (colors.std.max() if options.get("unit_variance") else 1.0)
    rtol = {torch.float32: 0.0, torch.float16: FLOAT16_EPSILON, torch.bfloat16: BFLOAT16_EPSILON}[images.dtype]
    np.testing.assert_allclose(images.double().numpy(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("options", [*NORMALISATIONS.values(), *AUGMENTATIONS.values()], ids=str)
def test_training_images_are_those_of_the_formula_on_the_same_draws(shards, colors, stored, options):
    loader = make_loader(shards, colors, **options)
    normalisation = oracle_options(colors, **{"lighting": "paper", **options})
    for batch, _ in zip(loader, range(2), strict=False):
        draws = loader.draws
        assert (draws.offset.shape, draws.flip.shape, draws.shift.shape) == ((16, 2), (16,), (16, 3))
        expected = []
        for key, label, offset, flip, shift in zip(
            draws.keys, batch.labels.tolist(), draws.offset.tolist(), draws.flip.tolist(), draws.shift, strict=True
        ):
            pixels, stored_label = stored["train"][key]
            assert label == stored_label
            expected.append(oracle.augment(pixels, offset, flip == 1, shift.double().numpy(), **normalisation))
        assert_close(batch.images, np.stack(expected), options, colors)


@pytest.mark.parametrize("options", NORMALISATIONS.values(), ids=str)
def test_evaluation_images_are_the_central_crop(shards, colors, stored, options):
    normalisation = oracle_options(colors, **options)
    expected = [oracle.central_crop(pixels, **normalisation) for pixels, _ in stored["val"].values()]
    batches = list(EvalLoader(shards, colors, batch_size=10, num_threads=2, **options))
    assert_close(torch.cat([batch.images for batch in batches]), np.stack(expected), options, colors)
    assert torch.cat([batch.labels for batch in batches]).tolist() == [label for _, label in stored["val"].values()]


@pytest.mark.parametrize("options", NORMALISATIONS.values(), ids=str)
def test_ten_crops_are_four_corners_and_centre_then_their_mirror_images(shards, colors, stored, options):
    batch = next(iter(EvalLoader(shards, colors, batch_size=4, crops="ten", num_threads=2, **options)))
    first = [pixels for pixels, _ in stored["val"].values()][:4]
    expected = np.stack([oracle.ten_crops(pixels, **oracle_options(colors, **options)) for pixels in first])
    assert batch.images.shape == (4, 10, 3, 224, 224)
    assert_close(batch.images, expected, options, colors)


def test_the_fifth_of_the_ten_views_is_the_centre_crop_and_views_differ(shards, colors):
    ten = next(iter(EvalLoader(shards, colors, batch_size=4, crops="ten", mean="channel", num_threads=2))).images
    centre = next(iter(EvalLoader(shards, colors, batch_size=4, mean="channel", num_threads=2))).images
    assert torch.equal(ten[:, 4], centre)
    assert torch.equal(ten[:, 5:], ten[:, :5].flip(-1))
    assert len({view.numpy().tobytes() for view in ten[0]}) == 10
    assert FIVE_OFFSETS_PX == ((0, 0), (0, 32), (32, 0), (32, 32), (16, 16))


def test_plain_pixels_are_the_stored_images_in_stored_order(shards, stored):
    batches = list(read_pixels(shards, split="val", batch_size=7, num_threads=2))
    assert np.array_equal(
        torch.cat([batch.images for batch in batches]).numpy(), [pixels for pixels, _ in stored["val"].values()]
    )
    assert torch.cat([batch.labels for batch in batches]).tolist() == [label for _, label in stored["val"].values()]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_memory_layout_is_the_one_asked_for_and_the_shape_is_the_same(shards, colors, layout):
    images = next(iter(make_loader(shards, colors, layout=layout))).images
    assert images.shape == (16, 3, 224, 224)
    memory_format = torch.contiguous_format if layout == "NCHW" else torch.channels_last
    assert images.is_contiguous(memory_format=memory_format)


def test_offsets_are_whole_numbers_0_to_32_all_equally_likely(many_draws):
    offset = many_draws["offset"]
    assert offset.dtype == np.int32 and offset.shape == (1280, 2)
    for axis in range(2):
        counts = np.bincount(offset[:, axis], minlength=33)
        assert len(counts) == 33
        # 38.8 expected, standard deviation 6.1; half the weight on an edge would give 19.4
        assert counts.min() > 20 and counts.max() < 64
    both = np.bincount(offset.ravel(), minlength=33)
    assert both[0] > 52 and both[32] > 52  # 77.6 expected, standard deviation 8.7; half the weight: 39
    assert abs(np.corrcoef(offset.T)[0, 1]) < 0.1


def test_half_of_the_images_are_flipped(many_draws):
    assert set(many_draws["flip"]) == {0, 1}
    assert abs(many_draws["flip"].mean() - 0.5) < 0.05  # standard deviation 0.014


@pytest.mark.parametrize("kind", ["paper", "original"])
def test_the_colour_shift_is_normal_along_the_eigenvectors(shards, colors, kind):
    draws = collect_draws(make_loader(shards, colors, lighting=kind), num_epochs=20)
    shift = np.concatenate([draw.shift.numpy() for draw in draws]).astype(np.float64)
    unit = [oracle.lighting_shift(colors.eigenvalues, colors.eigenvectors, axis, kind=kind) for axis in np.eye(3)]
    alpha = np.linalg.solve(np.stack(unit, axis=1), shift.T) / LIGHTING_STD  # 3 x 1280 numbers of N(0, 1)
    np.testing.assert_allclose(alpha.mean(axis=1), 0.0, atol=0.12)  # standard deviation 0.028
    np.testing.assert_allclose(np.cov(alpha), np.eye(3), atol=0.16)  # standard deviations 0.028 and 0.040
    assert np.abs(alpha).max() > 2.5


@pytest.mark.parametrize("kind", ["paper", "original"])
def test_the_lighting_basis_is_that_of_the_formula(colors, kind):
    alpha = np.array([0.13, -0.07, 0.2])
    expected = oracle.lighting_shift(colors.eigenvalues, colors.eigenvectors, alpha, kind=kind)
    np.testing.assert_allclose(colors.lighting_basis(kind) @ (alpha / LIGHTING_STD), expected, rtol=1e-12)


@pytest.mark.parametrize("off", [{"crop": False}, {"flip": False}, {"lighting": None}], ids=str)
def test_switching_one_augmentation_off_leaves_the_other_draws_alone(shards, colors, off):
    plain = collect_draws(make_loader(shards, colors))
    changed = collect_draws(make_loader(shards, colors, **off))
    field = {"crop": "offset", "flip": "flip", "lighting": "shift"}[next(iter(off))]
    for one, other in zip(plain, changed, strict=True):
        assert one.keys == other.keys
        for name in {"offset", "flip", "shift"} - {field}:
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        neutral = {"offset": 16, "flip": 0, "shift": 0.0}[field]
        assert (getattr(other, field) == neutral).all() and not (getattr(one, field) == neutral).all()


def test_how_images_are_normalised_does_not_change_what_is_drawn(shards, colors):
    plain = collect_draws(make_loader(shards, colors))
    for options in ({"mean": "channel"}, {"layout": "NHWC", "dtype": "float16"}, {"unit_variance": True}):
        for one, other in zip(plain, collect_draws(make_loader(shards, colors, **options)), strict=True):
            assert one.keys == other.keys
            assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


WAYS = {
    "threads 1": {"num_threads": 1},
    "threads 5": {"num_threads": 5},
    "mixed": {"decode": "mixed"},
    "hybrid": {"decode": "hybrid", "host_share": 0.3},
    "hybrid, all on the host": {"decode": "hybrid", "host_share": 1},
    "hybrid, none on the host": {"decode": "hybrid", "host_share": 0.0, "hw_decoder_load": 0.5},
    "prefetch": {"prefetch_batches": 4},
    "cache": {"cache": "raw"},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("options", [{}, {"layout": "NHWC", "dtype": "bfloat16"}], ids=["", "NHWC bfloat16"])
def test_wherever_pixels_are_decoded_the_batches_are_the_same_bits(make_train, way, options):
    one, other = make_train(mean="image", **options), make_train(mean="image", **options, **way)
    for _ in range(2):  # epochs: the second from memory, where there is a cache
        assert record(one) == record(other)


def test_raw_shards_give_the_batches_of_the_jpegs_they_were_made_from(make_train, make_eval, shards, raw_shards):
    for options in ({}, {"layout": "NHWC", "mean": "image"}, {"cache": "raw"}, {"dtype": "uint8", "layout": "NHWC"}):
        one, other = make_train(**options), make_train(shards=raw_shards, **options)
        for _ in range(2):
            assert record(one) == record(other)
    for crops in ("centre", "ten"):
        one, other = make_eval(crops=crops), make_eval(crops=crops, shards=raw_shards)
        for _ in range(2):
            assert list_images(one) == list_images(other)
    assert list_images(read_pixels(shards, batch_size=10)) == list_images(read_pixels(raw_shards, batch_size=10))


@pytest.mark.parametrize("decode", ["host", "mixed", "hybrid"])
def test_evaluation_images_are_the_same_bits_from_every_decoder(make_eval, decode):
    for crops in ("centre", "ten"):
        assert list_images(make_eval(crops=crops, decode=decode)) == list_images(make_eval(crops=crops))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_uint8_batches_are_the_crops_and_their_mirror_images_untouched(make_train, stored, layout):
    loader = make_train(dtype="uint8", layout=layout)
    for batch in loader:
        draws = loader.draws
        for image, key, (y, x), flip in zip(
            batch.images, draws.keys, draws.offset.tolist(), draws.flip.tolist(), strict=True
        ):
            expected = oracle.augment(stored["train"][key][0], (y, x), flip == 1, np.zeros(3))
            assert image.dtype == torch.uint8 and np.array_equal(image.numpy(), expected)


def test_a_loader_that_keeps_no_draws_gives_the_same_images(shards, colors):
    with_draws = make_loader(shards, colors)
    without = make_loader(shards, colors, with_draws=False)
    for one, other in zip(with_draws, without, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert without.draws is None


@pytest.mark.parametrize(
    ("field", "value"), [("mean", "pixel"), ("lighting", "none"), ("dtype", "float64"), ("layout", "CHW")]
)
def test_an_unknown_choice_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"{field} is '{value}', expected one of"):
        Transform(**{field: value})
