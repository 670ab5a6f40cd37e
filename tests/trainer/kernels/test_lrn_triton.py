"""The GPU's LRN kernels: run by Triton's interpreter on the CPU, against the oracle, and compiled for a GPU that is not
there. Without Triton both are skipped."""

import ast
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import oracle
from trainer.kernels import lrn
from trainer.kernels.native import Norm


@pytest.fixture
def kernels(monkeypatch):
    """The module as the interpreter sees it: it looks at the environment when a kernel is defined."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "trainer.kernels.lrn_triton", raising=False)
    yield importlib.import_module("trainer.kernels.lrn_triton")
    sys.modules.pop("trainer.kernels.lrn_triton", None)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("num_towers", [1, 2])
def test_the_kernels_agree_with_the_oracle(kernels, dtype, tolerance, relu, num_towers):
    generator = torch.Generator().manual_seed(0)
    x = (4.0 * torch.randn(3, 5, 7, 24, generator=generator)).to(dtype)  # two blocks and a remainder, in NHWC
    gradient = torch.randn(x.shape, generator=generator).to(dtype)
    constants = {"k": 1.5, "alpha": 0.1, "num_towers": num_towers}
    norm = Norm(1.5, 5, 0.1, 0.75, relu)
    rows, gradients = (t.view(-1, 24 // num_towers) for t in (x, gradient))
    assert kernels.can_normalise(rows, norm)
    found = kernels.lrn_forward(rows, norm), kernels.lrn_backward(rows, gradients, norm)
    given, incoming = (t.double().permute(0, 3, 1, 2).numpy() for t in (x, gradient))
    a = np.maximum(given, 0) if relu else given
    back = oracle.lrn_backward(a, incoming, **constants)
    expected = oracle.lrn(a, **constants), np.where(given > 0, back, 0) if relu else back
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        got = ours.view(x.shape).permute(0, 3, 1, 2).double().numpy()
        np.testing.assert_allclose(got, theirs, rtol=tolerance, atol=tolerance)


def test_other_windows_powers_and_dtypes_are_left_to_torch(kernels):
    rows, norm = torch.zeros(2, 8), Norm(2.0, 5, 1e-4, 0.75)
    assert not kernels.can_normalise(rows.double(), norm)
    assert not kernels.can_normalise(rows, norm._replace(n=3))
    assert not kernels.can_normalise(rows, norm._replace(beta=0.5))


def test_kernels_are_used_only_if_their_trial_agrees_with_torch(kernels, monkeypatch, capsys):
    assert lrn.load_triton.__wrapped__("cpu") is not None and capsys.readouterr().err == ""
    right = kernels.lrn_backward
    monkeypatch.setattr(kernels, "lrn_backward", lambda rows, gradient, norm: right(rows, gradient, norm) * 1.001)
    monkeypatch.setitem(sys.modules, "trainer.kernels.lrn_triton", kernels)
    monkeypatch.setattr("trainer.kernels.lrn_triton", kernels, raising=False)
    assert lrn.load_triton.__wrapped__("cpu") is None
    assert "Triton cannot be used for LRN" in capsys.readouterr().err


def test_kernels_are_annotated_with_nothing_that_tritons_compiler_refuses():
    source = Path(lrn.__file__).with_name("lrn_triton.py").read_text(encoding="utf-8")
    kernels = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and [ast.unparse(one) for one in node.decorator_list] == ["triton.jit"]
    ]
    said = {ast.unparse(arg.annotation) for kernel in kernels for arg in kernel.args.args if arg.annotation}
    assert len(kernels) == 4 and said == {"tl.tensor", "tl.constexpr"}  # a name of any other module is an error there


@pytest.mark.parametrize("dtype", ["*fp32", "*bf16", "*fp16"])
@pytest.mark.parametrize("size", ["i32", "i64"])
def test_the_kernels_compile_for_an_h100_where_there_is_none(monkeypatch, dtype, size):
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delitem(sys.modules, "trainer.kernels.lrn_triton", raising=False)
    kernels = importlib.import_module("trainer.kernels.lrn_triton")
    constants = {"maps": 48, "relu": True, "block": 1024}
    kinds = {"x": dtype, "gradient": dtype, "out": dtype, "size": size} | dict.fromkeys(constants, "constexpr")
    for kernel in (kernels._forward, kernels._backward):
        signature = {name: kinds.get(name, "fp32") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert "sm_90" in compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_on_a_gpu_the_kernels_are_taken_and_give_what_the_cpu_gives(dtype, tolerance):
    assert lrn.load_triton() is not None
    generator = torch.Generator().manual_seed(0)
    found = {}
    for device in ("cpu", "cuda"):
        generator.manual_seed(0)
        x = (20.0 * torch.randn(4, 96, 27, 27, generator=generator)).to(device, dtype)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        out = lrn.local_response_norm(x, num_towers=2, relu=True)
        out.backward(torch.randn(x.shape, generator=generator).to(device, dtype))
        found[device] = out.detach().float().cpu(), x.grad.float().cpu()
    for ours, theirs in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
