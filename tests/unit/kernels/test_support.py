"""What the fused kernels share, and what becomes of them without Triton."""

import subprocess
import sys

import pytest
import torch
from support.fused_checks import DEVICE

from megatrain.kernels import MAX_ROW, support
from megatrain.kernels.support import (
    KernelError,
    as_rows,
    ceil_div,
    jit,
    launch,
    next_power_of_2,
    num_warps,
    rounded,
    tl,
    unsupported,
)


@jit
def _round_kernel(x: tl.tensor, y: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    index = tl.arange(0, BLOCK)
    tl.store(y + index, rounded(tl.load(x + index, mask=index < count), y.dtype.element_ty), mask=index < count)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_to_nearest_even_as_torchs(dtype):
    """Ties, carries into the exponent, subnormals, overflow, and what is not finite."""
    bits = torch.arange(-(2**31), 2**31 - 1, 2**31 // 1000 + 1, dtype=torch.int64).int()
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3FFF8000, 0x3F7F8000, 0x7F7FFFFF], dtype=torch.int32)
    odd = torch.tensor([0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32)
    x = torch.cat([bits, ties, ties - 1, ties + 1, odd]).view(torch.float32)
    x = x[~(x.abs() <= 1e-37) | (x == 0)]  # subnormal numbers of bf16 are flushed on some devices
    assert x.isnan().sum() > 4
    y = torch.empty_like(x, dtype=dtype, device=DEVICE)
    launch(_round_kernel, (1,), x.to(DEVICE), y, len(x), BLOCK=next_power_of_2(len(x)))
    assert torch.equal(y.cpu().nan_to_num(nan=1.5), x.to(dtype).nan_to_num(nan=1.5))
    assert torch.equal(y.cpu().isnan(), x.isnan())


def test_unsupported_says_why():
    x = torch.ones(2, 3, device=DEVICE)
    assert unsupported(x, None, x.bfloat16(), row=3) is None
    assert "float8" in str(unsupported(x.to(torch.float8_e5m2)))
    assert "meta" in str(unsupported(torch.empty(1, device="meta")))
    assert "meta" in str(unsupported(x, torch.empty(1, device="meta")))
    assert str(MAX_ROW + 1) in str(unsupported(x, row=MAX_ROW + 1))
    assert "0" in str(unsupported(x, row=0))


def test_without_the_interpreter_a_cpu_is_unsupported(monkeypatch):
    monkeypatch.setattr(support, "INTERPRETED", False)
    assert "TRITON_INTERPRET" in str(unsupported(torch.ones(1)))


@pytest.mark.parametrize(("capability", "says"), [((7, 5), "an old card is too old"), ((8, 0), None)])
def test_an_old_device_is_unsupported(capability, says, monkeypatch):
    class Fake(torch.Tensor):
        device = torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old card")
    why = unsupported(torch.ones(1).as_subclass(Fake))
    assert why is None if says is None else says in str(why)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from megatrain.kernels import adamw_update as adamw, cross_entropy, gelu, layer_norm, rms_norm, rope, swiglu, support
x = torch.ones(2, 3)
assert gelu.gelu(x).shape == (2, 3)
assert "not installed" in support.unsupported(x)
ones = torch.ones(3)
calls = [
    lambda: gelu.fused_gelu(x), lambda: swiglu.fused_swiglu(x, x), lambda: rms_norm.fused_rms_norm(x, ones, 1e-5),
    lambda: layer_norm.fused_layer_norm(x, ones, None, 1e-5),
    lambda: cross_entropy.fused_cross_entropy_with_gradient_(x, torch.zeros(2, dtype=torch.int64)),
    lambda: rope.fused_rope_qk(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.ones(2, 1), torch.ones(2, 1)),
    lambda: adamw.fused_adamw_step_([x], [x], [x], [x], 1, 0.1, (0.9, 0.9), 1e-8, 0.1),
]
for call in calls:
    try:
        call()
    except support.KernelError as e:
        assert "not installed" in str(e)
    else:
        raise SystemExit("no error")
"""


def test_without_triton_the_references_work_and_the_fused_say_what_is_missing():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sizes():
    assert [next_power_of_2(n) for n in (0, 1, 2, 3, 1024, 1025)] == [1, 1, 2, 4, 1024, 2048]
    assert [ceil_div(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [num_warps(n) for n in (1, 2048, 4096, 32768)] == [4, 4, 8, 16]


def test_rows_are_views_where_they_can_be():
    whole = torch.arange(24.0).view(2, 3, 4)
    assert as_rows(whole).data_ptr() == whole.data_ptr()
    part = as_rows(whole.view(6, 4)[:, 1:])
    assert part.data_ptr() == whole.data_ptr() + 4 and part.stride() == (4, 1)
    assert as_rows(whole.transpose(1, 2)).tolist() == whole.transpose(1, 2).reshape(8, 3).tolist()
    assert as_rows(torch.empty(2, 3, 0)).shape == (6, 0)


def test_an_error_in_a_kernel_call_is_a_kernel_error():
    with pytest.raises(KernelError, match="meta"):
        support.require(torch.empty(1, device="meta"))
