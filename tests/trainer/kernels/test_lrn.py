"""Local response normalisation, across maps and (net 145) across space: against the float64 oracle and torch's own."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests import oracle
from trainer.kernels import lrn as lrn_module
from trainer.kernels.lrn import local_response_norm, spatial_response_norm
from trainer.kernels.native import load_native

STRONG = {"alpha": 0.1, "k": 1.5}  # so that the sums count for something beside k


WAYS = ["native", "torch"]


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compiled, native.c, or torch's operations in blocks of a few rows: small maps take several and a remainder."""
    if request.param == "torch":
        monkeypatch.setattr(lrn_module, "load_native", lambda: None)
        monkeypatch.setattr(lrn_module, "_BLOCK_ELEMENTS", 60)
    elif request.param == "native" and load_native() is None:
        pytest.skip("no C compiler")
    return str(request.param)


def expect(x: torch.Tensor, gradient: torch.Tensor, relu: bool, **constants: Any) -> tuple[np.ndarray, np.ndarray]:
    """The oracle's outputs and gradients of x, float64."""
    given, incoming = (t.detach().double().numpy() for t in (x, gradient))
    a = np.maximum(given, 0) if relu else given
    back = oracle.lrn_backward(a, incoming, **constants)
    return oracle.lrn(a, **constants), np.where(given > 0, back, 0) if relu else back


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2**-8)]
)
@pytest.mark.parametrize(
    "constants",
    [
        {},
        {"alpha_over_n": True},
        {"num_towers": 2},
        {"num_towers": 2, "n": 3, "alpha_over_n": True},
        {"n": 9},
        {"n": 9, "beta": 0.6, "num_towers": 2},
    ],
)
def test_lrn_forward_and_backward_agree_with_the_oracle(
    way: str, dtype: torch.dtype, tolerance: float, constants: dict, relu: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 4.0 * torch.randn(3, 12, 17, 13, generator=generator, dtype=torch.float64)  # three blocks of native.c
    gradient = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    x, gradient = x.to(dtype).requires_grad_(), gradient.to(dtype)
    result = local_response_norm(x, **STRONG, **constants, relu=relu)
    result.backward(gradient)
    expected, expected_gradient = expect(x, gradient, relu, **STRONG, **constants)
    assert result.dtype == x.grad.dtype == dtype
    np.testing.assert_allclose(result.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(x.grad.double().numpy(), expected_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("relu", [False, True])
def test_a_compiled_graph_has_the_same_lrn_in_plain_operations(relu: bool) -> None:
    x = torch.randn(2, 12, 5, 4, dtype=torch.float64).mul(4.0).requires_grad_()
    gradient = torch.randn(x.shape, dtype=torch.float64)
    compiled = torch.compile(local_response_norm, backend="eager", fullgraph=True)
    result = compiled(x, num_towers=2, relu=relu, **STRONG)
    result.backward(gradient)
    expected, expected_gradient = expect(x, gradient, relu, num_towers=2, **STRONG)
    np.testing.assert_allclose(result.detach().numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(x.grad.numpy(), expected_gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", [*WAYS, "compiled"], indirect=True)
@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_gradient_passes_a_relu_whose_input_is_exactly_zero(way: str, zero: float, dtype: torch.dtype) -> None:
    x = torch.arange(-3.0, 4.0).repeat(36).reshape(3, 12, 7, 1)
    x = torch.where(x == 0, zero, x).to(dtype).requires_grad_()
    gradient = torch.ones_like(x)
    norm = torch.compile(local_response_norm, backend="eager") if way == "compiled" else local_response_norm
    norm(x, relu=True, **STRONG).backward(gradient)
    _, expected = expect(x, gradient, True, **STRONG)
    assert (x.grad[x == 0] == 0).all() and (x == 0).sum() == 36
    np.testing.assert_allclose(x.grad.double().numpy(), expected, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_what_is_not_a_number_stays_so_through_relu_and_lrn(way: str) -> None:
    x = torch.ones(1, 9, 1, 1)
    x[0, 0] = math.nan
    found = local_response_norm(x.requires_grad_(), relu=True)
    found.sum().backward()
    assert found.isnan().flatten().tolist() == [True, True, True, *[False] * 6]
    assert x.grad.isnan().flatten().tolist() == [True] * 5 + [False] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lrns_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    x = torch.randn(5, 96, 15, 15).to(dtype).to(memory_format=torch.channels_last)
    found, threads = [], torch.get_num_threads()
    try:
        for num in (1, 2, 3):
            torch.set_num_threads(num)
            leaf = x.clone().requires_grad_()
            result = local_response_norm(leaf, num_towers=2, relu=True, **STRONG)
            result.backward(x)
            found.append((result.detach(), leaf.grad))
    finally:
        torch.set_num_threads(threads)
    for result, gradient in found[1:]:
        assert torch.equal(result, found[0][0]) and torch.equal(gradient, found[0][1])


@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_lrn_gradient_passes_gradcheck(beta: float) -> None:
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: local_response_norm(a, beta=beta, num_towers=2, **STRONG), (x,))


def test_lrn_of_one_tower_with_alpha_over_n_is_torchs() -> None:
    x = 30.0 * torch.randn(2, 16, 7, 7, dtype=torch.float64)
    expected = functional.local_response_norm(x, size=5, alpha=1e-2, beta=0.75, k=2.0)
    torch.testing.assert_close(local_response_norm(x, alpha=1e-2, alpha_over_n=True), expected, rtol=1e-12, atol=1e-12)
    printed = local_response_norm(x, alpha=1e-2 / 5)  # the paper's printed formula takes a fifth of it
    torch.testing.assert_close(printed, expected, rtol=1e-12, atol=1e-12)


def test_lrn_takes_every_memory_format_and_gives_channels_last() -> None:
    base = torch.randn(4, 8, 6, 6)
    expected = local_response_norm(base, num_towers=2, **STRONG)
    strided = torch.stack([base, -base], dim=-1)[..., 0]
    for x in (base.to(memory_format=torch.channels_last), strided, base.transpose(2, 3).contiguous().transpose(2, 3)):
        result = local_response_norm(x, num_towers=2, **STRONG)
        assert torch.equal(result, expected)
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_lrn_takes_gradients_of_any_strides() -> None:
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    gradient = torch.randn(2, 8, 4, 3, dtype=torch.float64).transpose(2, 3)
    leaf = x.clone().requires_grad_()
    local_response_norm(leaf, **STRONG).backward(gradient)
    np.testing.assert_allclose(leaf.grad, oracle.lrn_backward(x.numpy(), gradient.numpy(), **STRONG), rtol=1e-10)


def test_lrn_keeps_16_bit_maps_under_autocast() -> None:
    x = torch.randn(2, 8, 3, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert local_response_norm(x, beta=0.6).dtype == torch.bfloat16
        assert spatial_response_norm(x).dtype == torch.bfloat16


@pytest.mark.parametrize("constants", [{"n": 4}, {"n": 1}, {"num_towers": 3}])
def test_lrn_refuses_windows_and_towers_that_do_not_fit(constants: dict) -> None:
    with pytest.raises(ValueError, match="divisible by num_towers"):
        local_response_norm(torch.zeros(1, 8, 2, 2), **constants)


def test_spatial_norm_agrees_with_the_oracle() -> None:
    x = 40.0 * torch.randn(2, 3, 7, 9, dtype=torch.float64)
    np.testing.assert_allclose(spatial_response_norm(x), oracle.spatial_response_norm(x.numpy()), rtol=1e-12)


def test_spatial_norm_gradient_passes_gradcheck() -> None:
    x = 20.0 * torch.randn(1, 2, 6, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(spatial_response_norm, (x.requires_grad_(),))
