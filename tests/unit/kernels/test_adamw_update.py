"""AdamW over a list of tensors: the reference against torch's, the fused one against both and float64."""

from itertools import chain

import pytest
import torch
from support.fused_checks import DEVICE, error, randn

from megatrain.kernels.adamw_update import adamw_step_, fused_adamw_step_, random_bits, stochastic_round
from megatrain.kernels.support import KernelError

SHAPES = [(5,), (0,), (33, 100), (1025,), (1, 1), (3, 7, 11), (0, 4)]
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
BOTH = [adamw_step_, fused_adamw_step_]


def lists(moment_dtype=torch.float32, grad_dtype=torch.float32, shapes=SHAPES):
    """Parameters, gradients and moments in the middle of a run."""
    dtypes = (torch.float32, grad_dtype, moment_dtype, moment_dtype)
    made = [[randn(*s, seed=10 * i + j) for j, s in enumerate(shapes)] for i in range(4)]
    made[3] = [v.square() * 0.1 for v in made[3]]
    return tuple([t.to(d).to(DEVICE) for t in ts] for ts, d in zip(made, dtypes, strict=True))


def copied(all_lists):
    return tuple([t.clone() for t in ts] for ts in all_lists)


def float64_step(p, g, m, v, step, lr, betas, eps, weight_decay):
    p, g, m, v = (t.cpu().double() for t in (p, g, m, v))
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return p - lr * weight_decay * p - lr * m_hat / (v_hat.sqrt() + eps), m, v


def test_the_reference_is_torchs_bit_for_bit():
    params, *_ = lists()
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.AdamW(theirs, **SETTINGS, foreach=False, fused=False)
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    for step in range(1, 6):
        grads = [randn(*s, seed=100 * step + i).float().to(DEVICE) for i, s in enumerate(SHAPES)]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        adamw_step_(params, grads, *moments, step, **SETTINGS)
        assert all(torch.equal(a, b) for a, b in zip(params, theirs, strict=True)), step


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [1, 1000])
def test_one_step_against_float64(function, step, moment_dtype, grad_dtype):
    """Lists of many sizes, empty ones among them, so that every program must find its own tensor."""
    params, grads, exp_avgs, exp_avg_sqs = lists(moment_dtype, grad_dtype)
    expected = [float64_step(*ts, step, **SETTINGS) for ts in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)]
    function(params, grads, exp_avgs, exp_avg_sqs, step, **SETTINGS)
    for p, m, v, (exact_p, exact_m, exact_v) in zip(params, exp_avgs, exp_avg_sqs, expected, strict=True):
        assert error(p, exact_p) < 1e-6
        limit = 1e-6 if moment_dtype == torch.float32 else torch.finfo(torch.bfloat16).eps / 2 + 1e-6
        assert error(m, exact_m) < limit and error(v, exact_v) < limit


def test_the_fused_step_stays_with_torchs_for_many_steps():
    params, *_ = lists()
    ours, moments = [p.clone() for p in params], [[torch.zeros_like(p) for p in params] for _ in range(2)]
    theirs, their_moments = [p.clone() for p in params], [[torch.zeros_like(p) for p in params] for _ in range(2)]
    for step in range(1, 11):
        grads = [randn(*s, seed=100 * step + i).float().to(DEVICE) for i, s in enumerate(SHAPES)]
        fused_adamw_step_(ours, grads, *moments, step, **SETTINGS)
        adamw_step_(theirs, grads, *their_moments, step, **SETTINGS)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_lists_of_several_dtypes_and_gradients_that_are_views():
    fp32, bf16 = lists(), lists(torch.bfloat16, torch.bfloat16)
    mixed = tuple([x for pair in zip(a, b, strict=True) for x in pair] for a, b in zip(fp32, bf16, strict=True))
    mixed[1][4] = mixed[1][4].t().contiguous().t()
    mixed[0][6] = torch.cat([mixed[0][6][:1], mixed[0][6]])[1:]  # no multiple of 16 bytes from the start of its memory
    expected = copied(mixed)
    fused_adamw_step_(*mixed, 3, **SETTINGS, stochastic_rounding_seed=5)
    adamw_step_(*expected, 3, **SETTINGS, stochastic_rounding_seed=5)
    torch.testing.assert_close(mixed, expected, rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(mixed[0], expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16])
def test_found_inf_stops_the_update_and_zero_does_not(function, moment_dtype):
    before = lists(moment_dtype)
    before[1][0][2] = torch.inf
    for flag in (1.0, torch.nan):
        after = copied(before)
        found_inf = torch.full((), flag, device=DEVICE)
        function(*after, 7, **SETTINGS, found_inf=found_inf, stochastic_rounding_seed=1)
        assert all(torch.equal(a, b) for a, b in zip(chain(*before), chain(*after), strict=True))
    free, plain = copied(before), copied(before)
    function(*free, 7, **SETTINGS, found_inf=torch.zeros((), device=DEVICE))
    function(*plain, 7, **SETTINGS)
    assert torch.equal(free[0][2], plain[0][2]) and not torch.equal(free[0][2], before[0][2])
    assert not free[0][0][2].isfinite(), "a gradient nobody vetoed is not hidden"


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16])
def test_a_step_and_a_scale_that_only_the_device_knows(function, moment_dtype):
    """A power of two: scaling and its undoing lose nothing."""
    plain = lists(moment_dtype)
    scaled = copied(plain)
    scaled[1][:] = [g * 512 for g in scaled[1]]
    function(*plain, 9, **SETTINGS)
    step, scale = (torch.full((), number, device=DEVICE) for number in (9.0, 512.0))
    function(*scaled, step, **SETTINGS, grad_scale=scale)
    for i in (0, 2, 3):
        torch.testing.assert_close(scaled[i], plain[i], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("function", BOTH)
def test_bf16_moments_keep_bad_numbers(function):
    grads = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], device=DEVICE)
    grads.view(torch.int32)[0] = 0x7FFFFFFF  # the NaN that a GPU makes; a few more and it is -0
    params, moments = torch.ones(4, device=DEVICE), [torch.zeros(4, device=DEVICE).bfloat16() for _ in range(2)]
    for seed in range(5):
        function([params], [grads], [moments[0]], [moments[1]], 1, **SETTINGS, stochastic_rounding_seed=seed)
        assert moments[0].isnan()[0] and moments[0].isfinite().tolist() == [False, False, False, True]
        assert not moments[1][:3].isfinite().any() and moments[1][3].isfinite()
        assert params.isfinite().tolist() == [False, False, False, True]


def test_fused_stochastic_rounding_is_the_references():
    """The same random bits: the averages are equal except where their last fp32 bit decides."""
    ours, theirs = lists(torch.bfloat16), lists(torch.bfloat16)
    fused_adamw_step_(*ours, 3, **SETTINGS, stochastic_rounding_seed=11)
    adamw_step_(*theirs, 3, **SETTINGS, stochastic_rounding_seed=11)
    for i in (2, 3):
        a, b = (torch.cat([t.flatten() for t in ts[i]]) for ts in (ours, theirs))
        assert (a != b).float().mean() < 1e-3
    nearest = lists(torch.bfloat16)
    fused_adamw_step_(*nearest, 3, **SETTINGS)
    assert (
        torch.cat([t.flatten() for t in nearest[2]]) != torch.cat([t.flatten() for t in ours[2]])
    ).float().mean() > 0.2


@pytest.mark.parametrize("function", BOTH)
def test_stochastic_rounding_is_a_function_of_seed_step_and_element(function):
    def moments(step, seed):
        made = lists(torch.bfloat16)
        function(*made, step, **SETTINGS, stochastic_rounding_seed=seed)
        return torch.cat([t.flatten() for t in made[2]])

    first = moments(4, 2)
    assert torch.equal(first, moments(4, 2))
    assert not torch.equal(first, moments(4, 3)) and not torch.equal(first, moments(5, 2))
    same = [torch.full((4096,), 1.003, device=DEVICE) for _ in range(2)]
    averages = [torch.zeros(4096, dtype=torch.bfloat16, device=DEVICE) for _ in range(4)]
    function(same, same, averages[:2], averages[2:], 1, **SETTINGS, stochastic_rounding_seed=0)
    assert len(averages[0].unique()) == 2, "equal elements are rounded apart"
    assert not torch.equal(averages[0], averages[1]), "and so are equal tensors"


@pytest.mark.parametrize("function", BOTH)
def test_stochastic_rounding_has_no_bias(function):
    """The mean of many roundings is the number itself, within five standard errors; rounding to nearest is far off."""
    count, beta1, beta2 = 2**16, 0.9, 0.999
    grads = [torch.full((count,), 1.0, device=DEVICE)]
    start_m, start_v = 0.75, 0.5
    m = [torch.full((count,), start_m, device=DEVICE, dtype=torch.bfloat16)]
    v = [torch.full((count,), start_v, device=DEVICE, dtype=torch.bfloat16)]
    settings = {**SETTINGS, "betas": (beta1, beta2)}
    function([torch.zeros(count, device=DEVICE)], grads, m, v, 1, **settings, stochastic_rounding_seed=3)
    for average, exact in ((m[0], start_m + (1 - beta1) * (1 - start_m)), (v[0], beta2 * start_v + (1 - beta2))):
        exact = float(torch.tensor(exact))
        values = average.double()
        below, above = values.min().item(), values.max().item()
        assert below < exact < above and above - below == pytest.approx(2**-8), (below, exact, above)
        spread = ((exact - below) * (above - exact) / count) ** 0.5
        assert abs(values.mean().item() - exact) < 5 * spread
        nearest = float(torch.tensor(exact).bfloat16())
        assert abs(nearest - exact) > 20 * spread


def test_random_bits_are_uniform_and_independent():
    bits = random_bits(2**16, seed=1, step=2, place=3, device=torch.device("cpu"))
    assert bits.min() >= 0 and bits.max() < 2**32
    for i in range(32):
        ones = ((bits >> i) & 1).double()
        assert abs(ones.mean().item() - 0.5) < 5 * 0.5 / 2**8, i
        assert abs((ones[1:] == ones[:-1]).double().mean().item() - 0.5) < 5 * 0.5 / 2**8, i
        assert abs((ones == ((bits >> ((i + 16) % 32)) & 1)).double().mean().item() - 0.5) < 5 * 0.5 / 2**8, i
    other = random_bits(2**16, seed=1, step=3, place=3, device=torch.device("cpu"))
    assert (bits == other).sum() < 5


def test_stochastic_round_takes_neighbours_and_leaves_what_bf16_can_hold():
    held = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-130, torch.inf, -torch.inf])
    for random in (0, 0xFFFF):
        assert torch.equal(stochastic_round(held, torch.full((7,), random)).float(), held)
    between = torch.tensor([1.0 + 2**-9, -1.0 - 2**-9])
    assert stochastic_round(between, torch.zeros(2, dtype=torch.int64)).tolist() == [1.0, -1.0]
    assert stochastic_round(between, torch.full((2,), 0xFFFF)).tolist() == [1.0 + 2**-7, -1.0 - 2**-7]
    odd = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert stochastic_round(odd, torch.full((2,), 0xFFFF)).isnan().all()


def test_what_it_cannot_take_it_refuses():
    params, grads, exp_avgs, exp_avg_sqs = lists(shapes=[(4, 6)])
    with pytest.raises(KernelError, match="fp32 parameters"):
        fused_adamw_step_([params[0].bfloat16()], grads, exp_avgs, exp_avg_sqs, 1, **SETTINGS)
    with pytest.raises(KernelError, match="contiguous"):
        fused_adamw_step_(
            [params[0][:, ::2]], [grads[0][:, ::2]], [exp_avgs[0][:, ::2]], [exp_avg_sqs[0][:, ::2]], 1, **SETTINGS
        )
    fused_adamw_step_([], [], [], [], 1, **SETTINGS)
