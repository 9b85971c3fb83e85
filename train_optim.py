"""Optimisers, learning rates, weight averaging.

(Equations and departures of the file that this one came from; keep what belongs here.)
Train a network: `python train.py --model tiny`; `torchrun --nproc-per-node 8 train.py --model s --data MAPS`.

CryoFM's priors ("tiny", "s", "l", ...) learn by flow matching:

    theta <- FairseqAdam(theta, clip(grad L, 1)),  L the flow-matching loss, flow.py (3)                 (1)
    lr(n) = lr (0.01 + 0.99 n / warmup) while n < warmup, then lr; linearly to 0 over the last `decay`   (2)
    ema   <- d ema + (1 - d) theta,  d = min(ema_decay, (1 + n) / (10 + n))                              (3)

CryoFM (arXiv:2410.08631) appendix B.1 and Table 4; (2)'s start, (3) and the laws of the training times as in
the authors' release.

CryoLVM's SCUNet learns to predict what is hidden ("jepa"; "mae" to compare), then a task from pairs of what was
observed and what is wanted: `--model sharpen --init jepa.pt`, "superres", "wedge3d"; losses (3), (5), (9) of jepa.py.
Fine-tuning: Table 4 of CryoLVM; pre-training, of which the paper says nothing, as in the public I-JEPA.

A step takes `batch` crops, in micro-batches that ranks and accumulation share out. What is in micro-batch
number m of a run, crops, noise and times, depends on (seed, m) alone. So a run that was stopped and resumed
sees what the unbroken run would have seen and ends with the same weights, bit by bit on a CPU; and two ranks
take the step that one rank takes.

Written to --out: log.csv; prior.pt, the averaged weights in half precision, for sampling.py, or jepa.pt, sharpen.pt
and so on; checkpoint.pt, for --resume; samples/. SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (SLURM) end a run after the current step, with a
checkpoint and exit code 0. --dry-run says what a run would cost, and takes one step.

Departure 1: the paper keeps the learning rate constant; "tiny" lets it fall to 0, which a run of an hour needs.
Departure 2: "tiny" gives the matrices of its blocks to Muon (Jordan et al. 2024, with AdamW's
update size), which reached in 150 steps the loss that FairseqAdam alone reached in more than 250. All else
stays with FairseqAdam.
Departure 3: fine-tuned networks are averaged by (3), too; the "tiny-" ones learn at 1e-3, falling to 0, not by plateaus, and by
the squared error alone: with alpha = 0.5 the gradient of the histograms is about ten times as long (README). CryoLVM's epochs are ours of `eval_every` steps; its fixed
windows, 24 voxels apart in training and 48 in validation, are random crops, half of them around the molecule, fixed ones in validation.
"""
import copy

import torch.utils.flop_counter

import flow
import jepa
from train_config import PRETRAINING, TrainConfig


class FairseqAdam(torch.optim.Optimizer):
    """AdamW with eps added before the bias correction: in effect eps / sqrt(1 - beta2^n) (Ott et al. 2019)."""
    def __init__(self, params, lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] += 1
            (beta1, beta2), n, lr = group["betas"], group["step"], group["lr"]
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p].update(m=torch.zeros_like(p), v=torch.zeros_like(p))
            grads = [p.grad for p in params]
            m, v = ([self.state[p][name] for p in params] for name in "mv")
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            denominator = torch._foreach_sqrt(v)
            torch._foreach_add_(denominator, group["eps"])
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            rate = lr * (1 - beta2 ** n) ** 0.5 / (1 - beta1 ** n)
            torch._foreach_addcdiv_(params, m, denominator, -rate)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps, of AdamW's update size (Jordan et al. 2024).

    torch.optim.Muon does the same but always multiplies in bfloat16: 11 s a step of "tiny" on a CPU without it.
    """
    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, mu = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - mu)
                x = p.grad.lerp(buffer, mu).to(torch.bfloat16 if flow.has_bf16(p.device) else torch.float32)
                x = x.T if x.shape[0] > x.shape[1] else x
                x = x / x.norm().clamp(min=1e-7)
                for _ in range(5):
                    gram = x @ x.T
                    x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
                x = x.T if p.shape[0] > p.shape[1] else x
                p.mul_(1 - lr * group["weight_decay"]).add_(x, alpha=-0.2 * lr * max(p.shape) ** 0.5)


def optimizers(net: torch.nn.Module, cfg: TrainConfig) -> list[torch.optim.Optimizer]:
    """FairseqAdam, after it Muon for the matrices of the blocks where asked (Departure 2); or AdamW alone."""
    if cfg.optimizer == "adamw":
        spared = lambda name, p: p.ndim == 1 or "relative_position" in name
        groups = [{"params": [p for name, p in net.named_parameters() if spared(name, p) == which], **decay}
                  for which, decay in ((False, {}), (True, {"weight_decay": 0.0}))]
        return [torch.optim.AdamW(groups, cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay)]
    inner = lambda name, p: p.ndim == 2 and not any(s in name for s in ("norm", "time", "patch"))
    matrices = [p for name, p in net.named_parameters() if cfg.optimizer == "muon" and inner(name, p)]
    taken = {id(p) for p in matrices}
    rest = [p for p in net.parameters() if id(p) not in taken]
    result = [FairseqAdam(rest, cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay)]
    if matrices:
        result.append(Muon(matrices, cfg.lr, cfg.weight_decay))
    return result


def lr_at(step: int, cfg: TrainConfig) -> float:
    """(2) for the 0-based step; in pre-training I-JEPA's cosine."""
    if cfg.objective in PRETRAINING:
        return jepa.lr_at(step, cfg.steps, cfg.warmup, cfg.lr, cfg.lr / 5)
    warm = min(1.0, 0.01 + 0.99 * step / cfg.warmup) if cfg.warmup else 1.0
    left = (cfg.steps - step) / (cfg.decay * cfg.steps) if cfg.decay else 1.0
    return cfg.lr * warm * min(1.0, left)


def averaged(net: torch.nn.Module, cfg: TrainConfig) -> torch.nn.Module:
    """`ema` at the start: a copy of the network, or of JEPA's context encoder."""
    return copy.deepcopy(net.context if cfg.objective == "jepa" else net).requires_grad_(False).eval()


def update_average(ema: torch.nn.Module, net: torch.nn.Module, n: int, cfg: TrainConfig) -> None:
    """(3), or (4) of jepa.py, after update n = 1, 2, ..."""
    if cfg.objective == "jepa":
        jepa.update_target(ema, net.context, jepa.momentum_at(n - 1, cfg.steps, cfg.momentum))
    else:
        update_ema(ema, net, n, cfg.ema_decay)


@torch.no_grad()
def update_ema(ema: torch.nn.Module, net: torch.nn.Module, n: int, decay: float) -> None:
    """(3) after update n = 1, 2, ...; buffers are copied."""
    decay = min(decay, (1 + n) / (10 + n))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
    for a, b in zip(ema.buffers(), net.buffers()):
        a.copy_(b)
