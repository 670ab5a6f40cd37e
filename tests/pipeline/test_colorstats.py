"""Colour statistics against NumPy in float64, the lighting of paper and source, and damaged files."""

import json

import numpy as np
import pytest

from pipeline.colors import LIGHTING_STD, ColorStats
from pipeline.common.errors import UserError


def make_images(num_images: int = 5, size: int = 256, seed: int = 0) -> np.ndarray:
    """(N, size, size, 3) uint8 with correlated channels of different spread."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(num_images, size, size, 3)) @ rng.normal(size=(3, 3)) * 40 + [90, 120, 150]
    return mixed.clip(0, 255).astype(np.uint8)


def from_images(images: np.ndarray, fingerprint: str = "f" * 64) -> ColorStats:
    flat = images.reshape(-1, 3).astype(np.int64)
    products = (flat.T @ flat).tolist()
    return ColorStats.from_sums(len(images), products, images.astype(np.int64).sum(axis=0), fingerprint)


@pytest.fixture(scope="module")
def images():
    return make_images()


@pytest.fixture(scope="module")
def stats(images):
    return from_images(images)


def test_moments_agree_with_numpy_in_float64(images, stats):
    flat = images.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(stats.mean, flat.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats.covariance, np.cov(flat, rowvar=False, bias=True), rtol=1e-9)
    np.testing.assert_allclose(stats.std, flat.std(axis=0), rtol=1e-10)
    np.testing.assert_allclose(stats.mean_image, images.mean(axis=0), atol=1e-4)
    assert stats.num_pixels == 5 * 256 * 256 and stats.mean_image.dtype == np.float32


def test_the_basis_is_orthonormal_descending_with_a_fixed_sign_and_gives_the_covariance_back(stats):
    vectors, values = stats.eigenvectors, stats.eigenvalues
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(vectors @ np.diag(values) @ vectors.T, stats.covariance, rtol=1e-10)
    assert (np.diff(values) < 0).all() and (values >= 0).all()
    assert (vectors[np.abs(vectors).argmax(axis=0), range(3)] > 0).all()


def test_sums_beyond_the_precision_of_floats_stay_exact():
    # All of ImageNet at one grey level: 8.4e10 pixels, sums of squares beyond 2**52, and a variance of exactly zero.
    num_images, level, side = 1_281_167, 254, 256
    product = num_images * side * side * level * level
    image_sum = np.full((side, side, 3), num_images * level, dtype=np.int64)
    stats = ColorStats.from_sums(num_images, [[product] * 3] * 3, image_sum, "f")
    assert (stats.covariance == 0).all() and (stats.mean == level).all() and (stats.eigenvalues == 0).all()


def test_the_papers_lighting_scales_eigenvalues_of_unit_pixels_and_the_originals_their_roots(stats):
    unit = stats.covariance / 255**2
    values, vectors = np.linalg.eigh(unit)
    expected = LIGHTING_STD * np.abs(vectors[:, ::-1] * values[::-1]) * 255
    np.testing.assert_allclose(np.abs(stats.lighting_basis("paper")), expected, rtol=1e-9)
    original = stats.lighting_basis("original")
    np.testing.assert_allclose(original @ original.T, LIGHTING_STD**2 * stats.covariance, rtol=1e-9)


def test_another_lighting_is_refused(stats):
    with pytest.raises(ValueError, match="expected 'paper' or 'original'"):
        stats.lighting_basis("none")


def test_saved_statistics_load_as_they_were(stats, tmp_path):
    stats.save(tmp_path)
    loaded = ColorStats.load(str(tmp_path), stats.shards_fingerprint)
    for name in ("mean", "covariance", "eigenvalues", "eigenvectors", "mean_image"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(stats, name))
    assert (loaded.num_pixels, loaded.shards_fingerprint) == (stats.num_pixels, stats.shards_fingerprint)
    raw = json.loads((tmp_path / "color.json").read_text())
    assert raw["units"] == "pixel values 0-255"


def test_statistics_of_other_shards_are_refused(stats, tmp_path):
    stats.save(tmp_path)
    with pytest.raises(UserError, match=r"computed on shards ffffffffffff, but these are 0{12}; run `alexnet-prep pca"):
        ColorStats.load(tmp_path, "0" * 64)


def test_a_url_is_called_one_and_not_a_folder_without_statistics():
    with pytest.raises(UserError, match=r"^s3://bucket/x: is a URL, expected .*: ShardSet.open\(...\).root"):
        ColorStats.load("s3://bucket/x", "fingerprint")


def test_missing_statistics_name_the_command_that_makes_them(tmp_path):
    with pytest.raises(UserError, match=r"color\.json: missing; run `alexnet-prep pca --shards "):
        ColorStats.load(tmp_path, "f")


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [1, 2]},
        {"mean": "red"},
        {"mean": None},
        {"covariance": [[1, 2, 3]]},
        {"covariance": [[1, 2, 3], [1, 2, 3], [1, 2, float("nan")]]},
        {"eigenvalues": [[1], [2], [3]]},
        {"eigenvectors": {}},
        {"num_pixels": "many"},
        {"num_pixels": None},
        {"units": "0-1"},
    ],
    ids=str,
)
def test_a_damaged_file_is_refused_in_one_line(stats, tmp_path, change):
    stats.save(tmp_path)
    path = tmp_path / "color.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="alexnet-prep pca") as caught:
        ColorStats.load(tmp_path, stats.shards_fingerprint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["mean", "covariance", "eigenvalues", "eigenvectors", "num_pixels", "units"])
def test_a_missing_field_is_refused(stats, tmp_path, key):
    stats.save(tmp_path)
    path = tmp_path / "color.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    with pytest.raises(UserError, match="damaged"):
        ColorStats.load(tmp_path, stats.shards_fingerprint)


@pytest.mark.parametrize("content", [b"", b"not an array", None], ids=["empty", "text", "missing"])
def test_a_damaged_mean_image_is_refused(stats, tmp_path, content):
    stats.save(tmp_path)
    path = tmp_path / "mean_image.npy"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        ColorStats.load(tmp_path, stats.shards_fingerprint)


@pytest.mark.parametrize("array", [np.zeros((224, 224, 3), np.float32), np.zeros((256, 256, 3))], ids=["size", "type"])
def test_a_mean_image_of_another_shape_or_type_is_refused(stats, tmp_path, array):
    stats.save(tmp_path)
    np.save(tmp_path / "mean_image.npy", array)
    with pytest.raises(UserError, match=r"expected float32 \(256, 256, 3\)"):
        ColorStats.load(tmp_path, stats.shards_fingerprint)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{", '"text"'])
def test_json_of_another_kind_is_refused(stats, tmp_path, content):
    stats.save(tmp_path)
    (tmp_path / "color.json").write_text(content)
    with pytest.raises(UserError, match=r"color\.json"):
        ColorStats.load(tmp_path, stats.shards_fingerprint)
