"""Flow matching between noise and density maps: path, loss, samplers, likelihood.

    x_t = (1 - t) x_0 + t x_1            x_0 ~ data, x_1 ~ N(0, I), t in [0, 1]         (1)
    v_t = dx_t/dt = x_1 - x_0                                                           (2)
    L   = E |v_theta(x_t, t) - v_t|^2    smallest if v_theta = E[x_1 - x_0 | x_t]       (3)
    E[x_0 | x_t] = x_t - t v_theta(x_t, t)                                              (4)
    dx/dt = v_theta(x, t)                from t = 1 down to 0 noise becomes a map       (5)
    log p_0(x_0) = log N(x_1; 0, I) + integral_0^1 div v_theta(x_t, t) dt   along (5)   (6)
    div v = E z^T (dv/dx) z              for random z with E z z^T = I                  (7)
    log p(x) = log p_0(x_0) - n log std  for the density x = mean + std x_0, n voxels   (8)

In every file t = 0 is data and t = 1 is noise. Sampling goes from 1 to 0, likelihood from 0 to 1.
`velocity` is any function v(x_t, t). It takes maps (B, ...) and times (B,), and returns (B, ...).

(1), (5): CryoFM (arXiv:2410.08631) §3.1 eq. 2 and 1. (2), (3): the formulae below its eq. 2, and
Lipman et al. 2023 (arXiv:2210.02747) §4.1 with time reversed. (4) follows from (1) and (2).
(6)-(8): CryoFM appendix B.2.
Erratum 1: §3.1 prints the velocity x_0 - x_1. Its own eq. 1 and 2 give (2), as in the release.
Erratum 2: B.2 prints a minus before the integral of (6). Its own continuity equation gives a plus.
Departure 1: the loss is a mean over voxels, not a sum, so that it compares between box sizes.
Departure 2: z holds random signs, not Gaussian numbers. This lowers the variance: `draw_probes`.
Departure 3: N steps always cover the whole path in equal steps: `sample`.
Departure 4: the law "uniform" draws any time. The release draws whole thousandths: `sample_t`.
"""

import math
import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]

# ---- The path


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor | float) -> Tensor:
    """x_t on the straight path (1). x_0, x_1: (B, ...); t: (B,) or one number.

    Raises ValueError if the shapes do not fit.
    """
    if x_0.shape != x_1.shape:
        raise ValueError(f"x_0 {tuple(x_0.shape)} and x_1 {tuple(x_1.shape)} must have one shape")
    t = per_map(t, x_0)
    return (1 - t) * x_0 + t * x_1  # (1)


def posterior_mean(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """E[x_0 | x_t] (4) where v = v_theta(x_t, t). x_t, v: (B, ...); t: (B,) or one number."""
    return x_t - per_map(t, x_t) * v  # (4)


def per_map(t: Tensor | float, x: Tensor) -> Tensor:
    """t (B,) or one number -> (B, 1, ..., 1) or (1, ..., 1), to multiply maps x (B, ...)."""
    if not torch.is_tensor(t):
        t = x.new_tensor(t)
    if t.numel() not in (1, len(x)):
        raise ValueError(f"t holds {t.numel()} times for {len(x)} maps; give one each, or a number")
    return t.reshape(-1, *[1] * (x.dim() - 1))


def evaluate(velocity: Velocity, x: Tensor, t: Tensor | float) -> Tensor:
    """velocity(x, t) for maps x (B, ...) and t (B,) or one number; float32 or float64.

    Raises ValueError if the velocity does not have the shape of x.
    """
    # bfloat16 keeps 3 digits, which is too few for times and for the sums that solvers build of v.
    wide = torch.promote_types(x.dtype, torch.float32)
    if not torch.is_tensor(t):
        t = torch.full((len(x),), t, device=x.device, dtype=wide)
    v = velocity(x, t)
    if v.shape != x.shape:
        raise ValueError(f"the velocity has shape {tuple(v.shape)}, the maps {tuple(x.shape)}")
    return v.to(wide)


# ---- Precision and random numbers


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16.

    Elsewhere torch emulates it: on a CPU with AVX2 alone, a forward pass of "tiny" took 2.6 s in
    bfloat16 and 0.24 s in float32. CRYO_BF16=0 or 1 in the environment forces the answer, so that
    tests can run both ways on any machine.
    """
    forced = os.environ.get("CRYO_BF16")
    if forced in ("0", "1"):
        return forced == "1"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device, bf16: bool = True) -> torch.autocast:
    """Autocast to bfloat16, if asked for, where that is faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and has_bf16(device))


def draw_device(generator: torch.Generator | None, device) -> torch.device:
    """The device to draw on: the generator's, or `device` without one.

    With a CPU generator, a run on a GPU draws the same numbers as a run on a CPU.
    """
    return device if generator is None else generator.device


def draw_noise(generators: list[torch.Generator], shape: tuple[int, ...], device) -> Tensor:
    """Standard normal noise (K, *shape) on `device`, map k from the k-th of K CPU generators.

    A map depends on its own generator alone, not on how many are drawn at once.
    """
    noise = [torch.randn(shape, generator=generator) for generator in generators]
    return torch.stack(noise).to(device)


# ---- Training


def sample_t(
    n: int,
    law: str = "uniform",
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """n training times in [0, 1], float32 (n,).

    law: "uniform" over [0, 1) (CryoFM-S, but there whole thousandths from 0 to 1: Departure 4), or
    "logit-normal" over whole thousandths (CryoFM-L), which visits the middle more often (Esser et
    al. 2024, arXiv:2403.03206, §3.1). The paper names neither; they are in the authors' release.
    Raises ValueError for any other law.
    """
    where = draw_device(generator, device)
    if law == "uniform":
        # Departure 4: the release draws integers and divides by 1000; ours are continuous.
        t = torch.rand(n, generator=generator, device=where)
    elif law == "logit-normal":
        # As in the release: stretched by 2 % at both ends and clamped, so that 0 and 1 occur,
        # then truncated to whole thousandths.
        z = torch.randn(n, generator=generator, device=where)
        thousandths = (torch.sigmoid(z) * 1040 - 20).floor().clamp(0, 1000)
        t = thousandths / 1000
    else:
        raise ValueError(f"law {law!r} is unknown; take 'uniform' or 'logit-normal'")
    return t.to(device)


def loss(
    velocity: Velocity,
    x_0: Tensor,
    *,
    t: Tensor | None = None,
    x_1: Tensor | None = None,
    law: str = "uniform",
    generator: torch.Generator | None = None,
    per_sample: bool = False,
) -> Tensor:
    """The flow-matching loss (3): mean squared error per voxel, float32 or float64.

    x_0: (B, ...) maps in network scale. t (B,) and x_1 (B, ...) are drawn, t first, if not given.
    law: see `sample_t`. Returns a scalar, or (B,) if per_sample.
    Raises ValueError if shapes do not fit.
    """
    if t is None:
        t = sample_t(len(x_0), law, generator, x_0.device)
    if x_1 is None:
        where = draw_device(generator, x_0.device)
        x_1 = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype, device=where)
        x_1 = x_1.to(x_0.device)

    # Ask the network for the velocity somewhere on the path, and compare with the true one.
    x_t = interpolate(x_0, x_1, t)
    v = evaluate(velocity, x_t, t)
    error = v - (x_1 - x_0)  # (2), Erratum 1
    error = error.square().flatten(1).mean(1)  # (B,)  (3), Departure 1
    return error if per_sample else error.mean()


# ---- Sampling

# Each solver makes one step of (5), from t to t - h. The comment gives its order: the error of a
# whole run falls as h ** order. Hairer, Nørsett & Wanner 1993, §II.1.


def euler(v, x, t, h):  # order 1
    return x - h * v(x, t)


def midpoint(v, x, t, h):  # order 2
    half_way = x - h / 2 * v(x, t)
    return x - h * v(half_way, t - h / 2)


def heun(v, x, t, h):  # order 2
    k_1 = v(x, t)
    k_2 = v(x - h * k_1, t - h)
    return x - h / 2 * (k_1 + k_2)


def rk4(v, x, t, h):  # order 4
    k_1 = v(x, t)
    k_2 = v(x - h / 2 * k_1, t - h / 2)
    k_3 = v(x - h / 2 * k_2, t - h / 2)
    k_4 = v(x - h * k_3, t - h)
    return x - h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)


SOLVERS = {"euler": euler, "midpoint": midpoint, "heun": heun, "rk4": rk4}


@torch.no_grad()
def sample(
    velocity: Velocity,
    x_1: Tensor,
    steps: int,
    method: str = "euler",
    *,
    t_start: float = 1.0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Tensor:
    """Integrate (5) from t_start to 0 in equal steps: maps x_0 (B, ...) from x_1 (B, ...).

    x_1: noise. With t_start < 1 give the maps x_t at that time, from `interpolate`. method: a key
    of SOLVERS. Euler and midpoint never evaluate t = 0. progress wraps the range of steps, as
    tqdm.tqdm does. Raises ValueError if steps < 1, method is unknown or t_start not in (0, 1].
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 is needed")
    if method not in SOLVERS:
        raise ValueError(f"method {method!r} is unknown; take one of {', '.join(SOLVERS)}")
    if not 0 < t_start <= 1:
        raise ValueError(f"t_start is {t_start:g}; it must lie in (0, 1]")

    def v(x, t):
        return evaluate(velocity, x, t)

    # Departure 3: the release truncates times to whole thousandths, so that its steps differ. One
    # of its Euler samplers asks for the velocity at the end of each step, and its RK4 leaves out
    # the last step.
    step = SOLVERS[method]
    x = x_1
    for i in progress(range(steps)):
        t = t_start * (steps - i) / steps
        x = step(v, x, t, t_start / steps)  # (5)
    return x


def guided_step(
    x: Tensor,
    v: Tensor,
    gradient: Tensor,
    t: float,
    steps: int,
    lambda_max: float,
    per_time: bool = False,
) -> Tensor:
    """x after a step of CryoFM's Algorithms 1 and 3: an Euler step of (5) and a gradient step.

        x_t - v / steps - lambda_t g / |g|,   lambda_t = min(lambda_max, t / (1 - t))

    x, v, gradient: (K, D, H, W). g is the gradient of a loss in x, and each map has its own |g|. A
    map whose g is 0 takes Euler's step alone.
    per_time multiplies lambda_t by 200 / steps, so that the sum of all lambda_t does not depend on
    the number of steps.
    """
    lambda_t = min(lambda_max, t / max(1 - t, 1e-6))
    if per_time:
        lambda_t *= 200 / steps
    norm = torch.linalg.vector_norm(gradient, dim=(-3, -2, -1), keepdim=True)
    # Where g is 0 there is nowhere to go, and 0 / 0 would be nan.
    direction = torch.where(norm == 0, 0, gradient / norm)
    # The minus before lambda_t and the 1 / steps: Erratum in posterior.py and abinitio.py.
    return x - v / steps - lambda_t * direction


# ---- Likelihood


def log_likelihood(
    velocity: Velocity,
    x_0: Tensor,
    *,
    probes: int = 8,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    std: float = 1.0,
    return_error: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-likelihood (6) of each map, by integrating the ODE (5): (B,) float64, in nats per map.

    x_0: (B, ...) maps in network scale. std: of the network scale (8), to get log p of the density
    itself; 1 gives log p of x_0.
    probes: number of vectors z in (7). All maps share them, so that a difference between two maps
    has a smaller error than each map. As many as voxels, or more, give the exact divergence.
    rtol, atol: per voxel, see `dormand_prince`. Give networks 1e-4: their time features carry
    float32 rounding, and an untrained HDiT took 55, 163, 1285 evaluations at 1e-3, 1e-4, 1e-5.
    An evaluation is one forward and `probes` backward passes.
    return_error: return also the standard error over probes, (B,), without the error of the ODE.
    Raises ValueError if probes < 2, or a tolerance or std is not positive; see `dormand_prince`.
    """
    n = x_0[0].numel()
    if probes < min(2, n):
        raise ValueError(f"probes is {probes}; a standard error needs at least 2")
    if not min(std, rtol, atol) > 0:
        raise ValueError(f"std {std:g}, rtol {rtol:g} and atol {atol:g} must be positive")
    z = draw_probes(x_0, probes, generator)  # (P, 1, ...)

    def slope(t, state):
        # The state is x_t and P integrals, one for each probe, in nats per voxel.
        x = state[0].detach().requires_grad_()
        with torch.enable_grad():
            v = evaluate(velocity, x, t)
        divergence = []
        for z_p in z:
            (z_J,) = torch.autograd.grad(v, x, z_p, retain_graph=True)  # z^T dv/dx
            divergence.append((z_J * z_p).sum(dtype=torch.float64))  # (7)
        return v.detach(), torch.stack(divergence) / n

    # One map at a time, so that the steps of one map do not depend on the others.
    nats, errors = [], []
    for x in x_0.split(1):
        # Follow (5) from the map to its noise, and integrate the divergence on the way.
        zeros = torch.zeros(len(z), device=x.device, dtype=torch.float64)
        x_1, integral = dormand_prince(slope, (x, zeros), rtol, atol)
        log_p_1 = -0.5 * (x_1.double().square().sum() + n * math.log(2 * math.pi))
        nats.append(log_p_1 + n * integral.mean() - n * math.log(std))  # (6), Erratum 2; (8)

        # The probes disagree about the divergence, unless they are a full basis.
        exact = probes >= n
        error = 0 * log_p_1 if exact else n * integral.std() / math.sqrt(len(z))
        errors.append(error)
    if return_error:
        return torch.stack(nats), torch.stack(errors)
    return torch.stack(nats)


def draw_probes(x_0: Tensor, probes: int, generator: torch.Generator | None) -> Tensor:
    """The vectors z of (7), (P, 1, ...) for maps x_0 (B, ...): random signs, or a full basis."""
    n = x_0[0].numel()
    if probes >= n:
        # The mean of z z^T over the n vectors sqrt(n) e_i is exactly I, and so is (7).
        z = math.sqrt(n) * torch.eye(n, device=x_0.device, dtype=x_0.dtype)
    else:
        # Departure 2: with S the symmetric part of dv/dx, z^T S z varies by 2 |S|^2 for Gaussian z
        # and by 2 |S - diag S|^2 for signs. Near t = 1 S is almost the identity.
        # One z serves a whole path, as in Grathwohl et al. 2019 (arXiv:1810.01367) §3.1.
        where = draw_device(generator, x_0.device)
        z = torch.randint(2, (probes, n), generator=generator, device=where)
        z = 2 * z.to(x_0) - 1
    return z.reshape(-1, 1, *x_0.shape[1:])


# Dormand & Prince 1980, as in Hairer, Nørsett & Wanner 1993, table II.5.2. Each row after the first
# slope: the time of the next slope, and the weights of the slopes before it. The last row is the
# step itself. ERROR is the step minus the one with 4th-order weights.
STAGES = (
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1, (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def dormand_prince(slope: Callable, state: tuple[Tensor, ...], rtol: float, atol: float):
    """The state at t = 1 from d state/dt = slope(t, state), by Dormand & Prince's 5(4) pair.

    state: a tuple of tensors, at t = 0. A step is kept if the root mean square of
    error / (atol + rtol |value|) is at most 1 in each tensor. Raises ValueError if no step is short
    enough, which happens where the slope jumps or is not finite.
    """

    def combine(weights, slopes):
        # w_1 k_1 + w_2 k_2 + ... for each tensor of the state
        return [sum(w * k for w, k in zip(weights, ks)) for ks in zip(*slopes)]

    t = 0.0
    h = 0.01
    first = slope(t, state)
    while t < 1:
        h = min(h, 1 - t)

        # Six more slopes, each at a point reached with the slopes before it.
        slopes = [first]
        for c, weights in STAGES:
            change = combine(weights, slopes)
            new = tuple(y + h * dy for y, dy in zip(state, change))
            slopes.append(slope(t + c * h, new))

        # The error of the step, in units of what is tolerated.
        scaled = []
        for error, y, y_new in zip(combine(ERROR, slopes), state, new):
            tolerance = atol + rtol * torch.maximum(y.abs(), y_new.abs())
            scaled.append((h * error / tolerance).double().square().mean().sqrt())
        size = torch.stack(scaled).max().item()  # nan if any is nan, which Python's max would lose

        # Keep a step that is good enough. The last slope is the first one of the next step.
        if size <= 1:
            t = 1.0 if h == 1 - t else t + h
            state = new
            first = slopes[-1]
        elif h < 1e-7:
            raise ValueError(
                f"the ODE cannot pass t = {t:g}, error {size:g}: the velocity jumps or is not "
                "finite; check the input, or tolerate larger errors (rtol and atol, --tolerance)"
            )
        # Choose the next step so that its error is just below what is tolerated.
        growth = 0.9 * max(size, 1e-4) ** -0.2 if math.isfinite(size) else 0.2
        h *= min(5.0, max(0.2, growth))  # Hairer et al., eq. II.4.13
    return state
