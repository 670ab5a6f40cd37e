"""The CPU's operators: the bits of the formula for every transform, the same on any threads, a name for what fails."""

import itertools
import os
import random
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from pipeline.operators import Failure, find_failure, load_operators
from tests import oracle
from tests.fuzz.mutants import make_jpegs, mutate
from tests.pipeline.operators.operating import (
    Colours,
    Draws,
    decode_with_pillow,
    find_bias,
    formula,
    make_colours,
    make_draws,
    make_graph,
    make_jpeg,
    make_label_graph,
    make_pixels,
    run,
    write_shard,
)

NUM = 32
KINDS = [{}, {"subsampling": 0}, {"progressive": True}, {"mode": "L"}, {"quality": 30}, {"restart_marker_blocks": 5}]
COLOURS = make_colours()
ENDINGS = ["jpg", "rgb"]
pytestmark = pytest.mark.skipif(not load_operators(), reason="no C++ compiler, or no headers of libjpeg-turbo")


def describe(value) -> str | None:
    return "+".join(n for n, v in value._asdict().items() if v is not None) if isinstance(value, Colours) else None


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """By ending: a shard of NUM samples, of JPEGs of every kind and of their pixels, and the pixels."""
    folder = tmp_path_factory.mktemp("operators")
    jpegs = [make_jpeg(seed=n, **KINDS[n % len(KINDS)]) for n in range(NUM)]
    pixels = [decode_with_pillow(data) for data in jpegs]
    return {
        "jpg": (write_shard(folder / "jpeg.tar", jpegs, "jpg"), pixels),
        "rgb": (write_shard(folder / "raw.tar", [image.tobytes() for image in pixels], "rgb"), pixels),
    }


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("layout", ["CHW", "HWC"])
@pytest.mark.parametrize(
    ("dtype", "colours"),
    [
        (types.UINT8, Colours()),
        (types.UINT8, COLOURS),  # which are of no use to it
        (types.FLOAT, Colours()),
        (types.FLOAT, COLOURS),
        *((types.FLOAT, COLOURS._replace(**{name: None})) for name in Colours._fields),
        *((types.FLOAT, Colours(**{name: getattr(COLOURS, name)})) for name in Colours._fields),
    ],
    ids=describe,
)
def test_every_transform_gives_the_bits_of_the_formula(shards, ending, layout, dtype, colours):
    shard, pixels = shards[ending]
    draws = make_draws(NUM)
    options = {"dtype": dtype, "output_layout": layout, **colours.options(layout)}
    got = run(make_graph(shard, draws, batch_size=NUM, ending=ending, **options))
    expected = formula(pixels, draws, colours, dtype, layout)
    assert got.dtype == expected.dtype and np.array_equal(got, expected)


def test_the_formula_is_that_of_the_oracle(shards):
    shard, pixels = shards["jpg"]
    draws = make_draws(NUM)
    stored = np.zeros((256, 256, 3), np.float32)
    stored[16:240, 16:240] = COLOURS.mean_image
    got = run(make_graph(shard, draws, batch_size=NUM, **COLOURS.options("CHW")))
    shift = draws.noise.astype(np.float64) @ COLOURS.basis.T.astype(np.float64)
    for n in range(NUM):
        expected = oracle.augment(
            pixels[n], tuple(draws.offset[n]), bool(draws.flip[n]), shift[n], mean=COLOURS.mean, mean_image=stored,
            std=1 / COLOURS.factor.astype(np.float64),
        )  # fmt: skip
        assert np.abs(got[n] - expected).max() < 2e-5


@pytest.mark.parametrize("ending", ENDINGS)
def test_without_arguments_the_centre_is_cut_and_nothing_added(shards, ending):
    shard, pixels = shards[ending]
    got = run(make_graph(shard, batch_size=NUM, ending=ending))
    assert np.array_equal(got, np.stack([image[16:240, 16:240].transpose(2, 0, 1) for image in pixels]))


def test_a_crop_begins_at_the_nearest_pixel(shards):
    shard, pixels = shards["rgb"]
    options = {"crop_pos_y": 0.3, "crop_pos_x": 0.99, "dtype": types.UINT8, "output_layout": "HWC"}
    got = run(make_graph(shard, batch_size=1, ending="rgb", **options))
    assert np.array_equal(got[0], pixels[0][10:234, 32:])


@pytest.mark.parametrize("num", [1, 2, 7, 64, 257])
def test_lighting_is_summed_in_the_order_of_torch(tmp_path, num):
    shard = write_shard(tmp_path / "black.tar", [bytes(196_608)], "rgb")
    draws = make_draws(num, seed=num)
    colours = COLOURS._replace(mean_image=None, factor=None)
    got = run(make_graph(shard, draws, batch_size=num, ending="rgb", **colours.options("CHW")))
    assert np.array_equal(got[:, :, 100, 100], find_bias(draws.noise, colours))


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_whole_image_is_what_is_stored(shards, ending):
    shard, pixels = shards[ending]
    got = run(make_graph(shard, make_draws(NUM), batch_size=NUM, ending=ending, whole=True))
    assert got.dtype == np.uint8 and np.array_equal(got, np.stack(pixels))


@pytest.mark.parametrize("ending", ENDINGS)
def test_batches_do_not_depend_on_threads_nor_on_the_executor(shards, ending):
    shard, _ = shards[ending]

    def read(num_threads, **pipeline):
        graph = make_graph(
            shard, make_draws(21), batch_size=7, ending=ending, num_threads=num_threads, pipeline=pipeline,
            **COLOURS.options("CHW"),
        )  # fmt: skip
        return np.concatenate([run(graph) for _ in range(3)])

    expected = read(1, exec_dynamic=True)
    for num_threads in (2, 4, 16):
        assert np.array_equal(read(num_threads, exec_dynamic=True), expected)
    assert np.array_equal(read(3, exec_dynamic=False), expected)
    assert np.array_equal(read(3, exec_dynamic=True, prefetch_queue_depth=5), expected)


def test_batches_may_differ_in_size():
    jpegs = [np.frombuffer(make_jpeg(seed=n), np.uint8) for n in range(5)]
    sizes = [5, 1, 3, 2, 5, 4]

    @pipeline_def(batch_size=5, num_threads=3, device_id=None)
    def define():
        encoded = fn.external_source(iter([jpegs[:size] for size in sizes]))
        return fn.alexnet.decode_crop_finish(encoded, dtype=types.UINT8, output_layout="HWC")

    graph = define()
    for size in sizes:
        got = run(graph)
        assert len(got) == size and np.array_equal(got[-1], decode_with_pillow(jpegs[size - 1])[16:240, 16:240])


def test_samples_keep_their_names_where_a_graph_splits_its_batch(shards):
    shard, pixels = shards["rgb"]

    @pipeline_def(batch_size=NUM, num_threads=2, device_id=None, enable_conditionals=True)
    def define():
        label = fn.readers.webdataset(paths=[str(shard)], index_paths=[str(shard.with_suffix(".idx"))], ext=["cls"])
        if fn.external_source(lambda: [np.array(n % 3 == 0) for n in range(NUM)], batch=True):
            image = fn.alexnet.read_crop_finish(label, whole=True)
        else:
            image = fn.alexnet.read_crop_finish(label, whole=True)
        return image

    assert np.array_equal(run(define()), np.stack(pixels))


def test_several_graphs_run_side_by_side(shards):
    graphs = [
        make_graph(shards[ending][0], make_draws(8, seed), batch_size=8, ending=ending, **COLOURS.options("CHW"))
        for ending, seed in itertools.product(ENDINGS, range(3))
    ]
    expected = [[run(graph) for _ in range(4)] for graph in graphs]
    fresh = [
        make_graph(shards[ending][0], make_draws(8, seed), batch_size=8, ending=ending, **COLOURS.options("CHW"))
        for ending, seed in itertools.product(ENDINGS, range(3))
    ]
    for turn in range(4):
        for graph, batches in zip(fresh, expected, strict=True):
            assert np.array_equal(run(graph), batches[turn])


def make_random_graph(shard, ending, checkpoint=None):
    @pipeline_def(
        batch_size=6, num_threads=2, device_id=None, seed=1, exec_dynamic=True, enable_checkpointing=True,
        checkpoint=checkpoint,
    )  # fmt: skip
    def define():
        read = fn.readers.webdataset(
            paths=[str(shard)], index_paths=[str(shard.with_suffix(".idx"))], ext=["cls" if ending == "rgb" else "jpg"],
            random_shuffle=True, initial_fill=NUM, seed=2, dont_use_mmap=True,
        )  # fmt: skip
        operator = fn.alexnet.read_crop_finish if ending == "rgb" else fn.alexnet.decode_crop_finish
        positions = [k / 32 for k in range(33)]
        return operator(
            read,
            crop_pos_y=fn.random.uniform(values=positions, seed=3),
            crop_pos_x=fn.random.uniform(values=positions, seed=4),
            mirror=fn.random.coin_flip(seed=5),
            noise=fn.random.normal(shape=[3], seed=6),
            **COLOURS.options("CHW"),
        )

    return define()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_graph_goes_on_from_its_checkpoint_with_the_same_bits(shards, ending):
    shard, _ = shards[ending]
    graph = make_random_graph(shard, ending)
    for _ in range(3):
        run(graph)
    state = graph.checkpoint()
    expected = [run(graph) for _ in range(8)]
    resumed = make_random_graph(shard, ending, checkpoint=state)
    assert all(np.array_equal(run(resumed), batch) for batch in expected)
    assert not np.array_equal(run(make_random_graph(shard, ending)), expected[0])


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_serialised_graph_is_the_same_graph(shards, ending):
    graph = make_random_graph(shards[ending][0], ending)
    again = Pipeline.deserialize(graph.serialize())
    assert np.array_equal(run(again), run(graph))


def take(graph) -> torch.Tensor:
    """The next batch, in its own memory."""
    return torch.from_dlpack(graph.run()[0].as_tensor())


def test_a_batch_stays_as_it_is_while_somebody_holds_it(shards):
    graph = make_random_graph(shards["jpg"][0], "jpg")
    held = [take(graph) for _ in range(3)]
    copies = [batch.clone() for batch in held]
    addresses = {take(graph).data_ptr() for _ in range(40)}
    assert not addresses & {batch.data_ptr() for batch in held} and len(addresses) < 10
    del graph
    assert all(torch.equal(batch, copy) for batch, copy in zip(held, copies, strict=True))


@pytest.mark.parametrize("dtype", [types.FLOAT, types.UINT8])
def test_memory_that_nobody_holds_is_used_again(shards, dtype):
    """Fresh memory would be ten page faults a batch or more: of huge pages, float32."""
    graph = make_graph(shards["rgb"][0], batch_size=128, ending="rgb", dtype=dtype)
    for _ in range(10):
        take(graph)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        take(graph)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 40 * 5


def run_until_it_fails(graph) -> Failure | None:
    """The failure that comes within twenty batches."""
    with pytest.raises(RuntimeError) as caught:
        for _ in range(20):
            run(graph)
    return find_failure(caught.value)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_memory_of_a_batch_that_outlives_its_graph_is_given_back(shards):
    graph = make_graph(shards["rgb"][0], batch_size=128, ending="rgb")
    held = take(graph)
    del graph
    before = resident_bytes()
    size = held.nbytes
    del held
    assert before - resident_bytes() > 0.9 * size


JPEG = make_jpeg(seed=7)
DAMAGED = {
    "empty": (b"", "Empty input file"),
    "not a JPEG": (b"no picture", "Not a JPEG file"),
    "only its header": (JPEG[:400], "[Pp]remature end of"),
    "cut in the scan": (JPEG[: len(JPEG) // 3], "[Pp]remature end of"),
    "overwritten": (JPEG[: len(JPEG) // 3] + b"\xff\xd9" * 100 + JPEG[len(JPEG) // 3 + 200 :], "Corrupt|[Pp]remature"),
    "too small": (make_jpeg(side=255), "255x255 px, expected 256x256"),
    "CMYK": (make_jpeg(mode="CMYK"), "Unsupported color conversion"),
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_jpeg_that_cannot_be_decoded_is_named_with_the_reason(tmp_path, name, whole):
    data, reason = DAMAGED[name]
    shard = write_shard(tmp_path / "a: b, c.tar", [JPEG, JPEG, JPEG, data, JPEG, data], "jpg")
    with pytest.raises(RuntimeError) as caught:
        run(make_graph(shard, batch_size=6, num_threads=3, whole=whole))
    found = find_failure(caught.value)
    assert found is not None and (found.path, found.key) == (str(shard), "000000003")  # the first, on any threads
    assert re.match(reason, found.reason)


def test_damage_below_the_crop_is_an_error_of_the_whole_image_alone(tmp_path):
    cut = JPEG[: int(len(JPEG) * 0.95)]
    shard = write_shard(tmp_path / "shard.tar", [cut], "jpg")
    top = Draws(np.array([[0, 0]]), np.zeros(1, np.int32), np.zeros((1, 3), np.float32))
    got = run(make_graph(shard, top, batch_size=1, dtype=types.UINT8, output_layout="HWC"))
    assert np.array_equal(got[0], decode_with_pillow(JPEG)[:224, :224])
    bottom = top._replace(offset=np.array([[32, 0]]))
    for draws, options in ((bottom, {}), (top, {"whole": True})):
        with pytest.raises(RuntimeError, match=r"alexnet: .*shard\.tar:512:000000000\.jpg: Premature end"):
            run(make_graph(shard, draws, batch_size=1, **options))


@pytest.mark.parametrize(
    ("end", "reason"),
    [(b"", "Premature end of JPEG file"), (b"\1" * 40 + b"\xff\xd9", r"Corrupt JPEG data: \d+ extraneous bytes")],
    ids=["missing", "late"],
)
def test_a_whole_image_ends_with_its_end_marker(tmp_path, end, reason):
    shard = write_shard(tmp_path / "shard.tar", [JPEG, JPEG[:-2] + end], "jpg")
    found = run_until_it_fails(make_graph(shard, batch_size=2, whole=True))
    assert found is not None and found.key == "000000001" and re.match(reason, found.reason)


@pytest.mark.slow
def test_mutants_are_judged_as_the_strict_codec_judges_them(tmp_path):
    seeds = [data for data in make_jpegs() if simplejpeg.decode_jpeg_header(data)[2] != "CMYK"]  # no shard has these
    num_refused = 0
    for number in range(300):
        data = mutate(seeds[number % len(seeds)], seeds, random.Random(f"operator {number}"))
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pixels = None
        shard = write_shard(tmp_path / "mutant.tar", [data], "jpg")
        graph = make_graph(shard, batch_size=1, num_threads=1, whole=True)
        if pixels is not None and pixels.shape == (256, 256, 3):
            assert np.array_equal(run(graph)[0], pixels), number
        else:
            num_refused += 1
            with pytest.raises(RuntimeError) as caught:
                run(graph)
            assert find_failure(caught.value), number
    assert 50 < num_refused < 300


@pytest.fixture
def raw(shards, tmp_path):
    """A raw shard of a test's own."""
    for ending in (".tar", ".idx"):
        shutil.copy(shards["rgb"][0].with_suffix(ending), tmp_path / f"own{ending}")
    return tmp_path / "own.tar"


@pytest.mark.parametrize("whole", [False, True])
def test_a_tar_that_is_gone_is_named(raw, whole):
    raw.unlink()
    failure = Failure(str(raw), "000000000", "the file cannot be opened: No such file or directory")
    assert run_until_it_fails(make_label_graph(raw, whole=whole)) == failure


@pytest.mark.parametrize("whole", [False, True])
def test_a_tar_that_is_cut_is_named_with_the_first_sample_that_is_missing(raw, whole):
    os.truncate(raw, 9 * (196_608 + 3 * 512) + 100_000)
    failure = Failure(str(raw), "000000009", "the file ends there")
    assert run_until_it_fails(make_label_graph(raw, whole=whole)) == failure


def test_a_tar_that_is_cut_while_it_is_read_is_an_error_that_names_it(raw):
    graph = make_label_graph(raw)
    for _ in range(10):  # of eight batches
        run(graph)
    os.truncate(raw, 100_000)
    found = run_until_it_fails(graph)
    assert found is not None and (found.path, found.reason) == (str(raw), "the file ends there")


def test_labels_without_pixels_before_them_are_refused(tmp_path):
    pixels = [make_pixels(n).tobytes() for n in range(3)]
    for name, samples, ending, options, key in (
        ("label first", pixels, "rgb", {"label_first": True}, "000000000"),
        ("another file", pixels, "bmp", {}, "000000000"),
        ("too short", [pixels[0], pixels[1][:-1], pixels[2]], "rgb", {}, "000000001"),
        ("far too short", [b"", *pixels], "rgb", {}, "000000000"),
    ):
        shard = write_shard(tmp_path / f"{name}.tar", samples, ending, **options)
        refused = run_until_it_fails(make_graph(shard, batch_size=3, ending="rgb"))
        assert refused == Failure(str(shard), key, "no pixels before its label")


def test_labels_from_elsewhere_than_a_tar_are_refused():
    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def define():
        return fn.alexnet.read_crop_finish(fn.external_source(lambda: [np.zeros(5, np.uint8)], batch=True))

    with pytest.raises(RuntimeError, match=r"\nalexnet: : it has no place in a tar\n"):
        run(define())


def test_the_key_is_what_the_source_says(tmp_path):
    shard = write_shard(tmp_path / "some.tar", [bytes(196608)] * 3, "rgb")

    @pipeline_def(batch_size=3, num_threads=1, device_id=None)
    def define():
        index = str(shard.with_suffix(".idx"))
        label = fn.readers.webdataset(
            paths=[str(shard)], index_paths=[index], ext=["cls"], missing_component_behavior="error"
        )
        return fn.alexnet.read_key(label), fn.get_property(label, key="source_info")[-13:-4]

    ours, stock = (np.array(out.as_array()) for out in define().run())
    assert ours.dtype == np.uint8 and ours.shape == (3, 9)
    np.testing.assert_array_equal(ours, stock)


def test_a_key_from_elsewhere_than_a_tar_is_refused():
    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def define():
        return fn.alexnet.read_key(fn.external_source(lambda: [np.zeros(5, np.uint8)], batch=True))

    with pytest.raises(RuntimeError, match='no key in the source ""'):
        run(define())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": types.FLOAT16}, "dtype: expected FLOAT or UINT8"),
        ({"output_layout": "HCW"}, "output_layout: expected CHW or HWC"),
        ({"basis": [1.0] * 8}, "basis: expected 9"),
        ({"mean": [1.0] * 4}, "expected 3 numbers"),
        ({"factor": [1.0]}, "expected 3 numbers"),
        ({"mean_image": [1.0] * 3}, r"mean_image: expected 3 \* 224 \* 224"),
        ({"crop_pos_y": 1.1}, "crop position 1.1, expected 0 to 1"),
        ({"crop_pos_x": float("nan")}, "crop position -?nan, expected 0 to 1"),
    ],
    ids=str,
)
def test_arguments_of_no_sense_are_refused(shards, options, words):
    with pytest.raises(RuntimeError, match=words) as caught:
        run(make_graph(shards["jpg"][0], batch_size=2, **options))
    assert find_failure(caught.value) is None


def test_other_errors_name_no_sample():
    assert find_failure(RuntimeError("out of memory")) is None
    assert find_failure(RuntimeError("x\nalexnet: /a b/c:d.tar:512:000000042.jpg: why: so\ny")) == Failure(
        "/a b/c:d.tar", "000000042", "why: so"
    )
