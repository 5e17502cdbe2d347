"""AdamW's update of a list of tensors: the plain reference, and a fused version with one launch for the whole list.

This file has only the arithmetic. The optimizer and the engine decide which parameters decay, the learning rate, and
where states are kept.

Moments may be kept in bf16, which halves their memory. With rounding to nearest, an average that changes by less than
half a unit in its last place never moves (with beta2 = 0.999 most are like this). With stochastic rounding it moves by
the right amount on average (Gupta et al., 2015, arXiv:1502.02551). The random bits are a function of (seed, step,
tensor, element), so rounding is the same in a resumed run, and on any number of ranks with replicas or shards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatrain.kernels.support import KernelError, ceil_div, jit, launch, require, rounded, tl, triton_type

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
    """Update in place by one AdamW step (Loshchilov and Hutter, 2019, arXiv:1711.05101), in torch's operation order.

    With `m = exp_avg`, `v = exp_avg_sq`, `g` the gradient and `t = step` (1 for the first update):
    `p *= 1 - lr * weight_decay`, `m += (1 - beta1) (g - m)`, `v = beta2 v + (1 - beta2) g^2`,
    `p -= lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)`.

    The lists have the same length. `params` are fp32, `grads` any floating-point dtype, the moments fp32 or bf16
    (computed in fp32, rounded when stored). `found_inf` and `grad_scale` are fp32 scalars on the device, and reading
    them here waits for the device. There is no update if `found_inf` is not 0; gradients are divided by `grad_scale`.
    With a `stochastic_rounding_seed`, bf16 moments are rounded stochastically, otherwise to nearest. If `step` is a
    scalar on the device, the host does not know its value, so the seed must differ from step to step. `places` gives
    for each tensor the number that identifies it (default: its index in the list) and the index of its first element
    (default: 0). In fp32 the result equals that of torch.optim.AdamW, bit for bit.
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
        g, m, v = grad.to(p.dtype), exp_avg.to(p.dtype), exp_avg_sq.to(p.dtype)  # no copies if they are fp32
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
    """Return `places`, or the default: each tensor's index in the list, and 0 as the index of its first element."""
    return [(place, 0) for place in range(count)] if given is None else given


def _known(step: int | Tensor) -> int:
    """Return the step that enters the random bits: 0 if only the device knows it."""
    return step if isinstance(step, int) else 0


def stochastic_round(x: Tensor, random: Tensor) -> Tensor:
    """Round fp32 `x` to bf16, up or down to a neighbour, with probabilities that make the mean `x`.

    `random` has 16 uniform bits per element, in `x`'s shape. They are added to the low 16 bits, which bf16 lacks and
    which are then cut off. Inf and NaN are unchanged.
    """
    cut = ((x.view(torch.int32) + random.to(torch.int32)) & -0x10000).view(torch.float32)
    return cut.where(x.isfinite(), x).bfloat16()


def random_bits(count: int, seed: int, step: int, place: int, device: torch.device, first: int = 0) -> Tensor:
    """Return 32 random bits for each element `first..first+count-1` of the tensor `place`, int64 `[count]`.

    Two rounds of MurmurHash3's 32-bit finaliser (Appleby, 2011) over the element's index and a 64-bit key.
    """
    low, high = _key(seed, step, place)
    index = torch.arange(first, first + count, dtype=torch.int64, device=device)
    return _mixed(_mixed((index & 0xFFFFFFFF) ^ low) + high + (index >> 32) * _GOLDEN)


def _mixed(x: Tensor) -> Tensor:
    """Apply the finaliser to integers modulo 2^32 held in int64, where the low 32 bits of products are exact."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * _MIX1) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * _MIX2) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _key(seed: int, step: int, place: int) -> tuple[int, int]:
    """Hash the arguments to 64 bits, returned as low and high half: splitmix64's finaliser (Steele et al., 2014)."""
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
    """Compute `adamw_step_` with one launch per pair of gradient and moment dtypes, so usually one launch in all.

    A table on the device holds each tensor's address and first block; every program finds its tensor by bisection. A
    step therefore costs one small copy and one launch, whatever the number and sizes of the tensors, and nothing is
    flattened or kept between steps. It never waits for the device. If `found_inf` is not 0, moments and parameters are
    not read.

    Raises:
        KernelError: Triton cannot take the tensors, or parameters or moments are not contiguous.
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
    """Return fp32 `[3]` on the device: step size, bias correction of the second moment's root, gradients' factor.

    They are computed there because `step` and `grad_scale` may be known only to the device.
    """
    if isinstance(step, int):
        both = torch.tensor([lr / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step)], dtype=torch.float32)
        both = _moved(both, device)
    else:
        count = step.double()
        both = torch.stack([lr / (1 - betas[0] ** count), (1 - betas[1] ** count).sqrt()]).float()
    gain = torch.ones_like(both[:1]) if grad_scale is None else grad_scale.float().reciprocal().view(1)
    return torch.cat([both, gain])


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """Copy host values to the device without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


@jit
def _mixed_kernel(x: tl.tensor, MIX1: tl.constexpr, MIX2: tl.constexpr) -> tl.tensor:
    """Compute `_mixed` on uint32."""
    x = (x ^ (x >> 16)) * tl.full(x.shape, MIX1, tl.uint32)
    x = (x ^ (x >> 13)) * tl.full(x.shape, MIX2, tl.uint32)
    return x ^ (x >> 16)


@jit
def _stochastic_round_kernel(x: tl.tensor, random: tl.tensor) -> tl.tensor:
    """Compute `stochastic_round`, but return fp32 with the low bits cleared, which converts to bf16 exactly.

    NaN is left alone: a GPU's NaN has all bits set, so adding to it would overflow to -0.
    """
    bits = (x.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
    return tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)


@jit
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
    """Update the elements at the given addresses where `inside` is true, or all if it is None.

    `index` holds the elements' indices in the whole tensor.
    """
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


@jit
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
    """Update one block of one tensor.

    A row of `table` holds four pointers, the size, the first block, the two halves of the key, and the first element's
    index.
    """
    block = tl.program_id(0)
    tensor, end = 0, NUM_TENSORS
    for _ in tl.static_range(BISECTIONS):  # find the last tensor that begins at or before this block
        middle = (tensor + end) // 2
        begun = tl.load(table + middle * 9 + 5) <= block
        tensor, end = tl.where(begun, middle, tensor), tl.where(begun, end, middle)
    row = table + tensor * 9
    p = tl.load(row).to(tl.pointer_type(tl.float32))
    g = tl.load(row + 1).to(tl.pointer_type(GRAD))
    m = tl.load(row + 2).to(tl.pointer_type(MOMENT))
    v = tl.load(row + 3).to(tl.pointer_type(MOMENT))
    if ALIGNED:  # allows 16-byte loads and stores
        p, g, m, v = tl.multiple_of(p, 16), tl.multiple_of(g, 16), tl.multiple_of(m, 16), tl.multiple_of(v, 16)
    start = (block - tl.load(row + 5)) * BLOCK
    size = tl.load(row + 4)
    if HAS_FOUND_INF:
        size = tl.where(tl.load(found_inf) == 0, size, 0)  # size 0: nothing is inside
    low, high = tl.load(row + 6).to(tl.uint32), tl.load(row + 7).to(tl.uint32)
    step_size, correction, gain = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    index = start + tl.arange(0, BLOCK)
    number = tl.load(row + 8) + index
    if start + BLOCK <= size:
        _update(p + index, g + index, m + index, v + index, number, None, low, high, decay, one_minus_beta1, beta2,
                one_minus_beta2, eps, step_size, correction, gain, STOCHASTIC, MOMENT, MIX1, MIX2, GOLDEN)  # fmt: skip
    else:
        _update(p + index, g + index, m + index, v + index, number, index < size, low, high, decay, one_minus_beta1,
                beta2, one_minus_beta2, eps, step_size, correction, gain, STOCHASTIC, MOMENT, MIX1, MIX2,
                GOLDEN)  # fmt: skip
