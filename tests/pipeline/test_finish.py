"""The arithmetic behind the decoder: every implementation against `oracle` and against each other, bit by bit.

Tolerance against the oracle, which computes in float64: 1e-3 grey level over the smallest scale.
"""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pipeline.finish import Constants, GpuFinisher, Transform, Views, finish_batch
from pipeline.hostfinish import Buffers, CpuFinisher
from pipeline.threads import run_all, start_threads

from pipeline import hostfinish, kernel
from pipeline.common.errors import UserError
from tests import oracle

TOLERANCE_GREY = 1e-3
TRANSFORMS = {
    "image": {},
    "channel": {"mean": "channel"},
    "image, scaled": {"unit_variance": True, "lighting": "original"},
    "channel, scaled": {"mean": "channel", "unit_variance": True},
}
OFFSETS = [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16), (7, 29), (31, 1)]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Noise, whose neighbouring pixels and channels all differ, from 0 to 255."""
    return torch.from_numpy(np.random.default_rng(3).integers(0, 256, (3, 256, 256, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def views() -> Views:
    """Every offset, upright and mirrored, of the images in turns, each with a shift of its own."""
    table = torch.tensor([(*offset, flip) for offset in OFFSETS for flip in (0, 1)])
    shift = torch.from_numpy(np.random.default_rng(4).normal(0, 20, (len(table), 3)).astype(np.float32))
    return Views(torch.arange(len(table)) % 3, table[:, :2], table[:, 2], shift)


def finish_on_cpu(transform, colors, images, views, compiled) -> torch.Tensor:
    finisher = CpuFinisher(transform, colors, 2, the_kernel() if compiled else None)
    return finisher.begin(images.__getitem__, views).result()


def the_kernel():
    found = kernel.load_kernel()
    if found is None:
        pytest.skip("no C compiler")
    return found


def to_numpy(images: torch.Tensor) -> np.ndarray:
    return images.double().numpy()


@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "C"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_cpu_finishes_every_view_as_the_formula_says(colors, images, views, options, layout, compiled):
    transform = Transform(**options, layout=layout)
    got = finish_on_cpu(transform, colors, images, views, compiled)
    std = np.sqrt(np.diag(colors.covariance)) if transform.unit_variance else None
    expected = [
        oracle.augment(
            images[source].numpy(),
            offset,
            flip == 1,
            shift.double().numpy(),
            mean=colors.mean if transform.mean == "channel" else None,
            mean_image=colors.mean_image if transform.mean == "image" else None,
            std=std,
            divisor=1.1 if transform.lighting == "original" else 1.0,
        )
        for source, offset, flip, shift in zip(
            views.source.tolist(), views.offset.tolist(), views.flip.tolist(), views.shift, strict=True
        )
    ]
    assert got.shape == (len(OFFSETS) * 2, 3, 224, 224)
    atol = TOLERANCE_GREY / (1.0 if std is None else std.min())
    np.testing.assert_allclose(to_numpy(got), np.stack(expected), rtol=0, atol=atol)
    memory_format = torch.contiguous_format if layout == "NCHW" else torch.channels_last
    assert got.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_all_implementations_give_the_same_bits(colors, images, views, options, layout, dtype):
    transform = Transform(**options, layout=layout, dtype=dtype)
    on_gpu = GpuFinisher(transform, colors, torch.device("cpu"))  # what a GPU would be given
    on_gpu._finish = finish_batch
    got = on_gpu(images, views)
    assert got.dtype == transform.torch_dtype
    for compiled in (False, True):
        other = finish_on_cpu(transform, colors, images, views, compiled)
        assert torch.equal(got, other) and got.stride() == other.stride()


def test_half_precision_is_rounded_once_from_single(colors, images, views):
    single = finish_on_cpu(Transform(), colors, images, views, False)
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        assert torch.equal(finish_on_cpu(Transform(dtype=name), colors, images, views, False), single.to(dtype))


def test_without_a_shift_the_mean_alone_is_subtracted(colors, images, views):
    zero = views._replace(shift=torch.zeros_like(views.shift))
    for options in ({}, {"mean": "channel"}):
        transform = Transform(**options)
        one = finish_on_cpu(transform, colors, images, zero, True)
        other = finish_on_cpu(transform, colors, images, views._replace(shift=None), True)
        assert torch.equal(one, other)


@pytest.mark.slow
def test_compiled_by_torch_the_batch_function_gives_nearly_the_same(colors, images, views):
    """Within rounding: a compiler may fuse a multiplication with an addition."""
    the_kernel()  # torch.compile needs a compiler as well
    transform = Transform(unit_variance=True)
    constants = Constants.of(transform, colors)
    arguments = (images, views, constants, constants.bias(views.shift), torch.float32, "NHWC")
    got = torch.compile(finish_batch, dynamic=False)(*arguments)
    torch.testing.assert_close(got, finish_batch(*arguments), rtol=1e-6, atol=1e-4)


def test_a_compiler_that_fails_costs_speed_and_is_told(colors, images, views, capsys):
    finisher = GpuFinisher(Transform(), colors, torch.device("cpu"))

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("no ptxas")

    finisher._finish = fail
    expected = finish_on_cpu(Transform(), colors, images, views, False)
    for _ in range(2):
        assert torch.equal(finisher(images, views), expected)
    assert capsys.readouterr().err.count("torch.compile failed (RuntimeError)") == 1


def test_an_error_of_the_arithmetic_itself_is_raised_and_not_laid_on_the_compiler(colors, images, views, capsys):
    with pytest.raises(IndexError):
        GpuFinisher(Transform(), colors, torch.device("cpu"))(images[:1], views)
    assert "torch.compile" not in capsys.readouterr().err


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_without_a_working_c_compiler_there_is_no_kernel(monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    assert kernel.load_kernel.__wrapped__() is None


# Memory


def test_memory_is_used_again_once_nobody_holds_the_tensor():
    buffers = Buffers()
    first = buffers.take((2, 3), torch.float32)
    address = first.data_ptr()
    assert address % 64 == 0
    del first
    gc.collect()
    assert buffers.take((3, 2), torch.int16).data_ptr() == address


@pytest.mark.parametrize(
    "keep",
    [lambda t: t, lambda t: t[0], lambda t: t.permute(1, 0), lambda t: t.numpy(), lambda t: [t.view(-1)[2:]]],
    ids=["itself", "a part", "a view", "an array", "a view in a list"],
)
def test_memory_is_not_used_again_while_anything_of_the_tensor_lives(keep):
    buffers = Buffers()
    tensor = buffers.take((4, 4), torch.float32)
    address = tensor.data_ptr()
    held = keep(tensor)
    del tensor
    gc.collect()
    others = [buffers.take((4, 4), torch.float32) for _ in range(3)]
    assert address not in {other.data_ptr() for other in others}
    del held, others
    gc.collect()
    assert buffers.take((4, 4), torch.float32) is not None


def test_a_few_free_buffers_are_kept_and_a_larger_one_is_made_when_needed():
    buffers = Buffers()
    held = [buffers.take((100,), torch.float32) for _ in range(20)]
    del held
    gc.collect()
    assert len(buffers._free) == hostfinish._KEPT_BUFFERS
    assert buffers.take((1000,), torch.float32).shape == (1000,)
    assert buffers.take((0, 3), torch.float32).shape == (0, 3)


# Threads


def test_threads_compute_on_one_core_each_and_the_rest_of_the_process_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        threads = start_threads(4)
        seen: dict[int, int] = {}
        barrier = threading.Barrier(4)

        def look(_: int) -> None:
            barrier.wait()
            seen[threading.get_ident()] = torch.get_num_threads()

        run_all(threads, look, range(4))
        assert list(seen.values()) == [1, 1, 1, 1]
        with ThreadPoolExecutor(1) as later:  # a thread of somebody else's
            assert later.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_thread_is_raised_when_all_have_ended():
    ended = []

    def work(item: int) -> None:
        if item == 1:
            raise UserError("one")
        ended.append(item)

    with pytest.raises(UserError, match="one"):
        run_all(start_threads(2), work, range(5))
    assert sorted(ended) == [0, 2, 3, 4]
