"""What the DALI graphs do to pixels and what they draw, against `oracle` on the JPEGs that Pillow reads from the tars.

The CPU's decoders give Pillow's bits, whole or cropped, so a decoded pixel counts as exact. Tolerances: float32 1e-3
grey level, float16 one unit in the last place of the result.
"""

import numpy as np
import pytest
import torch

from pipeline.colors import LIGHTING_STD
from pipeline.common.errors import UserError
from pipeline.loader import read_pixels
from pipeline.operators import load_operators
from pipeline.options import FIVE_OFFSETS_PX, Transform
from tests import oracle
from tests.pipeline.loader.loading import list_images, record

FLOAT32_TOLERANCE_GREY = 1e-3
FLOAT16_EPSILON = 2.0**-10

NORMALISATIONS = {
    "mean image": {},
    "mean channel": {"mean": "channel"},
    "unit variance": {"unit_variance": True},
    "unit variance, mean channel": {"mean": "channel", "unit_variance": True},
    "NHWC": {"layout": "NHWC"},
    "float16": {"dtype": "float16"},
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


@pytest.fixture
def make_loader(make_train):
    return lambda **options: make_train(**{"global_batch_size": 16, "seed": 7, "mean": "image", **options})


@pytest.fixture(params=["own operators", "DALI's operators"])
def operators(request, monkeypatch):
    """Both ways through the CPU's graph."""
    if request.param.startswith("DALI"):
        monkeypatch.setenv("ALEXNET_OPERATORS", "stock")
    elif not load_operators():
        pytest.skip("the operators cannot be compiled here: no C++ compiler, or no headers of libjpeg-turbo")


@pytest.fixture
def many_draws(make_loader):
    """Offsets, flips and shifts of 20 epochs: 1280 images."""
    draws = collect_draws(make_loader(), num_epochs=20)
    return {name: np.concatenate([getattr(draw, name).numpy() for draw in draws]) for name in draws[0]._fields}


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
    rtol = {torch.float32: 0.0, torch.float16: FLOAT16_EPSILON}[images.dtype]
    np.testing.assert_allclose(images.double().numpy(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("options", [*NORMALISATIONS.values(), *AUGMENTATIONS.values()], ids=str)
def test_training_images_are_those_of_the_formula_on_the_same_draws(make_loader, colors, stored, operators, options):
    loader = make_loader(**options)
    normalisation = oracle_options(colors, **{"lighting": "paper", **options})
    for batch, _ in zip(loader, range(2), strict=False):
        draws = loader.draws
        assert (draws.offset.shape, draws.flip.shape, draws.shift.shape) == ((16, 2), (16,), (16, 3))
        expected = []
        for key, label, offset, flip, shift in zip(
            draws.keys.tolist(),
            batch.labels.tolist(),
            draws.offset.tolist(),
            draws.flip.tolist(),
            draws.shift,
            strict=True,
        ):
            pixels, stored_label = stored["train"][f"{key:09d}"]
            assert label == stored_label
            expected.append(oracle.augment(pixels, offset, flip == 1, shift.double().numpy(), **normalisation))
        assert_close(batch.images, np.stack(expected), options, colors)


@pytest.mark.parametrize("options", NORMALISATIONS.values(), ids=str)
def test_evaluation_images_are_the_central_crop(make_eval, colors, stored, operators, options):
    normalisation = oracle_options(colors, **options)
    expected = [oracle.central_crop(pixels, **normalisation) for pixels, _ in stored["val"].values()]
    batches = list(make_eval(**{"batch_size": 10, "mean": "image", **options}))
    assert_close(torch.cat([batch.images for batch in batches]), np.stack(expected), options, colors)
    assert torch.cat([batch.labels for batch in batches]).tolist() == [label for _, label in stored["val"].values()]


@pytest.mark.parametrize("options", NORMALISATIONS.values(), ids=str)
def test_ten_crops_are_four_corners_and_centre_then_their_mirror_images(make_eval, colors, stored, operators, options):
    batch = next(iter(make_eval(**{"batch_size": 4, "crops": "ten", "mean": "image", **options})))
    first = [pixels for pixels, _ in stored["val"].values()][:4]
    expected = np.stack([oracle.ten_crops(pixels, **oracle_options(colors, **options)) for pixels in first])
    assert batch.images.shape == (4, 10, 3, 224, 224)
    assert_close(batch.images, expected, options, colors)


def test_the_fifth_of_the_ten_views_is_the_centre_crop_and_views_differ(make_eval, operators):
    ten = next(iter(make_eval(batch_size=4, crops="ten"))).images
    centre = next(iter(make_eval(batch_size=4))).images
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
def test_memory_layout_is_the_one_asked_for_and_the_shape_is_the_same(make_loader, layout):
    images = next(iter(make_loader(layout=layout))).images
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
def test_the_colour_shift_is_normal_along_the_eigenvectors(make_loader, colors, kind):
    draws = collect_draws(make_loader(lighting=kind), num_epochs=20)
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
def test_switching_one_augmentation_off_leaves_the_other_draws_alone(make_loader, off):
    plain = collect_draws(make_loader())
    changed = collect_draws(make_loader(**off))
    field = {"crop": "offset", "flip": "flip", "lighting": "shift"}[next(iter(off))]
    for one, other in zip(plain, changed, strict=True):
        assert torch.equal(one.keys, other.keys)
        for name in {"offset", "flip", "shift"} - {field}:
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        neutral = {"offset": 16, "flip": 0, "shift": 0.0}[field]
        assert (getattr(other, field) == neutral).all() and not (getattr(one, field) == neutral).all()


def test_how_images_are_normalised_does_not_change_what_is_drawn(make_loader):
    plain = collect_draws(make_loader())
    for options in ({"mean": "channel"}, {"layout": "NHWC", "dtype": "float16"}, {"unit_variance": True}):
        for one, other in zip(plain, collect_draws(make_loader(**options)), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


WAYS = {
    "threads 1": {"num_threads": 1},
    "threads 5": {"num_threads": 5},
    "prefetch 1": {"prefetch_batches": 1},
    "mixed": {"decode": "mixed"},
    "hybrid": {"decode": "hybrid", "host_share": 0.3},
    "hybrid, all on the cores": {"decode": "hybrid", "host_share": 1},
    "hybrid, none on the cores": {"decode": "hybrid", "host_share": 0.0, "hw_decoder_load": 0.5},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("options", [{}, {"layout": "NHWC", "dtype": "float16", "unit_variance": True}], ids=str)
def test_wherever_pixels_are_decoded_the_batches_are_the_same_to_rounding(make_loader, way, options):
    one, other = make_loader(**options), make_loader(**options, **way)
    for _ in range(2):
        for first, second in zip(one, other, strict=True):
            assert torch.equal(first.labels, second.labels)
            assert all(torch.equal(a, b) for a, b in zip(one.draws, other.draws, strict=True))
            assert first.images.stride() == second.images.stride()
            if "decode" in way:
                torch.testing.assert_close(
                    first.images, second.images, rtol=FLOAT16_EPSILON if options else 0, atol=1e-3
                )
            else:
                assert torch.equal(first.images, second.images)


def test_raw_shards_give_the_batches_of_the_jpegs_they_were_made_from(
    make_train, make_eval, shards, raw_shards, operators
):
    for options in ({}, {"layout": "NHWC", "mean": "image"}, {"dtype": "uint8", "layout": "NHWC"}):
        one, other = make_train(**options), make_train(shards=raw_shards, **options)
        for _ in range(2):
            assert record(one) == record(other)
    for crops in ("centre", "ten"):
        one, other = make_eval(crops=crops), make_eval(crops=crops, shards=raw_shards)
        for _ in range(2):
            assert list_images(one) == list_images(other)
    assert list_images(read_pixels(shards, batch_size=10)) == list_images(read_pixels(raw_shards, batch_size=10))


@pytest.mark.parametrize("decode", ["cpu", "mixed", "hybrid"])
def test_evaluation_images_are_the_same_from_every_decoder(make_eval, decode):
    for crops in ("centre", "ten"):  # the mean of the channels: no rounding differs
        assert list_images(make_eval(crops=crops, decode=decode)) == list_images(make_eval(crops=crops))


def test_a_padded_batch_is_the_plain_one_with_zeros_around_it(make_loader, operators):
    """conv1 wants three more pixels at the right and at the bottom (P 3.5's sizes; S's geometry)."""
    for options in ({}, {"mean": "channel", "layout": "NHWC"}, {"dtype": "float16", "unit_variance": True}):
        plain, padded = make_loader(**options), make_loader(**options, size_px=227, channels=4)
        for one, other in zip(plain, padded, strict=True):
            assert other.images.shape == (16, 4, 227, 227)
            rest = other.images.clone()
            rest[:, :3, :224, :224] = 0
            assert not rest.any()
            inner = other.images[:, :3, :224, :224]
            torch.testing.assert_close(inner, one.images, rtol=FLOAT16_EPSILON if "dtype" in options else 0, atol=1e-3)
        assert 0 < padded.draws.flip.sum() < 16


@pytest.mark.parametrize("options", NORMALISATIONS.values(), ids=str)
def test_torch_finishes_crops_by_the_same_formula(make_loader, colors, options):
    """What columns mode and predictions do with pixels that do not come from the graph."""
    if options.get("dtype"):
        pytest.skip("torch finishes in float32 alone")
    crops, finished = make_loader(**{**options, "dtype": "uint8", "layout": "NHWC"}), make_loader(**options)
    finish = finished.transform.constants(colors).finisher(torch.device("cpu"))
    for one, other in zip(crops, finished, strict=True):
        got = finish(one.images.permute(0, 2, 3, 1), crops.draws.shift)
        assert torch.equal(got, other.images) or not load_operators()
        torch.testing.assert_close(got, other.images, rtol=0, atol=1e-3)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_uint8_batches_are_the_crops_and_their_mirror_images_untouched(make_train, stored, operators, layout):
    loader = make_train(dtype="uint8", layout=layout)
    for batch in loader:
        draws = loader.draws
        for image, key, (y, x), flip in zip(
            batch.images, draws.keys.tolist(), draws.offset.tolist(), draws.flip.tolist(), strict=True
        ):
            expected = oracle.augment(stored["train"][f"{key:09d}"][0], (y, x), flip == 1, np.zeros(3))
            assert image.dtype == torch.uint8 and np.array_equal(image.numpy(), expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [("mean", "pixel"), ("lighting", "none"), ("dtype", "bfloat16"), ("layout", "CHW"), ("flip", 2), ("size_px", 256)],
)
def test_an_unknown_choice_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"{field} is {value!r}, expected one of"):
        Transform(**{field: value})


def test_padding_of_uint8_crops_is_refused():
    with pytest.raises(UserError, match="dtype 'uint8' is for crops as they are: leave out size_px 227"):
        Transform(dtype="uint8", size_px=227)
