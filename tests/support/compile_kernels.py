"""Compile every fused kernel for an H100 as its operation would launch it, down to machine code, without a GPU.

This is a separate program, run by test_compiles.py, because nothing can be compiled while the interpreter is on. It
takes a dtype and prints a line for each kernel and set of constants.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatrain.kernels import adamw_update as adamw
from megatrain.kernels import cross_entropy, gelu, layer_norm, norms, rms_norm, rope, swiglu, vocabulary_cross_entropy

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
COMPILED: set[str] = set()


def compile_only(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Compile a kernel in place of `support.launch`."""
    options = {"num_warps": constants.pop("num_warps")}
    signature = {}
    for name, value in zip(kernel.arg_names, args, strict=False):
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
        elif isinstance(value, int) and value == 1:
            constants[name] = 1  # as a launch does: 1 becomes a constant
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    signature.update(dict.fromkeys(constants, "constexpr"))
    what = f"{kernel.__module__}.{kernel.__name__} {signature} {constants}"
    if what not in COMPILED:
        COMPILED.add(what)
        program = triton.compile(ASTSource(kernel, signature, constexprs=constants), target=TARGET, options=options)
        assert len(program.asm["cubin"]) > 0
        print(what)


def forward_and_backward(function: Any, *inputs: Any) -> None:
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    torch.autograd.backward(outputs, [torch.zeros_like(y) for y in outputs])


def main(dtype: torch.dtype) -> None:
    for module in (adamw, cross_entropy, gelu, norms, rope, swiglu, vocabulary_cross_entropy):
        vars(module).update(launch=compile_only, require=lambda *_, **__: None)

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=dtype, requires_grad=True)

    x, weight = ones(3, 5, 100), ones(100)
    forward_and_backward(rms_norm.fused_rms_norm, x, weight, 1e-5)
    forward_and_backward(rms_norm.fused_add_rms_norm, x, x, weight, 1e-5)
    forward_and_backward(layer_norm.fused_layer_norm, x, weight, None, 1e-5)
    forward_and_backward(layer_norm.fused_add_layer_norm, x, x, weight, weight, 1e-5)
    cos, sin = rope.rope_angles(torch.arange(7), 16, 100.0)
    q = ones(2, 7, 4, 16).transpose(1, 2)
    forward_and_backward(rope.fused_rope_qk, q, q[:, :1], cos, sin)
    labels, some = torch.zeros(5, dtype=torch.int64), torch.ones(5)
    for width, weights in ((5000, some), (1, None)):
        forward_and_backward(swiglu.fused_swiglu, ones(5, width), ones(5, width))
        forward_and_backward(gelu.fused_gelu, ones(5, width))
        logits = ones(5, width).detach()
        cross_entropy.fused_cross_entropy_with_gradient_(logits, labels, weights)
        vocabulary_cross_entropy.fused_vocabulary_statistics(logits, labels, 3)
        vocabulary_cross_entropy.fused_vocabulary_gradient_(logits, labels, 3, some, weights)
    for moments, count, found_inf, seed in ((torch.float32, 1, None, None), (torch.bfloat16, 3, some[0], 1)):
        lists = [[torch.ones(5, dtype=d)] * count for d in (torch.float32, dtype, moments, moments)]
        adamw.fused_adamw_step_(*lists, 1, 1e-3, (0.9, 0.95), 1e-8, 0.1, found_inf, seed)


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
