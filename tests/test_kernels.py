"""Kernels: references against their definitions, Triton under its interpreter and on a GPU, and compilation for GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adapt_convert.kernels.dispatch import MAX_RANK
from adapt_convert.kernels.expanded_norm import NormShape, expanded_norm
from adapt_convert.kernels.grouped import grouped_lora_add
from adapt_convert.kernels.lorta import lorta_add

HERE = Path(__file__).parent
BLOCKS = {"BLOCK": 1024, "BLOCK_R": MAX_RANK, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}
COMPILED = [
    ("expanded_norm_triton", "expanded_norm_kernel", {"TASKS": 1, "KIND": 0, "HAS_BIAS": False, "MASKED": False}),
    ("expanded_norm_triton", "expanded_norm_kernel", {"TASKS": 8, "KIND": 0, "HAS_BIAS": False, "MASKED": True}),
    ("expanded_norm_triton", "expanded_norm_kernel", {"TASKS": 2, "KIND": 1, "HAS_BIAS": False, "MASKED": True}),
    ("expanded_norm_triton", "expanded_norm_kernel", {"TASKS": 1, "KIND": 2, "HAS_BIAS": True, "MASKED": False}),
    ("lorta_triton", "heads_expand_kernel", {}),
    ("lorta_triton", "heads_shrink_kernel", {}),
    ("grouped_triton", "grouped_shrink_kernel", {}),
    ("grouped_triton", "grouped_expand_kernel", {}),
]
_TYPES = {"mask": "*fp32", "ids": "*i64", "eps": "fp32"}
_POINTERS = ("x", "y", "gain", "bias", "out", "inner", "A", "B", "heads")


@pytest.mark.parametrize("interpreted", ["1", "0"])
def test_triton_kernels_equal_their_references(interpreted: str) -> None:
    pytest.importorskip("triton")
    if interpreted == "0" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_kernels.py")],
        env=os.environ | {"TRITON_INTERPRET": interpreted},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 50  # type: ignore[index]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("module", "kernel", "constants"), COMPILED)
def test_kernels_compile_ahead_of_time(module: str, kernel: str, constants: dict[str, Any], dtype: str, capability: int) -> None:
    """No GPU is needed for that; a kernel that uses what the hardware lacks, or too much of it, fails here."""
    triton = pytest.importorskip("triton")
    from importlib import import_module

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(import_module(f"adapt_convert.kernels.{module}"), kernel)
    constants = constants | {name: BLOCKS[name] for name in function.arg_names if name in BLOCKS}
    if "PRECISION" in function.arg_names:
        constants["PRECISION"] = {"fp32": "ieee", "bf16": "tf32"}[dtype]

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name == "inner" and module == "grouped_triton":
            return "*fp32"
        return _TYPES.get(name) or (f"*{dtype}" if name in _POINTERS else "i32")

    source = ASTSource(function, {name: type_of(name) for name in function.arg_names}, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 99 * 1024  # what every GPU of these generations grants a block
    if dtype == "bf16" and "PRECISION" in function.arg_names:
        assert "mma" in compiled.asm["ptx"]  # half precision runs on tensor cores


def test_the_expanded_norm_is_the_norm_of_the_true_residual() -> None:
    """By definition, in float64: carry [h; w; t], norm h + Q t."""
    torch.manual_seed(0)
    d, rank = 24, 5
    Q = torch.linalg.qr(torch.randn(d, rank)).Q
    h, t, gain = torch.randn(3, 2, d), torch.randn(3, 2, rank), torch.randn(d)
    true = (h + t @ Q.T).double()
    rms = (true.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    x = torch.cat([h, h @ Q, t], -1)
    out = expanded_norm(x, torch.cat([gain, torch.ones(2 * rank)]), None, None, NormShape(d, rank, 1, "rms", 1e-6)).double()
    torch.testing.assert_close(out[..., :d], gain * h / rms, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[..., :d] + gain * (out[..., d + rank :] @ Q.double().T), gain * true / rms, atol=1e-5, rtol=1e-5)


def test_a_residual_that_cancels_to_nothing_has_a_finite_norm() -> None:
    """h = -Q t exactly: rounding may make the carried square norm negative, the true one is zero."""
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(64, 8)).Q
    t = 100 * torch.randn(1000, 8)
    h = -(t @ Q.T)
    out = expanded_norm(torch.cat([h, h @ Q, t], -1), torch.ones(80), None, None, NormShape(64, 8, 1, "rms", 1e-6))
    assert torch.isfinite(out).all()
    square = h.square().sum(-1) + (t * (2 * (h @ Q) + t)).sum(-1)
    assert (square < 0).any()  # else this test would show nothing


def test_lorta_add_equals_the_dense_product() -> None:
    torch.manual_seed(0)
    d, heads, size, rank = 12, 3, 4, 5
    A, B, C = torch.randn(d, rank), torch.randn(size, rank), torch.randn(heads, rank)
    delta = torch.cat([A @ torch.diag(c) @ B.T for c in C], dim=1)  # (d, heads * size), a head at a time
    x, z = torch.randn(2, 3, d), torch.randn(2, 3, heads * size)
    torch.testing.assert_close(lorta_add(z, x, A, B, C, reads=True), z + x @ delta)
    torch.testing.assert_close(lorta_add(x, z, A, B, C, reads=False), x + z @ delta.T)


def test_grouped_lora_add_equals_one_row_at_a_time() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(3, 4, 10), torch.randn(3, 7, 4)
    x, y, ids = torch.randn(5, 2, 10), torch.randn(5, 2, 7), torch.tensor([2, 0, 1, 3, 2])
    out = grouped_lora_add(y.clone(), x, A, B, ids)
    for row, task in enumerate(ids.tolist()):
        expected = y[row] + (x[row] @ A[task - 1].T @ B[task - 1].T if task else 0)
        torch.testing.assert_close(out[row], expected)


def test_importing_the_kernels_does_not_import_triton() -> None:
    code = (
        "import sys, adapt_convert.kernels.latte, adapt_convert.kernels.grouped, adapt_convert.kernels.attach;"
        "sys.exit(int('adapt_convert.kernels.expanded_norm_triton' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, timeout=120).returncode == 0
