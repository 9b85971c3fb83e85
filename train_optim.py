"""Optimisers, learning rates, weight averaging.

    theta <- FairseqAdam(theta, clip(grad L, 1))                                            (1)
    lr(n) = lr (0.01 + 0.99 n / warmup) while n < warmup, then lr, and
            linearly to 0 over the last `decay` of the steps                                (2)
    ema   <- d ema + (1 - d) theta,  d = min(ema_decay, (1 + n) / (10 + n))                 (3)

(1): CryoFM (arXiv:2410.08631) appendix B.1. The 0.01 of (2) and all of (3): the authors' release.
Pre-training takes its learning rate, weight decay and target encoder from jepa.py, which has them
from the public I-JEPA.

Departure 2 of train_presets.py: Muon for the matrices inside "tiny".
"""

import copy

import torch
from torch import Tensor

import flow
import jepa
from train_config import PRETRAINING, TrainConfig
from train_ranks import parted, whole


class FairseqAdam(torch.optim.Optimizer):
    """AdamW whose eps is added before the bias correction (fairseq, Ott et al. 2019).

    In effect eps is eps / sqrt(1 - beta2^n), which is larger in the first steps. So on a GPU
    `fused_step` is PyTorch's AdamW with that eps.
    """

    def __init__(self, params, lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01):
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=0)
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # n counts from 1, so that the bias correction is not 0.
            group["step"] += 1
            n = group["step"]
            lr = group["lr"]
            beta1, beta2 = group["betas"]

            # Moments start at 0.
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p].update(m=torch.zeros_like(p), v=torch.zeros_like(p))

            grads = [p.grad for p in params]
            m = [self.state[p]["m"] for p in params]
            v = [self.state[p]["v"] for p in params]
            if has_fused(params):
                fused_step(params, grads, m, v, group)
                continue

            # Running means of the gradient and of its square.
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)

            # Decay the weights, then step along m / (sqrt(v) + eps).
            denominator = torch._foreach_sqrt(v)
            torch._foreach_add_(denominator, group["eps"])
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            rate = lr * (1 - beta2**n) ** 0.5 / (1 - beta1**n)
            torch._foreach_addcdiv_(params, m, denominator, -rate)


def has_fused(params: list[Tensor]) -> bool:
    """Whether one kernel steps all weights. A CPU's rounds otherwise than its older runs did."""
    return params[0].device.type == "cuda"


def fused_step(params, grads, m, v, group: dict) -> None:
    """The step of FairseqAdam, `group["step"]`, in one kernel for all weights. Lists of tensors."""
    n = group["step"]
    beta1, beta2 = group["betas"]
    step_number = torch.full((), n, dtype=torch.float32, device=params[0].device)
    torch._fused_adamw_(
        params,
        grads,
        m,
        v,
        [],  # largest v, of AMSGrad
        [step_number] * len(params),
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"] / (1 - beta2**n) ** 0.5,
        amsgrad=False,
        maximize=False,
    )


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, with AdamW's update size (Jordan et al. 2024).

    torch.optim.Muon does the same, but it always multiplies in bfloat16. On a CPU without bfloat16
    a step of "tiny" then takes 11 s.
    """

    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr = group["lr"]
            mu = group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                # Momentum of Nesterov's kind: the gradient leans towards its running mean.
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - mu)
                # 0.2 sqrt(longest side) gives the update the size that AdamW's has.
                # A sharded matrix is made whole first, because all its singular values count.
                direction = parted(orthogonalised(whole(p.grad.lerp(buffer, mu))), p)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(direction, alpha=-0.2 * lr * max(p.shape) ** 0.5)


def orthogonalised(x: Tensor) -> Tensor:
    """x with all singular values near 1, by five Newton-Schulz steps. x: (m, n)."""
    # The products below are smallest for a wide matrix.
    tall = x.shape[0] > x.shape[1]
    x = x.to(torch.bfloat16 if flow.has_bf16(x.device) else torch.float32)
    x = x.T if tall else x
    # All singular values at most 1, then each step pulls them towards 1 by a quintic polynomial.
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return x.T if tall else x


def optimizers(net: torch.nn.Module, cfg: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW alone; or FairseqAdam, followed by Muon for the inner matrices where asked.

    These are the matrices of the blocks, and those that merge and split tokens between levels.
    """
    betas = (0.9, cfg.beta2)
    if cfg.optimizer == "adamw":
        # Biases, scales and tables of relative positions do not decay.
        decayed = {"params": []}
        spared = {"params": [], "weight_decay": 0.0}
        for name, p in net.named_parameters():
            group = spared if p.ndim == 1 or "relative_position" in name else decayed
            group["params"].append(p)
        fused = has_fused(decayed["params"]) or None  # None: for PyTorch to choose, as ever
        groups = [decayed, spared]
        settings = dict(weight_decay=cfg.weight_decay, fused=fused)
        return [torch.optim.AdamW(groups, cfg.lr, betas, **settings)]

    # Muon is for what multiplies tokens.
    matrices = []
    rest = []
    for name, p in net.named_parameters():
        # Not inner ones: patches in and out, and what turns the time into scales.
        outside = any(part in name for part in ("norm", "time", "patch"))
        if cfg.optimizer == "muon" and p.ndim == 2 and not outside:
            matrices.append(p)
        else:
            rest.append(p)
    result = [FairseqAdam(rest, cfg.lr, betas, weight_decay=cfg.weight_decay)]
    if matrices:
        result.append(Muon(matrices, cfg.lr, cfg.weight_decay))
    return result


def clip_gradient(net: torch.nn.Module, most: float) -> Tensor:
    """Scale the gradient so that its norm is at most `most`; returns the norm before, a scalar.

    The norm is nan or infinite if a number of the gradient is, on every rank.
    """
    return whole(torch.nn.utils.clip_grad_norm_(net.parameters(), most))


def lr_at(step: int, cfg: TrainConfig) -> float:
    """The learning rate (2) of the 0-based step; in pre-training I-JEPA's cosine."""
    if cfg.objective in PRETRAINING:
        return jepa.lr_at(
            step, cfg.steps, cfg.warmup, cfg.lr, start=cfg.lr / 5, end=min(1e-6, cfg.lr)
        )
    # Rise over the warm-up, fall over the last part.
    warm = min(1.0, 0.01 + 0.99 * step / cfg.warmup) if cfg.warmup else 1.0
    left = (cfg.steps - step) / (cfg.decay * cfg.steps) if cfg.decay else 1.0
    return cfg.lr * warm * min(1.0, left)


def set_rates(opts: list[torch.optim.Optimizer], step: int, cfg: TrainConfig) -> float:
    """Set the learning rates of the 0-based step, and pre-training's weight decay.

    Returns the learning rate. With --patience the plateau scheduler has set it already.
    """
    # All optimisers follow one schedule.
    groups = [group for optimizer in opts for group in optimizer.param_groups]
    for group in groups:
        if not cfg.patience:
            group["lr"] = lr_at(step, cfg)
        # A group without decay, as of biases, stays without.
        if cfg.objective in PRETRAINING and group["weight_decay"]:
            group["weight_decay"] = jepa.weight_decay_at(step, cfg.steps, cfg.weight_decay)
    return groups[0]["lr"]


def averaged(net: torch.nn.Module, cfg: TrainConfig) -> torch.nn.Module:
    """`ema` at the start: a copy of the network, or of JEPA's context encoder."""
    source = net.context if cfg.objective == "jepa" else net
    return copy.deepcopy(source).requires_grad_(False).eval()


def update_average(ema: torch.nn.Module, net: torch.nn.Module, n: int, cfg: TrainConfig) -> None:
    """(3) after update n = 1, 2, ...; for "jepa" the target encoder, (4) of jepa.py."""
    if cfg.objective == "jepa":
        momentum = jepa.momentum_at(n - 1, cfg.steps, cfg.momentum)
        jepa.update_target(ema, net.context, momentum)
    else:
        update_ema(ema, net, n, cfg.ema_decay)


def update_ema(ema: torch.nn.Module, net: torch.nn.Module, n: int, decay: float) -> None:
    """(3) after update n = 1, 2, ...; buffers are copied."""
    jepa.update_target(ema, net, min(decay, (1 + n) / (10 + n)))
