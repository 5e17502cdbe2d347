"""AdamW's update of a list of tensors: the plain reference, and one launch for the whole list.

Only the arithmetic: which parameters decay, the schedule, and where states live are the optimizer's and the engine's.

Moments may be kept in bf16, which halves their memory. Rounded to nearest, an average that changes by less than half a
unit in its last place stays where it is (with beta2 = 0.999 most do); with stochastic rounding it moves by the right
amount on average (Gupta et al., 2015, arXiv:1502.02551). The random bits are a function of (seed, step, tensor,
element), so a run that resumes rounds as one that was never stopped, and ranks that hold copies or pieces round as one
would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatrain.kernels.support import KernelError, ceil_div, launch, require, rounded, tl, triton, triton_type

_BLOCK = 1024
_MIX1, _MIX2, _GOLDEN = 0x85EBCA6B, 0xC2B2AE35, 0x9E3779B9


@torch.no_grad()
def adamw_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int | Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    found_inf: Tensor | None = None,
    stochastic_rounding_seed: int | None = None,
    grad_scale: Tensor | None = None,
    places: Sequence[tuple[int, int]] | None = None,
) -> None:
    """One AdamW update in place (Loshchilov and Hutter, 2019, arXiv:1711.05101), with torch's order of operations.

    With `m = exp_avg`, `v = exp_avg_sq`, `g` the gradient and `t = step` (1 for the first update):
    `p *= 1 - lr * weight_decay`, `m += (1 - beta1) (g - m)`, `v = beta2 v + (1 - beta2) g^2`,
    `p -= lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)`.

    The lists are equally long; `params` are fp32, `grads` of any floating dtype, the moments fp32, or bf16 (computed in
    fp32, rounded when stored). `found_inf`, an fp32 scalar on the device, stops the update unless it is 0, and
    gradients are divided by `grad_scale`, another one (reading them here waits for the device).
    `stochastic_rounding_seed` rounds bf16 moments stochastically, else to nearest; where `step` is a scalar on the
    device, which the host does not know, that seed must be another one for each step. `places` are, for each tensor, a
    number that stands for it (its place in the list unless given) and that of its first element (0). In fp32 the result
    is torch.optim.AdamW's, bit for bit.
    """
    if found_inf is not None and found_inf.item() != 0:
        return
    beta1, beta2 = betas
    rounding_step, step = _known(step), int(step)
    step_size, correction = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    if grad_scale is not None:
        grads = [grad.to(p.dtype) / grad_scale for grad, p in zip(grads, params, strict=True)]
    lists = zip(params, grads, exp_avgs, exp_avg_sqs, _places(places, len(params)), strict=True)
    for p, grad, exp_avg, exp_avg_sq, (place, first) in lists:
        g, m, v = grad.to(p.dtype), exp_avg.to(p.dtype), exp_avg_sq.to(p.dtype)  # themselves where they are fp32
        p.mul_(1 - lr * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(m, (v.sqrt() / correction).add_(eps), value=-step_size)
        if exp_avg.dtype == torch.bfloat16:
            if stochastic_rounding_seed is not None:
                bits = random_bits(p.numel(), stochastic_rounding_seed, rounding_step, place, p.device, first)
                bits = bits.view(p.shape)
                m, v = stochastic_round(m, bits & 0xFFFF), stochastic_round(v, bits >> 16)
            exp_avg.copy_(m)
            exp_avg_sq.copy_(v)


def _places(given: Sequence[tuple[int, int]] | None, count: int) -> Sequence[tuple[int, int]]:
    """What random bits know a list's tensors by."""
    return [(place, 0) for place in range(count)] if given is None else given


def _known(step: int | Tensor) -> int:
    """The step as far as the host knows it: what random bits depend on."""
    return step if isinstance(step, int) else 0


def stochastic_round(x: Tensor, random: Tensor) -> Tensor:
    """fp32 `x` as bf16: up or down to a neighbour, each with the probability that makes the mean `x`.

    `random` are integers of 16 uniform bits, in `x`'s shape. They are added to the 16 bits that bf16 lacks, and those
    are cut off; inf and NaN stay what they are.
    """
    cut = ((x.view(torch.int32) + random.to(torch.int32)) & -0x10000).view(torch.float32)
    return cut.where(x.isfinite(), x).bfloat16()


def random_bits(count: int, seed: int, step: int, place: int, device: torch.device, first: int = 0) -> Tensor:
    """32 random bits for each element `first..first+count-1` of the tensor `place`, int64 `[count]`.

    Two rounds of MurmurHash3's 32-bit finaliser (Appleby, 2011) over the element's index and a 64-bit key.
    """
    low, high = _key(seed, step, place)
    index = torch.arange(first, first + count, dtype=torch.int64, device=device)
    return _mixed(_mixed((index & 0xFFFFFFFF) ^ low) + high + (index >> 32) * _GOLDEN)


def _mixed(x: Tensor) -> Tensor:
    """The finaliser, on integers modulo 2^32 in int64: products stay exact in their low 32 bits."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * _MIX1) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * _MIX2) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _key(seed: int, step: int, place: int) -> tuple[int, int]:
    """Low and high half of 64 bits from the three, well spread: splitmix64's finaliser (Steele et al., 2014)."""
    state = 0
    for part in (seed, step, place):
        state = (state + part + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state & 0xFFFFFFFF, state >> 32


@torch.no_grad()
def fused_adamw_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int | Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    found_inf: Tensor | None = None,
    stochastic_rounding_seed: int | None = None,
    grad_scale: Tensor | None = None,
    places: Sequence[tuple[int, int]] | None = None,
) -> None:
    """`adamw_step_` in one launch for all tensors that share the dtypes of gradient and moments: usually one in all.

    A table on the device says where each tensor lies and which blocks are its own; every program looks its tensor up by
    bisection. So a step costs one small copy and one launch, however many tensors there are and whatever their sizes,
    and nothing is flattened or kept between steps. Never waits for the device; with `found_inf` the moments and
    parameters are not even read.

    Parameters and moments must be contiguous. Raises `KernelError` where Triton cannot take the tensors.
    """
    groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    grads = [g.contiguous() for g in grads]
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        if p.dtype != torch.float32 or m.dtype not in (torch.float32, torch.bfloat16) or v.dtype != m.dtype:
            raise KernelError(
                f"fused AdamW takes fp32 parameters, moments fp32 or bf16: {p.dtype}, {m.dtype}, {v.dtype}"
            )
        if not (p.is_contiguous() and m.is_contiguous() and v.is_contiguous()):
            raise KernelError("fused AdamW takes contiguous parameters and moments")
        assert p.shape == g.shape == m.shape == v.shape, (p.shape, g.shape, m.shape, v.shape)
        groups.setdefault((g.dtype, m.dtype), []).append(i)
    require(*params, *grads, *exp_avgs, *exp_avg_sqs, found_inf, grad_scale)
    if not groups:
        return
    scalars = _scalars(step, lr, betas, grad_scale, params[0].device)
    places = _places(places, len(params))
    for (grad_dtype, moment_dtype), members in groups.items():
        stochastic = stochastic_rounding_seed is not None and moment_dtype == torch.bfloat16
        rows, num_blocks, aligned = [], 0, True
        for i in members:
            pointers = [t[i].data_ptr() for t in (params, grads, exp_avgs, exp_avg_sqs)]
            aligned = aligned and all(pointer % 16 == 0 for pointer in pointers)
            numel, (place, first), key = params[i].numel(), places[i], (0, 0)
            if stochastic:
                key = _key(stochastic_rounding_seed or 0, _known(step), place)
            rows.append((*pointers, numel, num_blocks, *key, first))
            num_blocks += ceil_div(numel, _BLOCK)
        table = _moved(torch.tensor(rows, dtype=torch.int64), params[0].device)
        launch(
            _adamw_kernel,
            (num_blocks,),
            *(table, scalars, table if found_inf is None else found_inf),
            *(1 - lr * weight_decay, 1 - betas[0], betas[1], 1 - betas[1], eps),
            NUM_TENSORS=len(members),
            BISECTIONS=(len(members) - 1).bit_length(),
            HAS_FOUND_INF=found_inf is not None,
            STOCHASTIC=stochastic,
            ALIGNED=aligned,
            GRAD=triton_type(grad_dtype),
            MOMENT=triton_type(moment_dtype),
            MIX1=_MIX1,
            MIX2=_MIX2,
            GOLDEN=_GOLDEN,
            BLOCK=_BLOCK,
            num_warps=4,
        )


def _scalars(
    step: int | Tensor, lr: float, betas: tuple[float, float], grad_scale: Tensor | None, device: torch.device
) -> Tensor:
    """fp32 `[3]` on the device, which alone may know what they depend on: the step size, the correction of the root of
    the second moment, and what gradients are multiplied by."""
    if isinstance(step, int):
        both = torch.tensor([lr / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step)], dtype=torch.float32)
        both = _moved(both, device)
    else:
        count = step.double()
        both = torch.stack([lr / (1 - betas[0] ** count), (1 - betas[1] ** count).sqrt()]).float()
    gain = torch.ones_like(both[:1]) if grad_scale is None else grad_scale.float().reciprocal().view(1)
    return torch.cat([both, gain])


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """Host values on the device, without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


@triton.jit
def _mixed_kernel(x: tl.tensor, MIX1: tl.constexpr, MIX2: tl.constexpr) -> tl.tensor:
    """`_mixed` on uint32."""
    x = (x ^ (x >> 16)) * tl.full(x.shape, MIX1, tl.uint32)
    x = (x ^ (x >> 13)) * tl.full(x.shape, MIX2, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _stochastic_round_kernel(x: tl.tensor, random: tl.tensor) -> tl.tensor:
    """`stochastic_round`; the bits cut off, so that the conversion to bf16 that follows is exact.

    A GPU's own NaN has all its bits set: with anything added it would come out as -0.
    """
    bits = (x.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
    return tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)


@triton.jit
def _update(
    p_at: tl.tensor,
    g_at: tl.tensor,
    m_at: tl.tensor,
    v_at: tl.tensor,
    index: tl.tensor,
    inside: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    decay: tl.tensor,
    one_minus_beta1: tl.tensor,
    beta2: tl.tensor,
    one_minus_beta2: tl.tensor,
    eps: tl.tensor,
    step_size: tl.tensor,
    correction: tl.tensor,
    gain: tl.tensor,
    STOCHASTIC: tl.constexpr,
    MOMENT: tl.constexpr,
    MIX1: tl.constexpr,
    MIX2: tl.constexpr,
    GOLDEN: tl.constexpr,
) -> None:
    """The elements at the addresses where `inside`, or without it all of them; `index` are their numbers in the whole
    tensor."""
    p = tl.load(p_at, mask=inside)
    g = tl.load(g_at, mask=inside).to(tl.float32) * gain
    m = tl.load(m_at, mask=inside).to(tl.float32)
    v = tl.load(v_at, mask=inside).to(tl.float32)
    m += one_minus_beta1 * (g - m)
    v = v * beta2 + one_minus_beta2 * g * g
    p = p * decay - step_size * (m / (tl.sqrt(v) / correction + eps))
    tl.store(p_at, p, mask=inside)
    if STOCHASTIC:
        above = (index >> 32).to(tl.uint32) * tl.full(index.shape, GOLDEN, tl.uint32)
        random = _mixed_kernel(_mixed_kernel(index.to(tl.uint32) ^ low, MIX1, MIX2) + high + above, MIX1, MIX2)
        m = _stochastic_round_kernel(m, random & 0xFFFF)
        v = _stochastic_round_kernel(v, random >> 16)
    tl.store(m_at, rounded(m, MOMENT), mask=inside)
    tl.store(v_at, rounded(v, MOMENT), mask=inside)


@triton.jit
def _adamw_kernel(
    table: tl.tensor,
    scalars: tl.tensor,
    found_inf: tl.tensor,
    decay: tl.tensor,
    one_minus_beta1: tl.tensor,
    beta2: tl.tensor,
    one_minus_beta2: tl.tensor,
    eps: tl.tensor,
    NUM_TENSORS: tl.constexpr,
    BISECTIONS: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    MIX1: tl.constexpr,
    MIX2: tl.constexpr,
    GOLDEN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of one tensor. A row of `table`: four pointers, the size, the first block, the key's halves, the first
    element's number."""
    block = tl.program_id(0)
    tensor, end = 0, NUM_TENSORS
    for _ in tl.static_range(BISECTIONS):  # the last tensor that does not begin after this block
        middle = (tensor + end) // 2
        begun = tl.load(table + middle * 9 + 5) <= block
        tensor, end = tl.where(begun, middle, tensor), tl.where(begun, end, middle)
    row = table + tensor * 9
    p = tl.load(row).to(tl.pointer_type(tl.float32))
    g = tl.load(row + 1).to(tl.pointer_type(GRAD))
    m = tl.load(row + 2).to(tl.pointer_type(MOMENT))
    v = tl.load(row + 3).to(tl.pointer_type(MOMENT))
    if ALIGNED:  # lets whole blocks move in 16-byte pieces
        p, g, m, v = tl.multiple_of(p, 16), tl.multiple_of(g, 16), tl.multiple_of(m, 16), tl.multiple_of(v, 16)
    start = (block - tl.load(row + 5)) * BLOCK
    size = tl.load(row + 4)
    if HAS_FOUND_INF:
        size = tl.where(tl.load(found_inf) == 0, size, 0)  # otherwise nothing is inside
    low, high = tl.load(row + 6).to(tl.uint32), tl.load(row + 7).to(tl.uint32)
    step_size, correction, gain = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    index = start + tl.arange(0, BLOCK)
    number = tl.load(row + 8) + index
    if start + BLOCK <= size:
        _update(p + index, g + index, m + index, v + index, number, None, low, high, decay, one_minus_beta1, beta2,
                one_minus_beta2, eps, step_size, correction, gain, STOCHASTIC, MOMENT, MIX1, MIX2, GOLDEN)  # fmt: skip
    else:
        _update(p + index, g + index, m + index, v + index, number, index < size, low, high, decay, one_minus_beta1, beta2,
                one_minus_beta2, eps, step_size, correction, gain, STOCHASTIC, MOMENT, MIX1, MIX2, GOLDEN)  # fmt: skip
