"""Claims of flow.py. On a Gaussian velocity, flow and likelihood have closed forms."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import flow

ORACLES = Path(__file__).parent / "oracles"
f64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def oracle(name):
    return {key: torch.tensor(value) for key, value in np.load(ORACLES / name).items()}


def make_gaussian(n=5, seed=0):
    """mean (n,) and covariance (n, n) of x_0, in float64, well conditioned."""
    rng = seeded(seed)
    root = torch.randn(n, n, generator=rng, dtype=f64) / math.sqrt(n) + 0.5 * torch.eye(
        n, dtype=f64
    )
    return torch.randn(n, generator=rng, dtype=f64), root @ root.T + 0.1 * torch.eye(n, dtype=f64)


def gaussian_velocity(mean, cov):
    """E[x_1 - x_0 | x_t] = -mean + Cov(x_1 - x_0, x_t) Cov(x_t)^-1 (x_t - (1 - t) mean)."""
    values, axes = torch.linalg.eigh(cov)

    def velocity(x, t):  # (B, n), (B,)
        t = t.double()[:, None]
        gain = (t - (1 - t) * values) / ((1 - t) ** 2 * values + t**2)  # (B, n)
        off = (x.double() - (1 - t) * mean) @ axes
        return (-mean + (gain * off) @ axes.T).to(x.dtype)

    return velocity


def gaussian_flow(x_1, mean, cov, t=0.0):
    """Where (5) takes x_1: (1 - t) mean + root of Cov(x_t) times x_1; all share their axes."""
    values, axes = torch.linalg.eigh(cov)
    root = (axes * ((1 - t) ** 2 * values + t**2).sqrt()) @ axes.T
    return (1 - t) * mean + x_1 @ root


def log_normal(x, mean, cov):
    return torch.distributions.MultivariateNormal(mean, cov).log_prob(x)


def test_velocity_of_the_loss_is_the_time_derivative_of_the_path():
    x_0, x_1 = torch.randn(2, 3, 1, 2, 2, 2, dtype=f64, generator=seeded(0))
    t, h = torch.tensor([0.2, 0.5, 0.9], dtype=f64), 1e-5
    derivative = (flow.interpolate(x_0, x_1, t + h) - flow.interpolate(x_0, x_1, t - h)) / (2 * h)
    assert flow.loss(lambda x, t: derivative, x_0, t=t, x_1=x_1) < 1e-18
    assert torch.equal(flow.interpolate(x_0, x_1, torch.zeros(3)), x_0)  # t = 0 is data
    assert torch.equal(flow.interpolate(x_0, x_1, torch.ones(3)), x_1)  # t = 1 is noise


def test_posterior_mean_undoes_the_path():
    x_0, x_1 = torch.randn(2, 4, 1, 3, 3, 3, dtype=f64, generator=seeded(1))
    t = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=f64)
    x_t = flow.interpolate(x_0, x_1, t)
    torch.testing.assert_close(flow.posterior_mean(x_t, x_1 - x_0, t), x_0, rtol=0, atol=1e-14)


def test_minimiser_of_the_loss_is_the_conditional_expectation():
    """For an affine velocity the gradient of the loss vanishes there.

    Sigma points have the exact first and second moments of (x_0, x_1), so that the mean over them
    is the expectation, and the loss is convex.
    """
    gaussian = oracle("flow_gaussian.npz")
    mean, cov, x, n = gaussian["mean"], gaussian["cov"], gaussian["x0"], 6
    z = math.sqrt(2 * n) * torch.eye(2 * n, dtype=f64)
    z = torch.cat([z, -z])
    x_0, x_1 = mean + z[:, :n] @ torch.linalg.cholesky(cov).T, z[:, n:]
    for t, v in zip(gaussian["times"], gaussian["velocity_dx_dt"]):
        ones = torch.cat([x, torch.ones(7, 1, dtype=f64)], 1)  # 7 points fix the map
        affine = torch.linalg.solve(ones, v).requires_grad_()

        def velocity(x, t, affine=affine):
            return torch.cat([x, torch.ones(len(x), 1, dtype=f64)], 1) @ affine

        flow.loss(velocity, x_0, t=t.expand(len(x_0)), x_1=x_1).backward()
        assert affine.grad.abs().max() < 1e-10


def test_loss_is_the_mean_of_its_samples_in_float32_whatever_the_network_returns():
    x_0 = torch.randn(3, 1, 4, 4, 4, generator=seeded(0))
    t, x_1 = torch.tensor([0.1, 0.5, 0.8]), x_0.flip(0)
    each = flow.loss(lambda x, t: x.bfloat16(), x_0, t=t, x_1=x_1, per_sample=True)
    x_t = (1 - t.view(3, 1, 1, 1, 1)) * x_0 + t.view(3, 1, 1, 1, 1) * x_1
    pairs = zip(x_t.bfloat16().flatten(1).tolist(), (x_1 - x_0).flatten(1).tolist())
    slow = [sum((a - b) ** 2 for a, b in zip(v, u)) / 64 for v, u in pairs]
    assert each.dtype == torch.float32
    torch.testing.assert_close(each, torch.tensor(slow), rtol=1e-6, atol=0)
    torch.testing.assert_close(flow.loss(lambda x, t: x.bfloat16(), x_0, t=t, x_1=x_1), each.mean())


def test_loss_is_fixed_by_its_seed_and_draws_standard_noise():
    x_0, seen = torch.zeros(64, 1, 8, 8, 8), []

    def velocity(x, t):
        seen.append((x / t.view(-1, 1, 1, 1, 1), t))  # x_0 = 0: x_t / t = x_1
        return 0 * x

    a, b, c = (flow.loss(velocity, x_0, generator=seeded(s)) for s in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)
    noise, t = seen[0]
    assert abs(noise.std() - 1) < 0.02 and abs(noise.mean()) < 0.02  # 32768 draws
    assert len(t.unique()) == 64


def test_logit_normal_times_have_the_quantiles_of_the_released_formula():
    """P(1000 t < k) is that of a normal z with 1040 sigmoid(z) - 20 < k, for k = 1..1000."""
    n = 4_000_000
    edges = (torch.arange(1, 1001, dtype=f64) + 20) / 1040
    below = torch.special.ndtr(torch.logit(edges))
    t = flow.sample_t(n, "logit-normal", seeded(0))
    counts = torch.bincount((1000 * t).round().long(), minlength=1001)  # t < 0 or t > 1 fails
    assert torch.equal(counts.nonzero().flatten().float() / 1000, t.unique())  # whole thousandths
    expected = torch.diff(below, prepend=below.new_zeros(1), append=below.new_ones(1))
    chi_2 = ((counts - n * expected) ** 2 / (n * expected)).sum()  # 1000 free counts
    assert chi_2 < 1000 + 5 * math.sqrt(2 * 1000)
    mean = (1 - below).sum() / 1000  # by parts; rounding for floor would add 0.0005
    assert abs(t.double().mean() - mean) < 2.5 * t.double().std() / math.sqrt(n)


def test_uniform_times_have_uniform_quantiles():
    t = flow.sample_t(100_000, "uniform", seeded(0)).double().sort().values
    furthest = (t - torch.linspace(0, 1, 100_000, dtype=f64)).abs().max()  # Kolmogorov-Smirnov
    assert furthest < 2 / math.sqrt(100_000)


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_halving_the_step_divides_the_error_by_two_to_the_order(method, order):
    """x_0 ~ an even mixture of two Gaussians in one dimension: (5) keeps each point's quantile. One
    Gaussian would not do: on it the midpoint rule happens to be of order 3."""
    m, s = torch.tensor([-1.0, 1.5], dtype=f64), torch.tensor([0.5, 0.7], dtype=f64)

    def velocity(x, t):  # x (B, 1), t (B,)
        t = t[:, None]
        var = ((1 - t) * s) ** 2 + t**2  # (B, 2)
        off = x - (1 - t) * m
        weight = torch.softmax(-(off**2) / (2 * var) - var.log() / 2, 1)  # p(j | x_t)
        return (weight * (-m + (t - (1 - t) * s**2) / var * off)).sum(1, keepdim=True)

    x_1 = torch.linspace(-2, 2, 9, dtype=f64)[:, None]
    error = []
    for steps in (64, 128):
        x_0 = flow.sample(velocity, x_1, steps, method)
        quantile = torch.special.ndtr((x_0 - m) / s).mean(1, keepdim=True)
        error.append((quantile - torch.special.ndtr(x_1)).square().mean().sqrt().item())
    assert error[1] < 0.01 and abs(math.log2(error[0] / error[1]) - order) < 0.15


@pytest.mark.parametrize("t_start", [1.0, 0.4])
def test_samples_follow_the_exact_flow_of_a_gaussian(t_start):
    mean, cov = make_gaussian()
    x_1 = torch.randn(3, 5, dtype=f64, generator=seeded(2))
    x_t = gaussian_flow(x_1, mean, cov, t_start)
    for method, tolerance in (("euler", 0.05), ("midpoint", 1e-5), ("heun", 1e-4), ("rk4", 1e-9)):
        x_0 = flow.sample(gaussian_velocity(mean, cov), x_t, 100, method, t_start=t_start)
        torch.testing.assert_close(x_0, gaussian_flow(x_1, mean, cov), rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", flow.SOLVERS)
def test_solvers_add_up_in_float32_where_a_network_returns_bfloat16(method):
    x_1 = torch.randn(2, 50, generator=seeded(0))
    narrow = flow.sample(lambda x, t: torch.sin(x).bfloat16(), x_1, 3, method)
    wide = flow.sample(lambda x, t: torch.sin(x).bfloat16().float(), x_1, 3, method)
    assert torch.equal(narrow, wide)


@pytest.mark.parametrize(
    "method, calls, last",
    [("euler", 1, 0.25), ("midpoint", 2, 0.125), ("heun", 2, 0.0), ("rk4", 4, 0.0)],
)
def test_solvers_visit_the_times_they_document(method, calls, last):
    times, shown = [], []

    def velocity(x, t):
        assert t.shape == (2,) and t.dtype == torch.float32
        times.append(t[0].item())
        return 0 * x

    def progress(steps):
        for i in steps:
            shown.append(i)
            yield i

    flow.sample(velocity, torch.zeros(2, 3), 4, method, progress=progress)
    assert times[::calls] == [1.0, 0.75, 0.5, 0.25]  # where steps start
    assert min(times) == last
    assert len(times) == 4 * calls
    assert shown == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "method, steps",
    [
        ("euler", 10),
        ("euler", 50),
        ("euler", 200),
        ("midpoint", 10),
        ("midpoint", 50),
        ("heun", 10),
        ("heun", 50),
        ("heun", 200),
    ],
)
def test_samplers_equal_the_release_where_its_times_are_whole(method, steps):
    """Left out: N = 7 and the midpoints of 200 steps, times that it truncates (Euler 2e-5, midpoint
    9e-4 apart); its RK4, without the last step; sample_from_fm_euler, with v at each step's end."""
    release = oracle("parity/flow_sampling.npz")
    name = f"scheduler_euler_N{steps}" if method == "euler" else f"sample_from_fm_{method}_N{steps}"

    def velocity(x, t):
        t = t.view(-1, 1, 1, 1, 1)
        return 0.8 * x - 1.5 * torch.tanh(x) * (1 - t) + 0.3 * t

    x_0 = flow.sample(velocity, release["x1"], steps, method)
    torch.testing.assert_close(x_0, release[name], rtol=0, atol=1e-6)


def test_likelihood_equals_the_closed_form_of_the_oracle():
    gaussian = oracle("flow_gaussian.npz")
    velocity = gaussian_velocity(gaussian["mean"], gaussian["cov"])
    for t, v in zip(gaussian["times"], gaussian["velocity_dx_dt"]):  # ours is the oracle's
        torch.testing.assert_close(velocity(gaussian["x0"], t.expand(7)), v, rtol=0, atol=1e-12)
    x_0, exact = gaussian["x0"], gaussian["logp_exact"]
    torch.testing.assert_close(flow.log_likelihood(velocity, x_0.float()), exact, rtol=1e-5, atol=0)
    nats, error = flow.log_likelihood(velocity, x_0, rtol=1e-7, atol=1e-7, return_error=True)
    torch.testing.assert_close(nats, exact, rtol=1e-7, atol=0)
    assert error.abs().max() == 0  # 8 probes, 6 voxels


def test_likelihood_of_the_density_adds_the_change_of_variables():
    mean, cov = make_gaussian()
    density = 0.04 + 0.09 * torch.randn(2, 5, dtype=f64, generator=seeded(3))
    nats = flow.log_likelihood(gaussian_velocity(mean, cov), (density - 0.04) / 0.09, std=0.09)
    expected = log_normal(density, 0.04 + 0.09 * mean, 0.09**2 * cov)
    torch.testing.assert_close(nats, expected, rtol=1e-5, atol=0)


def test_hutchinson_estimate_is_its_closed_form_for_each_set_of_probes():
    """On a Gaussian dv/dx does not depend on x and its integral over the path is -log(cov) / 2, so
    the estimate is log N(x_1) + mean of z^T (-log(cov) / 2) z, known for every z."""
    mean, cov = make_gaussian()
    values, axes = torch.linalg.eigh(cov)
    integral = -0.5 * (axes * values.log()) @ axes.T
    x_1 = torch.randn(2, 5, dtype=f64, generator=seeded(4))
    x_0, velocity = gaussian_flow(x_1, mean, cov), gaussian_velocity(mean, cov)
    zero, eye = torch.zeros(5, dtype=f64), torch.eye(5, dtype=f64)
    for seed in range(5):
        rng = seeded(seed)
        nats, error = flow.log_likelihood(velocity, x_0, probes=4, generator=rng, return_error=True)
        z = 2.0 * torch.randint(2, (4, 5), generator=rng.manual_seed(seed)) - 1
        traces = (z.double() @ integral * z).sum(1)
        expected = log_normal(x_1, zero, eye) + traces.mean()
        torch.testing.assert_close(nats, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(error, (traces.std() / 2).expand(2), rtol=1e-4, atol=0)


def test_hutchinson_estimate_is_unbiased_and_its_standard_error_honest():
    mean, cov = make_gaussian(4)
    x_0, velocity = mean[None] + 0.3, gaussian_velocity(mean, cov)
    settings = dict(probes=3, rtol=1e-3, atol=1e-3, return_error=True)
    runs = []
    for seed in range(40):
        rng = seeded(seed)
        runs.append(flow.log_likelihood(velocity, x_0, generator=rng, **settings))
    nats, error = (torch.cat(run) for run in zip(*runs))
    spread = nats.std()
    assert abs(nats.mean() - log_normal(x_0, mean, cov)) < 4 * spread / math.sqrt(40)
    assert abs((error**2).mean().sqrt() / spread - 1) < 0.35


def test_likelihood_of_a_map_does_not_depend_on_its_batch():
    mean, cov = make_gaussian(8)
    x_0 = torch.stack([mean + 0.1, torch.full_like(mean, 9), mean - 1])  # their steps differ
    velocity = gaussian_velocity(mean, cov)
    together = flow.log_likelihood(velocity, x_0, probes=2, generator=seeded(0))
    alone = [flow.log_likelihood(velocity, x[None], probes=2, generator=seeded(0)) for x in x_0]
    assert torch.equal(together, torch.cat(alone))


def test_dormand_prince_meets_its_tolerance_at_the_fifth_order():
    """dy/dt = 5 y cos(5 t): y = exp(sin 5t). The order shows in the work: error 10^-5, cost 10
    (of the 4th-order method, 18)."""
    cost, error = [], []
    for tolerance in (1e-6, 1e-11):
        calls = []

        def slope(t, y, calls=calls):
            calls.append(t)
            return (5 * y[0] * math.cos(5 * t),)

        y = flow.dormand_prince(slope, (torch.ones(1, dtype=f64),), tolerance, tolerance)
        cost.append(len(calls))
        error.append(abs(y[0].item() / math.exp(math.sin(5)) - 1))
    assert error[0] < 1e-5 and error[1] < 1e-10
    assert 5.5 < cost[1] / cost[0] < 12


def test_noise_of_a_map_does_not_depend_on_how_many_are_drawn():
    seeds = [seeded(s) for s in (4, 5)]
    noise = flow.draw_noise(seeds, (3, 4), "cpu")
    alone = flow.draw_noise([seeded(5)], (3, 4), "cpu")
    assert noise.shape == (2, 3, 4)
    assert torch.equal(noise[1], alone[0])


@pytest.mark.parametrize("forced", ["0", "1"])
def test_the_environment_forces_bfloat16_off_or_on(monkeypatch, forced):
    monkeypatch.setenv("CRYO_BF16", forced)
    device = torch.device("cpu")
    assert flow.has_bf16(device) == (forced == "1")
    weights = torch.ones(2, 2)
    with flow.autocast(device):
        product = weights @ weights
    with flow.autocast(device, bf16=False):
        wide = weights @ weights
    assert product.dtype == (torch.bfloat16 if forced == "1" else torch.float32)
    assert wide.dtype == torch.float32


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: flow.sample(lambda x, t: x, x, 0), "steps is 0"),
        (lambda x: flow.sample(lambda x, t: x, x, 4, "rk5"), "rk5"),
        (lambda x: flow.sample(lambda x, t: x, x, 4, t_start=1.5), "t_start"),
        (lambda x: flow.sample(lambda x, t: x[:1], x, 4), "the velocity has shape"),
        (lambda x: flow.loss(lambda x, t: x[:, :1], x), "the velocity has shape"),
        (lambda x: flow.loss(lambda x, t: x, x, law="cosine"), "cosine"),
        (lambda x: flow.interpolate(x, x[:1], 0.5), "one shape"),
        (lambda x: flow.interpolate(x, x, torch.ones(3)), "3 times for 2 maps"),
        (lambda x: flow.log_likelihood(lambda x, t: x, x, probes=1), "probes is 1"),
        (lambda x: flow.log_likelihood(lambda x, t: x, x, std=0.0), "std 0"),
        (lambda x: flow.log_likelihood(lambda x, t: x * float("nan"), x), "not finite"),
    ],
)
def test_bad_input_gets_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(torch.ones(2, 4))
    assert "\n" not in str(error.value)


def test_a_map_whose_gradient_is_zero_takes_eulers_step_alone():
    x, v, gradient = torch.randn(3, 2, 4, 4, 4, generator=seeded(0))
    gradient[0] = 0
    moved = flow.guided_step(x, v, gradient, t=0.5, steps=10, lambda_max=0.3)
    euler = x - v / 10
    assert torch.equal(moved[0], euler[0])

    # The other map moves down its own gradient, 0.3 long.
    unit = gradient[1] / gradient[1].norm()
    assert torch.allclose(moved[1], euler[1] - 0.3 * unit, atol=1e-6)

    # A gradient that is no number is not hidden.
    gradient[0, 0, 0, 0] = math.nan
    assert flow.guided_step(x, v, gradient, 0.5, 10, 0.3)[0].isnan().any()
