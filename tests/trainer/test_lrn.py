"""Local response normalisation, across maps and (net 145) across space: against the float64 oracle and torch's own."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests import oracle
from trainer import model as model_module
from trainer.model import local_response_norm, spatial_response_norm

STRONG = {"alpha": 0.1, "k": 1.5}  # so that the sums count for something beside k


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of a few rows, so that small maps take several and the last is a remainder."""
    monkeypatch.setattr(model_module, "_BLOCK_ELEMENTS", 60)
    yield


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
        {"n": 9, "beta": 0.6, "num_towers": 2},
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_lrn_forward_and_backward_agree_with_the_oracle(dtype: torch.dtype, tolerance: float, constants: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 4.0 * torch.randn(3, 12, 5, 4, generator=generator, dtype=torch.float64)
    gradient = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    x, gradient = x.to(dtype).requires_grad_(), gradient.to(dtype)
    result = local_response_norm(x, **STRONG, **constants)
    result.backward(gradient)
    as_numpy = [t.detach().double().numpy() for t in (x, gradient)]
    expected = oracle.lrn(as_numpy[0], **STRONG, **constants)
    expected_gradient = oracle.lrn_backward(*as_numpy, **STRONG, **constants)
    assert result.dtype == x.grad.dtype == dtype
    np.testing.assert_allclose(result.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(x.grad.double().numpy(), expected_gradient, rtol=tolerance, atol=tolerance)


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
