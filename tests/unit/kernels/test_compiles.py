"""Every fused kernel compiles for a GPU: the interpreter runs Python, and takes much that Triton's compiler does
not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KERNELS = set(
    """
adamw_update._adamw_kernel cross_entropy._with_gradient_kernel gelu._gelu_kernel
layer_norm._backward layer_norm._forward rms_norm._backward rms_norm._forward
rope._rope_qk_kernel swiglu._backward swiglu._forward
vocabulary_cross_entropy._gradient_kernel vocabulary_cross_entropy._statistics_kernel
""".split()  # noqa: SIM905  a list of names reads best as one
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU all tests of this folder compile what they run")
def test_every_kernel_compiles_for_an_h100(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).parents[2] / "support" / "compile_kernels.py"), "bfloat16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = {line.split()[0].removeprefix("megatrain.kernels.") for line in done.stdout.splitlines()}
    assert compiled == KERNELS
