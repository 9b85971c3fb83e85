"""Flow matching between noise and density maps: path, loss, samplers, likelihood.

    x_t = (1 - t) x_0 + t x_1            x_0 ~ data, x_1 ~ N(0, I), t in [0, 1]         (1)
    v_t = dx_t/dt = x_1 - x_0                                                           (2)
    L   = E |v_theta(x_t, t) - v_t|^2    least for v_theta = E[x_1 - x_0 | x_t]         (3)
    E[x_0 | x_t] = x_t - t v_theta(x_t, t)                                              (4)
    dx/dt = v_theta(x, t)                from t = 1 down to 0 noise becomes a map       (5)
    log p_0(x_0) = log N(x_1; 0, I) + integral_0^1 div v_theta(x_t, t) dt   along (5)   (6)
    div v = E z^T (dv/dx) z              for random z with E z z^T = I                  (7)
    log p(x) = log p_0(x_0) - n log std  for the density x = mean + std x_0, n voxels   (8)

t = 0 is data and t = 1 is noise in every file; sampling runs t from 1 to 0, likelihood from 0 to 1.
`velocity` is any callable v(x_t, t): x_t (B, ...) and t (B,) in [0, 1] give (B, ...).

(1), (5): CryoFM (arXiv:2410.08631) §3.1 eq. 2 and 1; (2), (3): the unnumbered formulae below its
eq. 2; Lipman et al. 2023 (arXiv:2210.02747) §4.1 eq. 22-23, time reversed. (4): from (1) and (2).
(6)-(8): CryoFM appendix B.2.
Erratum 1: §3.1 prints the velocity x_0 - x_1; its own eq. 1 and 2 give (2), as in the release.
Erratum 2: B.2 prints a minus before the integral of (6); its own continuity equation gives plus.
    (Its z^T grad v z is right, and the same for grad v transposed.)
Departure 1: the loss is a mean over voxels, not a sum, so that it compares between box sizes.
Departure 2: z holds random signs, not Gaussian numbers: a smaller variance, see `log_likelihood`.
Departure 3: N steps always cover the whole path, in equal steps, see `sample`.
"""

import math
import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor | float) -> Tensor:
    """x_t on the straight path (1). x_0, x_1: (B, ...); t: (B,) or one number.

    Raises ValueError if the shapes do not fit."""
    if x_0.shape != x_1.shape:
        raise ValueError(f"x_0 {tuple(x_0.shape)} and x_1 {tuple(x_1.shape)} must have one shape")
    t = per_map(t, x_0)
    return (1 - t) * x_0 + t * x_1                                              # (1)


def posterior_mean(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """E[x_0 | x_t] (4) where v = v_theta(x_t, t). x_t, v: (B, ...); t: (B,) or one number."""
    return x_t - per_map(t, x_t) * v                                            # (4)


def per_map(t: Tensor | float, x: Tensor) -> Tensor:
    """t: (B,) or one number -> (B, 1, ..., 1) or (1, ..., 1), to multiply maps x (B, ...)."""
    t = t if torch.is_tensor(t) else x.new_tensor(t)
    if t.numel() not in (1, len(x)):
        raise ValueError(f"t holds {t.numel()} times for {len(x)} maps; give one each, or a number")
    return t.reshape(-1, *[1] * (x.dim() - 1))


def evaluate(velocity: Velocity, x: Tensor, t: Tensor | float) -> Tensor:
    """velocity(x, t) for a whole batch, t (B,) or one number; float32 at least, and never broadcast.

    Raises ValueError if the velocity's shape is not that of x (B, ...)."""
    if not torch.is_tensor(t):                          # never bf16, which holds 3 digits of a time
        wide = torch.promote_types(x.dtype, torch.float32)
        t = torch.full((len(x),), t, device=x.device, dtype=wide)
    v = velocity(x, t)
    if v.shape != x.shape:
        raise ValueError(f"the velocity has shape {tuple(v.shape)}, the maps {tuple(x.shape)}")
    return v.to(torch.promote_types(x.dtype, torch.float32))


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16. Where it does not, torch does so in software: a forward
    pass of "tiny" took 2.6 s in bfloat16 and 0.24 s in float32 on a CPU with AVX2 alone.
    CRYO_BF16=0 or 1 in the environment forces the answer, so that tests can run both ways on any machine."""
    forced = os.environ.get("CRYO_BF16", "")
    if forced in ("0", "1"):
        return forced == "1"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device, bf16: bool = True) -> torch.autocast:
    """Autocast to bfloat16, if asked for, where that is faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and has_bf16(device))


def draw_device(generator: torch.Generator | None, device) -> torch.device:
    """Where to draw: with a CPU generator a GPU run sees the numbers that a CPU run sees."""
    return device if generator is None else generator.device


def draw_noise(generators: list[torch.Generator], shape: tuple[int, ...], device) -> Tensor:
    """Standard normal noise (K, *shape) on `device`, map k from the k-th of K CPU generators.

    Each map depends on its own generator alone, so it does not depend on how many are drawn at once.
    """
    noise = [torch.randn(shape, generator=generator) for generator in generators]
    return torch.stack(noise).to(device)


def sample_t(n: int, law: str = "uniform", generator: torch.Generator | None = None,
             device: torch.device | str = "cpu") -> Tensor:
    """n training times in [0, 1], float32 (n,).

    law: "uniform" (CryoFM-S), or "logit-normal" (CryoFM-L), which visits the middle more often:
    Esser et al. 2024 (arXiv:2403.03206) §3.1. Neither is in the paper; both as the authors'
    release has them. Raises ValueError for any other law."""
    if law == "uniform":
        t = torch.rand(n, generator=generator, device=draw_device(generator, device))
    elif law == "logit-normal":
        z = torch.randn(n, generator=generator, device=draw_device(generator, device))
        # Stretched by 2 % at both ends and clamped, so that 0 and 1 occur; in whole thousandths.
        t = (torch.sigmoid(z) * 1040 - 20).floor().clamp(0, 1000) / 1000
    else:
        raise ValueError(f"law {law!r} is unknown; take 'uniform' or 'logit-normal'")
    return t.to(device)


def loss(velocity: Velocity, x_0: Tensor, *, t: Tensor | None = None, x_1: Tensor | None = None,
         law: str = "uniform", generator: torch.Generator | None = None,
         per_sample: bool = False) -> Tensor:
    """The flow-matching loss (3): mean squared error per voxel, float32 at least.

    x_0: (B, ...) maps in network scale. t (B,) and x_1 (B, ...) are drawn, t first, where not
    given; law: see `sample_t`. Returns a scalar, or (B,) if per_sample.
    Raises ValueError if shapes do not fit."""
    if t is None:
        t = sample_t(len(x_0), law, generator, x_0.device)
    if x_1 is None:
        x_1 = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype,
                          device=draw_device(generator, x_0.device)).to(x_0.device)
    v = evaluate(velocity, interpolate(x_0, x_1, t), t)
    error = (v - (x_1 - x_0)).square().flatten(1).mean(1)                       # (B,)  (2), (3)
    return error if per_sample else error.mean()


# One step of (5), from t to t - h. The number is the order: errors over a run fall as h ** order.
# Hairer, Nørsett & Wanner 1993, §II.1.
def euler(v, x, t, h):                                                          # 1
    return x - h * v(x, t)


def midpoint(v, x, t, h):                                                       # 2
    half_way = x - h / 2 * v(x, t)
    return x - h * v(half_way, t - h / 2)


def heun(v, x, t, h):                                                           # 2
    k_1 = v(x, t)
    k_2 = v(x - h * k_1, t - h)
    return x - h / 2 * (k_1 + k_2)


def rk4(v, x, t, h):                                                            # 4
    k_1 = v(x, t)
    k_2 = v(x - h / 2 * k_1, t - h / 2)
    k_3 = v(x - h / 2 * k_2, t - h / 2)
    k_4 = v(x - h * k_3, t - h)
    return x - h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)


SOLVERS = {"euler": euler, "midpoint": midpoint, "heun": heun, "rk4": rk4}    # 1, 2, 2, 4 calls


@torch.no_grad()
def sample(velocity: Velocity, x_1: Tensor, steps: int, method: str = "euler", *,
           t_start: float = 1.0, progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
    """Integrate (5) from t_start to 0 in equal steps: maps x_0 (B, ...) from x_1 (B, ...).

    x_1: noise, or where t_start < 1 the maps at that time, from `interpolate`. method: one of
    SOLVERS; Euler and midpoint never evaluate t = 0. progress wraps the range of steps, as
    tqdm.tqdm does. Raises ValueError if steps < 1, method is unknown or t_start not in (0, 1]."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 is needed")
    if method not in SOLVERS:
        raise ValueError(f"method {method!r} is unknown; take one of {', '.join(SOLVERS)}")
    if not 0 < t_start <= 1:
        raise ValueError(f"t_start is {t_start:g}; it must lie in (0, 1]")

    def v(x, t):
        return evaluate(velocity, x, t)

    x, h = x_1, t_start / steps
    # Departure 3: the release truncates times to whole thousandths (unequal steps), evaluates Euler's
    # velocity at the end of each step in one of its samplers, and leaves out RK4's last step.
    for i in progress(range(steps)):
        x = SOLVERS[method](v, x, t_start * (steps - i) / steps, h)             # (5)
    return x


def guided_step(x: Tensor, v: Tensor, gradient: Tensor, t: float, steps: int, lambda_max: float,
                per_time: bool = False) -> Tensor:
    """One step of CryoFM's Algorithms 1 and 3: x_t - v / N - lambda_t g / |g|, lambda_t = min(lambda_max, t / (1 - t)).

    x, v, gradient: (K, D, H, W), each map with its own |g|. per_time multiplies lambda_t by 200 / N, so that the sum of
    all lambda does not depend on the number of steps N."""
    size = min(lambda_max, t / max(1 - t, 1e-6)) * (200 / steps if per_time else 1)
    norm = torch.linalg.vector_norm(gradient, dim=(-3, -2, -1), keepdim=True)
    return x - v / steps - size * gradient / norm


def log_likelihood(velocity: Velocity, x_0: Tensor, *, probes: int = 8, rtol: float = 1e-5,
                   atol: float = 1e-5, std: float = 1.0, return_error: bool = False,
                   generator: torch.Generator | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Log-likelihood of each map by the probability-flow ODE (6), in nats per map.

    x_0: (B, ...) maps in network scale; std: of the normalisation, for the likelihood of the density
    itself (8). probes: vectors z in (7); as many as voxels, or more, give the exact divergence.
    All maps share them, so that maps compare better than the standard error says. rtol, atol: per
    voxel, see `dormand_prince`; give networks 1e-4: in float32 their time features carry rounding
    noise, and an untrained HDiT took 55, 163, 1285 evaluations at 1e-3, 1e-4, 1e-5. An evaluation
    is one forward and `probes` backward passes, one map at a time: no result depends on its batch.
    Returns (B,) float64; if return_error also (B,), the standard error over probes (not the ODE's).
    Raises ValueError if probes < 2 or a tolerance or std is not positive; see `dormand_prince`."""
    n = x_0[0].numel()
    if probes < min(2, n):
        raise ValueError(f"probes is {probes}; a standard error needs at least 2")
    if not min(std, rtol, atol) > 0:
        raise ValueError(f"std {std:g}, rtol {rtol:g} and atol {atol:g} must be positive")
    if probes >= n:                                     # sqrt(n) e_i: (7) is exact over these n
        z = math.sqrt(n) * torch.eye(n, device=x_0.device, dtype=x_0.dtype)
    else:
        # Departure 2: with S the symmetric part of dv/dx, z^T S z varies by 2 |S|^2 for Gaussian z
        # and by 2 |S - diag S|^2 for signs; near t = 1 S is almost the identity. One z per path, as
        # in Grathwohl et al. 2019 (arXiv:1810.01367) §3.1.
        z = torch.randint(2, (probes, n), generator=generator, device=draw_device(generator, x_0.device))
        z = 2 * z.to(x_0) - 1
    z = z.reshape(-1, 1, *x_0.shape[1:])                                        # (P, 1, ...)

    def slope(t, state):                                # of x_t, and of P integrals in nats per voxel
        x = state[0].detach().requires_grad_()
        with torch.enable_grad():
            v = evaluate(velocity, x, t)
        zJ = [torch.autograd.grad(v, x, z_p, retain_graph=True)[0] for z_p in z]  # z^T dv/dx
        zJz = [(a * b).sum(dtype=torch.float64) for a, b in zip(zJ, z)]
        return v.detach(), torch.stack(zJz) / n                                 # (7)

    nats, error = [], []
    for x in x_0.split(1):
        zero = torch.zeros(len(z), device=x.device, dtype=torch.float64)
        x_1, integral = dormand_prince(slope, (x, zero), rtol, atol)
        log_p_1 = -0.5 * (x_1.double().square().sum() + n * math.log(2 * math.pi))
        nats.append(log_p_1 + n * integral.mean() - n * math.log(std))    # (6), (8); Erratum 2: +
        error.append(n * integral.std() / math.sqrt(len(z)) if probes < n else 0 * log_p_1)
    return (torch.stack(nats), torch.stack(error)) if return_error else torch.stack(nats)


# Dormand & Prince 1980, as in Hairer, Nørsett & Wanner 1993, table II.5.2: time and weights of each
# slope after the first. The last row is the step itself; ERROR is it less the 4th-order weights.
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

    state: a tuple of tensors. A step is kept if in each of them the root mean square of its error /
    (atol + rtol |value|) is at most 1. Raises ValueError if no step is short enough for that, which
    happens where the slope jumps or is not finite."""
    def combine(weights, slopes):                       # w_1 k_1 + w_2 k_2 + ...
        return [sum(w * k for w, k in zip(weights, ks)) for ks in zip(*slopes)]

    t, h, first = 0.0, 0.01, slope(0.0, state)
    while t < 1:
        h = min(h, 1 - t)
        slopes = [first]
        for c, weights in STAGES:
            new = tuple(y + h * dy for y, dy in zip(state, combine(weights, slopes)))
            slopes.append(slope(t + c * h, new))
        size = max_rms(h * e / (atol + rtol * torch.maximum(y.abs(), y_new.abs()))
                       for e, y, y_new in zip(combine(ERROR, slopes), state, new))
        if size <= 1:
            t, state, first = (1.0 if h == 1 - t else t + h), new, slopes[-1]
        elif h < 1e-7:
            raise ValueError(f"the ODE cannot pass t = {t:g}, error {size:g}: the velocity jumps or "
                             "is not finite; check the input, or raise rtol and atol")
        h *= min(5.0, max(0.2, 0.9 * max(size, 1e-4) ** -0.2))                  # ibid. eq. II.4.13
    return state


def max_rms(errors: Iterable[Tensor]) -> float:
    """The largest root mean square; nan if any is nan, which Python's max would lose."""
    return torch.stack([e.double().square().mean().sqrt() for e in errors]).max().item()
