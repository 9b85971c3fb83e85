"""Train a network: `python train.py --model tiny`; `torchrun --nproc-per-node 8 train.py --model s --data MAPS`.

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
import argparse
import atexit
import contextlib
import copy
import itertools
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.utils.flop_counter
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

import checkpoint
import data
import flow
import jepa
import model_hdit
import model_scunet
from jepa import JEPAConfig
from model_hdit import HDiT, HDiTConfig
from model_scunet import SCUNet, SCUNetConfig

PRETRAINING = ("jepa", "mae")
RESTORATIONS = ("sharpen", "superres", "wedge3d")
HELD_OUT_TIMES = (0.05, 0.1, 0.2, 0.4, 0.8)              # as in the authors' release
TIME_BUCKETS = 5                                         # of the training loss in log.csv: t in 0..0.2, 0.2..0.4, ...
SAMPLES, SAMPLE_STEPS = 2, 32
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def opt(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; the defaults are CryoFM-S on procedural structures."""
    net: HDiTConfig | SCUNetConfig = HDiTConfig()
    objective: str = "flow"                                                         # or of PRETRAINING, RESTORATIONS
    predictor: JEPAConfig = JEPAConfig()                                            # of "jepa"
    data: str = opt("procedural", "folder of maps, PDB file or folder, .npz of structures, or 'procedural'")
    out: str = opt("runs/default", "folder for checkpoint.pt, prior.pt and log.csv")
    resume: bool = opt(False, "go on from OUT/checkpoint.pt")
    init: str = opt("", "start from the averaged weights of this checkpoint (of jepa.pt, mae.pt: the encoder's), with a "
                        "fresh optimiser")
    dry_run: bool = opt(False, "print size, memory, speed and days; take one step; write nothing")
    seed: int = opt(0, "of weights, data, noise and times")
    steps: int = opt(150_000, "optimiser steps")                                    # Table 4
    batch: int = opt(128, "crops per optimiser step, over all ranks and accumulation")        # Table 4
    micro_batch: int = opt(16, "crops per forward pass of one rank, at most")
    crop: int = opt(64, "voxels per side of a training crop")                       # section 4.1
    crops_per_map: int = opt(2, "crops cut from one map")                           # the release
    center_crops: bool = opt(False, "crop the centre of a map (CryoFM-L), not anywhere in the molecule")
    cubic: bool = opt(True, "turn maps by cubic splines, or else trilinearly")      # the release
    voxel_size: float = opt(1.5, "Å")                                               # section 4.1
    resolution_min: float = opt(2.5, "Å, best resolution of simulated maps")
    resolution_max: float = opt(4.0, "Å, worst resolution of simulated maps")
    mean: float = opt(0.04, "of the clipped density; network value = (density - mean) / std")  # section 4.2
    std: float = opt(0.09, "of the clipped density")                                # section 4.2
    time_law: str = opt("uniform", "of the training times: uniform or logit-normal")          # the release
    mask_at: str = opt("input", "jepa: hide cells of the map, or tokens after the encoder: input or embedding")
    momentum: float = opt(0.996, "jepa: of the target encoder, at first; it rises to 1")       # I-JEPA
    alpha: float = opt(0.5, "restorations: weight of the squared error; 1 - alpha is that of the histograms")
    bins: int = opt(64, "restorations: of the histograms")
    missing: str = opt("wedge", "wedge3d: a missing wedge, or cone, the paper's formula as printed")
    optimizer: str = opt("adam", "adam: FairseqAdam for all; muon: Muon for the matrices of the blocks; adamw: PyTorch's, "
                                 "without decay of 1-D parameters")
    lr: float = opt(1e-4, "peak learning rate")                                     # B.1
    warmup: int = opt(2000, "steps of linear warm-up from 0.01 lr")                 # B.1, the release
    decay: float = opt(0.0, "fraction of the steps, at the end, over which lr falls to 0")
    patience: int = opt(0, "evaluations without a lower held-out loss before lr falls by a tenth; 0: never")
    beta2: float = opt(0.98, "FairseqAdam; beta1 is 0.9")                           # B.1
    weight_decay: float = opt(0.01, "decoupled, on all parameters")                 # B.1
    clip: float = opt(1.0, "largest norm of the gradient")                          # the release
    ema_decay: float = opt(0.99, "of the averaged weights, the ones that are used")  # the release
    bf16: bool = opt(True, "autocast to bfloat16, where the hardware has it")      # Table 4
    activation_checkpointing: bool = opt(False, "recompute for the backward pass: less memory, a third slower")
    compile: bool = opt(False, "torch.compile the network")
    workers: int = opt(1, "processes per rank that make the data; 0: none")
    log_every: int = opt(50, "steps between log lines")
    eval_every: int = opt(500, "steps between held-out losses")
    held_out_crops: int = opt(64, "crops that the held-out losses are means of")
    save_every: int = opt(500, "steps between checkpoints")
    sample_every: int = opt(5000, "steps between samples drawn from the averaged weights, as .mrc and a picture; 0: none")
    tensorboard: bool = opt(False, "write what log.csv holds for TensorBoard too")

    def __post_init__(self):
        for name in ("steps", "batch", "micro_batch", "crops_per_map", "voxel_size", "std",
                     "log_every", "eval_every", "save_every", "held_out_crops", "bins"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: it must be positive")
        if self.crop < 1 or self.crop % self.net.multiple:
            raise ValueError(f"--crop {self.crop}: this network wants a multiple of {self.net.multiple}")
        if not 0 < self.resolution_min <= self.resolution_max:
            raise ValueError(f"--resolution-min {self.resolution_min:g} must be positive and at most "
                             f"--resolution-max {self.resolution_max:g}")
        if not 0 <= self.decay <= 1 or min(self.seed, self.warmup, self.workers, self.sample_every, self.patience) < 0:
            raise ValueError("--decay must be in 0..1, and --seed, --warmup, --workers, --sample-every and --patience at least 0")
        if not (0 <= self.alpha <= 1 and 0 <= self.momentum <= 1):
            raise ValueError(f"--alpha {self.alpha:g} and --momentum {self.momentum:g} must be in 0..1")
        for name, choices in (("time_law", ("uniform", "logit-normal")), ("optimizer", ("adam", "muon", "adamw")),
                              ("mask_at", ("input", "embedding")), ("missing", ("wedge", "cone"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: choose {' or '.join(choices)}")
        if self.objective != "flow" and (self.sample_every or self.activation_checkpointing):
            raise ValueError(f"--sample-every {self.sample_every} and --activation-checkpointing are for CryoFM's priors")


S = TrainConfig()                                                                   # CryoFM-S
PRESETS = {
    # The shipped prior; trains on a CPU. Mean and std are those of simulated maps.
    "tiny": TrainConfig(net=model_hdit.PRESETS["tiny"], steps=6000, batch=16, crop=32, crops_per_map=4, cubic=False,
                        mean=0.05, std=0.13, optimizer="muon", lr=2e-3, warmup=50, decay=0.5, ema_decay=0.999),
    "s": S,
    # CryoFM-L: Table 4, section 4.1; the resolution of simulated maps is that of its grid.
    "l": replace(S, net=model_hdit.PRESETS["l"], steps=300_000, micro_batch=4, crop=128, crops_per_map=1,
                 center_crops=True, cubic=False, voxel_size=3.0, resolution_min=6.0, resolution_max=6.0,
                 time_law="logit-normal"),
    **{name: replace(S, net=model_hdit.PRESETS[name])                               # Table 7
       for name in ("p2-d1", "p8-d1", "p4-d0", "p4-d2")},
}
# CryoLVM, Table 4: crops of 48^3 voxels of 1 Å on 0..1. How long is not stated.
LVM = TrainConfig(net=model_scunet.PRESETS["paper"], objective="sharpen", optimizer="adamw", steps=100_000, batch=32, micro_batch=32,
                  crop=48, mean=0.0, std=1.0, voxel_size=1.0, resolution_min=3.0, resolution_max=6.0, lr=3e-5, warmup=0,
                  weight_decay=1e-3, beta2=0.999, patience=5, ema_decay=0.999, held_out_crops=32, sample_every=0)
PRETRAINING_LVM = replace(LVM, resolution_min=2.5, resolution_max=4.0, patience=0, lr=1e-3 * 32 / 2048, warmup=2000)       # I-JEPA
PRESETS |= {
    "jepa": replace(PRETRAINING_LVM, objective="jepa"),
    "mae": replace(PRETRAINING_LVM, objective="mae"),
    "sharpen": LVM,
    "superres": replace(LVM, objective="superres", resolution_min=4.0),                   # 4.3: from 4 to 6 Å
    "wedge3d": replace(LVM, objective="wedge3d", voxel_size=4.0, resolution_min=8.0, resolution_max=15.0),
}
# The shipped ones: a small network, a quarter of an hour to 80 minutes of one CPU core each.
TINY = dict(net=model_scunet.PRESETS["tiny"], predictor=jepa.PRESETS["tiny"], alpha=1.0, batch=4, crop=36, lr=1e-3, patience=0,
            decay=0.5, ema_decay=0.99, micro_batch=16, workers=0, log_every=20, save_every=100, eval_every=100)
MASKED = TINY | dict(steps=500, batch=16, crop=24, crops_per_map=4, warmup=20)
for name, settings in {"jepa": MASKED | dict(lr=3e-4, momentum=0.998), "mae": MASKED,
                       "sharpen": TINY | dict(steps=1900, resolution_min=2.5), "superres": TINY | dict(steps=600),
                       "wedge3d": TINY | dict(steps=700, batch=8, crop=24, crops_per_map=4)}.items():
    PRESETS[f"tiny-{name}"] = replace(PRESETS[name], **settings)


def parse(argv=None) -> TrainConfig:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--model", choices=PRESETS, default="tiny")
    for f in fields(TrainConfig):
        if f.metadata:                                   # every opt() field is a flag: no second list to keep
            kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
            cli.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"], **kind)
    typed = {k: v for k, v in vars(cli.parse_args(argv)).items() if v is not None}
    return replace(PRESETS[typed.pop("model")], **typed)     # the preset first, then what the user typed


# ---- Optimiser ------------------------------------------------------------------------------------------------

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


# ---- Data -----------------------------------------------------------------------------------------------------

def datasets(cfg: TrainConfig, say=print):
    """(training, held-out) datasets of --data; items are (crops, 1, D, D, D), or (crops, 2, D, D, D) pairs.

    Raises OSError or ValueError if there is nothing to train on.
    """
    common = dict(crop=cfg.crop, crops=cfg.crops_per_map, mean=cfg.mean, std=cfg.std)
    simulated = dict(common, box=cfg.crop if cfg.center_crops else 2 * cfg.crop, voxel_size=cfg.voxel_size,
                     resolution=(cfg.resolution_min, cfg.resolution_max))
    simulate = lambda part, seed: data.SimulatedCrops(part, seed=seed, **simulated)
    if cfg.objective != "flow":                          # to pre-train, deposited maps: the first of a pair
        task = cfg.objective if cfg.objective in RESTORATIONS else "sharpen"
        simulate = lambda part, seed: data.SimulatedPairs(
            part, task=task, crop=cfg.crop, crops=cfg.crops_per_map, box=2 * cfg.crop, voxel_size=cfg.voxel_size,
            resolution=(cfg.resolution_min, cfg.resolution_max), missing=cfg.missing, seed=seed)
    if cfg.data == "procedural":
        return tuple(simulate(data.ProceduralChains(seed), seed) for seed in (cfg.seed, cfg.seed + 1))
    if cfg.objective in RESTORATIONS and (Path(cfg.data) / data.PAIRS).exists():
        entries = data.read_pairs(cfg.data, cfg.objective, cfg.voxel_size)
        make = lambda part, seed: data.MapPairs(part, crop=cfg.crop, crops=cfg.crops_per_map, seed=seed)
    elif cfg.objective in RESTORATIONS and data.list_files(cfg.data, data.MAP_SUFFIXES):
        raise ValueError(f"{cfg.data}: maps without a {data.PAIRS} that names the model and the resolution of each (README)")
    elif data.list_files(cfg.data, data.MAP_SUFFIXES) or (Path(cfg.data) / data.SETTINGS).exists():    # before models
        entries, refused = data.read_volumes(cfg.data, cfg.voxel_size, cfg.crop if cfg.center_crops else None)
        for line in refused:
            say(f"skipped {line}")
        say(f"{cfg.data}: {len(refused)} maps skipped, {len(entries)} read at {cfg.voxel_size:g} Å per voxel")
        if entries and len(refused) > 0.01 * (len(refused) + len(entries)):
            raise ValueError(f"{cfg.data}: {len(refused)} of {len(refused) + len(entries)} maps cannot be used, more than "
                             f"1 %; repair or remove them, the first: {refused[0]}")
        make = lambda part, seed: data.MapCrops(part, center=cfg.center_crops, cubic=cfg.cubic, seed=seed, **common)
    else:
        entries = data.read_structures(cfg.data)
        make = simulate
    if not entries:
        raise ValueError(f"{cfg.data}: nothing to train on; give a folder of maps ({', '.join(data.SUFFIXES)}), "
                         "PDB or mmCIF files, an archive of structures (.npz), or 'procedural'")
    train, held_out = split(entries)
    say(f"{cfg.data}: {len(train)} to train on, {len(held_out)} held out"
        + (", the same one in other orientations" if len(train) == len(entries) else ""))
    return make(train, cfg.seed), make(held_out, cfg.seed + 1)


def split(entries: list) -> tuple[list, list]:
    """(training, held-out) entries: one label in twenty, by its hash, is never trained on.

    Among few labels that may be none, or all: then it is one of them. A single label is in both parts.
    """
    labels = {entry.label for entry in entries}
    held_out = {label for label in labels if data.held_out(label)}
    if len(held_out) in (0, len(labels)):
        held_out = {min(labels)}
    train = [entry for entry in entries if entry.label not in held_out]
    return train or entries, [entry for entry in entries if entry.label in held_out]


def split_batch(cfg: TrainConfig, world: int) -> tuple[int, int]:
    """(micro-batches of a rank per step, crops of each). Raises ValueError if the batch is not divisible."""
    share, rest = divmod(cfg.batch, world)
    sizes = range(cfg.crops_per_map, min(cfg.micro_batch, share) + 1, cfg.crops_per_map)
    micro = max((n for n in sizes if share % n == 0), default=0)
    if rest or not micro:
        raise ValueError(f"--batch {cfg.batch} must be a multiple of {world} rank(s) times a multiple of "
                         f"--crops-per-map {cfg.crops_per_map} that is at most --micro-batch {cfg.micro_batch}")
    return share // micro, micro


def ignore_signals(worker: int) -> None:
    """Ctrl-C reaches all processes; those that make the data go on until the loop has ended."""
    for name in STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)


def end_workers() -> None:
    """At exit Python would send SIGTERM to those that make the data, who ignore it, and wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)        # torch's handler calls their end an error
    for worker in multiprocessing.active_children():
        worker.kill()


# ---- Objectives -----------------------------------------------------------------------------------------------

def build(cfg: TrainConfig) -> torch.nn.Module:
    """What the optimiser trains. Its average `ema` is of the same kind, but for "jepa" the target encoder."""
    if cfg.objective == "flow":
        return HDiT(cfg.net, cfg.activation_checkpointing)
    net = SCUNet(cfg.net)
    if cfg.objective != "jepa":
        return net
    return jepa.JEPA(net.encoder, cfg.net.feature_width, token_grid(cfg), replace(cfg.predictor, mask_at=cfg.mask_at))


def token_grid(cfg: TrainConfig) -> tuple[int, int, int]:
    return (cfg.crop // 2 ** cfg.net.levels,) * 3


def losses(net, ema, x: Tensor, cfg: TrainConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Losses (n,) of crops x (micro, C, D, D, D), of each crop or of all, and the columns of log.csv they count in (n,)."""
    if cfg.objective == "flow":
        t = flow.sample_t(len(x), cfg.time_law, generator, x.device)
        bucket = (t * TIME_BUCKETS).long().clamp(max=TIME_BUCKETS - 1)
        return flow.loss(net, x, t=t, generator=generator, per_sample=True), bucket
    if cfg.objective in PRETRAINING:
        hidden = jepa.block_masks(len(x), token_grid(cfg), generator)
        loss = (jepa.jepa_loss(net, ema, x[:, :1], hidden) if cfg.objective == "jepa" else
                jepa.mae_loss(net, x[:, :1], hidden))
    else:
        loss = jepa.composite_loss(net(x[:, :1]), x[:, 1:], cfg.alpha, cfg.bins)
    return loss[None], torch.zeros(1, dtype=torch.long, device=x.device)


def held_out_columns(cfg: TrainConfig) -> list[str]:
    if cfg.objective == "flow":
        return [f"held_out_t{t}" for t in HELD_OUT_TIMES]
    return ["held_out", *{"jepa": ("constant", "std", "rank", "maps"), "mae": ()}.get(cfg.objective, ("mse", "js"))]


@torch.no_grad()
def held_out_losses(net, ema, x: Tensor, cfg: TrainConfig) -> list[float]:
    """`held_out_columns` of fixed held-out crops x with fixed times, noise and masks: of the average `ema`."""
    g = torch.Generator(x.device).manual_seed(0)
    mean = lambda of: float(torch.stack([of(part) for part in x.split(cfg.micro_batch)]).mean())
    if cfg.objective == "mae":
        return [mean(lambda part: losses(ema, None, part, cfg, g)[0][0])]
    if cfg.objective == "jepa":                          # by net's predictor, and what tells a collapse: jepa.collapse
        watch = jepa.collapse(torch.cat([ema(part[:, :1]) for part in x.split(cfg.micro_batch)]))
        return [mean(lambda part: losses(net, ema, part, cfg, g)[0][0]), *(watch[name] for name in held_out_columns(cfg)[1:])]
    if cfg.objective in RESTORATIONS:
        restored = [ema(part[:, :1]) for part in x.split(cfg.micro_batch)]
        mse, js = (sum(float(measure(a, b[:, 1:])) * len(a) for a, b in zip(restored, x.split(cfg.micro_batch))) / len(x)
                   for measure in (torch.nn.functional.mse_loss, lambda a, b: jepa.hist_kl(a, b, cfg.bins)))
        return [cfg.alpha * mse + (1 - cfg.alpha) * js, mse, js]
    values = []
    for t in HELD_OUT_TIMES:
        g = torch.Generator().manual_seed(0)
        parts = []
        for part in x.split(cfg.micro_batch):
            x_1 = torch.randn(part.shape, generator=g).to(x.device)
            with flow.autocast(x.device, cfg.bf16):
                times = torch.full((len(part),), t, device=x.device)
                parts.append(flow.loss(ema, part, t=times, x_1=x_1, per_sample=True))
        values.append(float(torch.cat(parts).mean()))
    return values


@torch.no_grad()
def write_samples(net, cfg: TrainConfig, folder: Path, step: int, device: torch.device) -> None:
    """SAMPLES maps from the same noise each time, as .mrc (density on 0..1), and a picture of their middle slices."""
    x_1 = torch.randn(SAMPLES, 1, *[cfg.crop] * 3, generator=torch.Generator().manual_seed(0)).to(device)
    with flow.autocast(device, cfg.bf16):
        x_0 = torch.cat([flow.sample(net, x, SAMPLE_STEPS) for x in x_1.split(cfg.micro_batch)])
    density = (x_0[:, 0] * cfg.std + cfg.mean).float().cpu()
    folder.mkdir(exist_ok=True)
    for i, x in enumerate(density):
        data.write_map(folder / f"step_{step:06d}_{i}.mrc", data.Map(x, cfg.voxel_size), overwrite=True)
    try:
        from matplotlib.image import imsave
    except ImportError:                                  # the maps are there all the same
        return
    slices = torch.cat([torch.cat((x[len(x) // 2], x[:, len(x) // 2], x[:, :, len(x) // 2])) for x in density], 1)
    imsave(folder / f"step_{step:06d}.png", slices.numpy(), vmin=0, vmax=1, cmap="gray")


# ---- What a run costs -----------------------------------------------------------------------------------------

GPUS = {"A100": (312e12, 300e9), "H200": (989e12, 450e9)}         # dense bf16 FLOP/s; NVLink bytes/s, one direction
UTILISATION, INFINIBAND = 0.4, 50e9                               # assumed; bytes/s per GPU, one 400 Gbit/s port each


def multiply_adds(net: HDiTConfig, box: int) -> int:
    """Of one forward pass on box^3 voxels; norms, activations and the time features (under 0.1 %) left out."""
    side = box // net.patch_size
    total = 2 * side ** 3 * net.patch_size ** 3 * net.widths[0]                # patches in and out
    for level, (depth, width) in enumerate(zip(net.depths, net.widths)):
        inner = level == len(net.depths) - 1
        keys = side ** 3 if inner else min(net.kernel_size, side) ** 3
        block = width ** 2 * (4 + 3 * net.ff_mult) + 2 * keys * width          # of one token; (3), (5) of model_hdit
        total += (1 if inner else 2) * depth * side ** 3 * block               # outer levels run down and up
        if not inner:
            side //= 2
            total += 2 * side ** 3 * 8 * width * net.widths[level + 1]         # merge and split
    return total


def step_seconds(gpus: int, peak: float, nvlink: float, cfg: TrainConfig, flop: float, parameters: int) -> float:
    """One optimiser step by arithmetic: the larger of what overlaps, backward pass and float32 all-reduce, and the rest.

    A ring all-reduce over n takes each GPU 2 (n - 1) / n of the bytes; between nodes of 8, each GPU sends its eighth.
    """
    compute = cfg.batch * flop / (gpus * UTILISATION * peak)
    inside, nodes = min(gpus, 8), -(-gpus // 8)
    ring = lambda n, size, rate: 2 * (n - 1) / n * size / rate
    reduce = ring(inside, 4 * parameters, nvlink) + ring(nodes, 4 * parameters / inside, INFINIBAND)
    last = compute / max(1, cfg.batch / gpus / cfg.micro_batch)                # reduced once, in the last micro-batch
    return compute - last * 2 / 3 + max(last * 2 / 3, reduce)


def dry_run(cfg: TrainConfig, say=print) -> None:
    """Parameters, FLOP, memory, speed and days of a run; one step is taken, of one crop if on a CPU."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(cfg.seed)
    net = build(cfg).to(device)
    ema, opts = averaged(net, cfg), optimizers(net, cfg)
    parameters = sum(p.numel() for p in net.parameters())
    train_set, _ = datasets(cfg, say)
    count = split_batch(cfg, 1)[1] if cuda else 1
    x_0 = torch.cat([train_set[i] for i in range(-(-count // cfg.crops_per_map))])[:count].to(device)
    step = lambda x: losses(net, ema, x, cfg, torch.Generator(device).manual_seed(cfg.seed))[0].mean()
    if cfg.objective == "flow":                          # torch cannot look into na3d
        forward = 2 * multiply_adds(cfg.net, cfg.crop)
    else:
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            step(x_0[:1])
        forward = counter.get_total_flops()
    flop = forward * (4 if cfg.activation_checkpointing else 3)                # a backward pass counts as two
    say(f"{parameters:,} parameters; a map of {cfg.crop}^3: {forward / 1e9:,.0f} GFLOP forward, {flop / 1e12:.2f} TFLOP "
        f"forward and backward")
    saved = {}

    def weigh(tensor):                                   # what autograd keeps for the backward pass, each storage once
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    for attempt in range(2 if cuda else 1):              # a GPU's first step is no measure
        since = time.perf_counter()
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor), flow.autocast(device, cfg.bf16):
            loss = step(x_0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(ema, net, 1, cfg)
        value = float(loss.detach())                     # waits for the GPU
        seconds = time.perf_counter() - since
    state = 20 * parameters / 2 ** 30                    # weights, gradient, average, two moments: 4 bytes each
    kept = sum(size for address, size in saved.items() if address not in own) / count / 2 ** 30
    micro = split_batch(cfg, 1)[1]
    say(f"memory: {state:.1f} GiB for weights, gradient, average and moments, {kept:.2f} GiB for the backward pass of each "
        f"map as run here: {state + micro * kept:.0f} GiB with --micro-batch {micro}, before what is temporary")
    say(f"one step of {count} crop(s) on {device}{'' if cuda else ', where a micro-batch of 1 stands for all'}: "
        f"loss {value:.4f}, {seconds:.2f} s, peak {peak_memory(cuda):.1f} GiB")
    alone = seconds / count * cfg.batch
    say(f"so a step of {cfg.batch} takes {alone:,.1f} s here, {cfg.steps:,} steps {alone * cfg.steps / 86400:,.1f} days "
        f"({flop * count / seconds / 1e12:.3g} TFLOP/s)")
    if cfg.objective != "flow":                          # so small a network is far from any GPU's peak
        return
    say(f"arithmetic, not measured: {UTILISATION:.0%} of the bf16 peak, float32 all-reduce over NVLink and 400 Gbit/s ports")
    for name, (peak, nvlink) in GPUS.items():
        for gpus in (1, 8, 64, 512):
            if gpus <= cfg.batch // cfg.crops_per_map:
                seconds = step_seconds(gpus, peak, nvlink, cfg, flop, parameters)
                say(f"{gpus:5d} x {name}  {1 / seconds:6.2f} steps/s  {cfg.steps * seconds / 86400:7.2f} days")


# ---- Resume, log ----------------------------------------------------------------------------------------------

def read_training(path: Path, cfg: TrainConfig, say=print) -> dict:
    """The checkpoint to go on from. Raises OSError if there is none, ValueError if it does not fit."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no checkpoint to resume from; leave out --resume to start a run")
    saved = checkpoint.read(path)
    if not saved.get("training"):
        raise ValueError(f"{path}: holds no training state; --resume wants the checkpoint.pt of a run")
    flags = saved["training"]["flags"]
    if any(flags.get(name, "flow") != asdict(cfg)[name] for name in ("net", "objective", "optimizer")):
        raise ValueError(f"{path}: another network, objective or optimiser; give the --model and --optimizer it began with")
    say(f"resuming {path} after step {saved['training']['step']}")
    for name, now in asdict(cfg).items():
        if flags.get(name, now) != now and name not in ("out", "resume", "init"):
            say(f"  changed: --{name.replace('_', '-')} {flags[name]} -> {now}")
    return saved


def log_columns(cfg: TrainConfig) -> list[str]:
    per_time = [f"loss_t{i / TIME_BUCKETS:g}-{(i + 1) / TIME_BUCKETS:g}" for i in range(TIME_BUCKETS)]
    return ["step", "loss", "grad_norm", "lr", "maps_per_s", *held_out_columns(cfg), *(per_time if cfg.objective == "flow" else ())]


def start_from(net: torch.nn.Module, cfg: TrainConfig, say=print) -> None:
    """The averaged weights of --init; of a pre-trained network another objective takes the encoder.

    Raises OSError without the file, ValueError if its network is another, or was fine-tuned for another task.
    """
    prior = checkpoint.load(cfg.init, kind="hdit" if cfg.objective == "flow" else "scunet")
    if prior.net.config != cfg.net:
        raise ValueError(f"{cfg.init}: another network, {prior.net.config}; give the --model it was trained as")
    if cfg.objective == "flow" or prior.task == cfg.objective != "jepa":
        say(f"starting from {cfg.init}")
        net.load_state_dict(prior.net.state_dict())
    elif prior.task in PRETRAINING:
        say(f"starting from the encoder of {cfg.init}")
        encoder = net.context.encoder if cfg.objective == "jepa" else net.encoder
        encoder.load_state_dict(prior.net.encoder.state_dict())
    else:
        raise ValueError(f"{cfg.init}: fine-tuned for {prior.task}, not for {cfg.objective}; give a pre-trained network")
    for name, was, now in (("voxel_size", prior.voxel_size, cfg.voxel_size), ("crop", prior.box, cfg.crop),
                           ("mean", prior.mean, cfg.mean), ("std", prior.std, cfg.std)):
        if was != now:
            say(f"  changed: --{name.replace('_', '-')} {was:g} -> {now:g}")


def open_log(path: Path, columns: list[str], start: int):
    """log.csv, to append to; a run resumed after step `start` writes the later rows again, so they are cut."""
    rows = [",".join(columns)]
    if start and path.exists():
        old = path.read_text().splitlines()[1:]
        rows += [row for row in old if row[:1].isdigit() and int(row.split(",")[0]) <= start]
    path.write_text("\n".join(rows) + "\n")
    return open(path, "a")


# ---- The run --------------------------------------------------------------------------------------------------

def main(argv=None) -> None:
    cfg = parse(argv)
    env = lambda name, alone: int(os.environ.get(name, alone))         # torchrun sets these; alone without it
    rank, local_rank, world = env("RANK", 0), env("LOCAL_RANK", 0), env("WORLD_SIZE", 1)
    say = (lambda *words: print(*words, flush=True)) if rank == 0 else (lambda *words: None)
    accumulate, micro = split_batch(cfg, world)
    if cfg.dry_run:
        dry_run(cfg, say)
        return
    out = Path(cfg.out)
    if not cfg.resume and (out / "checkpoint.pt").exists():
        raise FileExistsError(f"{out / 'checkpoint.pt'}: a run is there; --resume it, or give another --out")
    saved = read_training(out / "checkpoint.pt", cfg, say) if cfg.resume else None
    start = saved["training"]["step"] if saved else 0
    if start >= cfg.steps:
        say(f"nothing to do: step {start} of {cfg.steps}; give more --steps to go on")
        return
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:                                        # a failure stops the run; it never becomes N lone runs
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")

    torch.manual_seed(cfg.seed)
    net = build(cfg).to(device)
    if cfg.init and not saved:
        start_from(net, cfg, say)
    opts, ema = optimizers(net, cfg), averaged(net, cfg)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opts[0], factor=0.9, patience=cfg.patience) if cfg.patience else None
    if saved:
        ema.load_state_dict(saved["training"].get("target", saved["weights"]))
        net.load_state_dict(saved["training"]["net"])
        if plateau and saved["training"]["plateau"]:
            plateau.load_state_dict(saved["training"]["plateau"])
        for optimizer, state in zip(opts, saved["training"]["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        del saved
    # `net` is saved, `model` is called, `ema` is evaluated: no prefixed keys on disk. Buffers never change.
    warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)         # torch 2.11 does not know its new name
    ddp = DDP(net, device_ids=[local_rank] if cuda else None, broadcast_buffers=False,
              gradient_as_bucket_view=True) if world > 1 else net
    model = torch.compile(ddp) if cfg.compile else ddp

    train_set, held_out_set = datasets(cfg, say)
    late = cuda and isinstance(train_set, data.MapCrops)                       # the GPU turns the maps
    if late:
        train_set.finished = False
    m = lambda step, i: (step * accumulate + i) * world + rank                 # the number of a micro-batch
    maps = micro // cfg.crops_per_map                                          # items per micro-batch
    items = (m(step, i) * maps + j
             for step in range(start, cfg.steps) for i in range(accumulate) for j in range(maps))
    atexit.register(end_workers)
    loader = iter(torch.utils.data.DataLoader(
        train_set, batch_size=maps, sampler=items, num_workers=cfg.workers, pin_memory=cuda,
        prefetch_factor=8 if cfg.workers else None, worker_init_fn=ignore_signals))

    whole = ema
    if cfg.objective == "jepa":                          # its encoder in a network, whose decoder nothing has taught yet
        whole = SCUNet(cfg.net)
        whole.encoder = ema.encoder

    def save(step):
        shared = dict(voxel_size=cfg.voxel_size, box=cfg.crop, mean=cfg.mean, std=cfg.std)
        training = dict(net=net.state_dict(), optimizers=[optimizer.state_dict() for optimizer in opts], step=step,
                        plateau=plateau and plateau.state_dict(), flags=asdict(cfg))
        name = "prior.pt"
        if cfg.objective != "flow":
            shared["task"], name = cfg.objective, f"{cfg.objective}.pt"
        if cfg.objective == "jepa":
            training["target"] = ema.state_dict()
        checkpoint.save(out / "checkpoint.pt", whole, **shared, training=training)
        checkpoint.save(out / name, whole, **shared, half=True)

    say(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {device}, "
        f"{world} rank(s) x {accumulate} x {micro} crops of {cfg.crop}^3, steps {start} to {cfg.steps}, "
        f"torch {torch.__version__}")
    if rank == 0:                                        # measures and writes; all ranks train
        count = math.ceil(cfg.held_out_crops / cfg.crops_per_map)
        held_out_crops = torch.cat([held_out_set[i] for i in range(count)]).to(device)
        out.mkdir(parents=True, exist_ok=True)
        log = open_log(out / "log.csv", log_columns(cfg), start)
        board = tensorboard(out, start) if cfg.tensorboard else None
    stop, parent = [], os.getppid()
    orphaned = lambda: "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent      # torchrun has died
    for name in STOP_SIGNALS:
        signal.signal(name, lambda signum, _: stop.append(signum))             # finish the step, save, leave

    def agree(x, how=dist.ReduceOp.SUM):                 # of all ranks
        if world > 1:
            dist.all_reduce(x, how)
        return x

    new_tally = lambda: torch.zeros(2, TIME_BUCKETS, dtype=torch.float64, device=device)     # sum and count of losses
    since, seen, tally, norms = time.perf_counter(), 0, new_tally(), []
    for step in range(start, cfg.steps):
        for group in itertools.chain(*(optimizer.param_groups for optimizer in opts)):
            if not plateau:
                group["lr"] = lr_at(step, cfg)                                 # (2)
            if cfg.objective in PRETRAINING and group["weight_decay"]:
                group["weight_decay"] = jepa.weight_decay_at(step, cfg.steps)
        lr = opts[0].param_groups[0]["lr"]
        finite = []
        for i in range(accumulate):
            x_0 = next(loader)
            if late:
                x_0 = train_set.finish(*(part.to(device, non_blocking=True) for part in x_0))
            x_0 = x_0.flatten(0, 1).to(device, non_blocking=True)              # (micro, 1, D, D, D)
            seed = (cfg.seed * 1_000_003 + m(step, i)) * 268_636_163 % 2 ** 63      # none that crops use
            g = torch.Generator(device).manual_seed(seed)
            quiet = ddp.no_sync() if world > 1 and i < accumulate - 1 else contextlib.nullcontext()
            with quiet:                                  # gradients cross ranks once per step
                with flow.autocast(device, cfg.bf16):
                    loss, bucket = losses(model, ema, x_0, cfg, g)
                (loss.mean() / accumulate).backward()
            loss = loss.detach().double()                # no .item() here: it would wait for the GPU
            tally.index_add_(1, bucket, torch.stack((loss, torch.ones_like(loss))))
            finite.append(loss.isfinite().all())
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip))
        finite.append(norms[-1].isfinite())
        # A signal to one rank, or a loss of one rank that is not finite, stops all of them at this step.
        stopping, failing = agree(torch.tensor([len(stop) + orphaned(), not torch.stack(finite).all()])).tolist()
        if failing:
            bad = min((m(step, i) for i in range(accumulate) if not finite[i]), default=data.ENDLESS)
            bad = int(agree(torch.tensor(bad), dist.ReduceOp.MIN))
            if rank == 0:
                if (out / "checkpoint.pt").exists():     # this step's weights may have gone astray already
                    shutil.copyfile(out / "checkpoint.pt", out / "checkpoint_before.pt")
                save(step)                               # the weights before this step
            agree(torch.zeros(1))                        # wait for it: the first rank to fail ends the others
            where = ("each loss is finite, the gradient is not" if bad == data.ENDLESS else
                     f"the loss is not finite in micro-batch {bad}, items {bad * maps} to {bad * maps + maps - 1} of the "
                     f"data, on rank {bad % world}")
            raise ValueError(f"step {step + 1}: {where}; saved as it was after step {step}, --resume it with a lower --lr "
                             "(should it fail again: checkpoint_before.pt is what was saved before)")
        for optimizer in opts:
            optimizer.step()                                                   # (1)
            optimizer.zero_grad(set_to_none=True)
        update_average(ema, net, step + 1, cfg)                                # (3)
        seen += 1

        last = step + 1 == cfg.steps or bool(stopping)
        saving = last or (step + 1) % cfg.save_every == 0
        evaluating = last or (step + 1) % cfg.eval_every == 0
        if saving or evaluating or (step + 1) % cfg.log_every == 0:
            agree(tally)
            held = [math.nan] * len(held_out_columns(cfg))
            if evaluating and rank == 0:
                held = held_out_losses(net, ema, held_out_crops, cfg)
            if plateau and (step + 1) % cfg.eval_every == 0:        # not where a signal asked; all ranks follow the first one's loss
                plateau.step(float(agree(torch.tensor(held[0] if rank == 0 else 0.0, dtype=torch.float64))))
            if rank == 0:
                (total, per_t), count = (tally[0].sum(), tally[0]), tally[1]
                loss, norm = float(total / count.sum()), float(torch.stack(norms).mean())
                per_t = (per_t / count).tolist() if cfg.objective == "flow" else []        # nan where no time fell
                rate = seen / (time.perf_counter() - since)
                eta = timedelta(seconds=round((cfg.steps - step - 1) / rate))
                maps_per_s = rate * cfg.batch
                say(f"step {step + 1:6d}  loss {loss:.4f}  |g| {norm:.2f}  lr {lr:.1e}  "
                    f"{rate:.2f} steps/s  {maps_per_s:.1f} maps/s  {peak_memory(cuda):.1f} GiB  ETA {eta}"
                    + "".join(f"  {name.removeprefix('held_out_')} {v:.4f}" for name, v in zip(held_out_columns(cfg), held) if evaluating))
                row = dict(zip(log_columns(cfg)[1:], (loss, norm, lr, maps_per_s, *held, *per_t), strict=True))
                try:
                    print(step + 1, *("" if v != v else f"{v:.6g}" for v in row.values()), sep=",", file=log, flush=True)
                except OSError as error:                 # a full disk
                    raise OSError(f"{out / 'log.csv'}: {error.strerror}") from None
                for name, v in row.items():
                    if board and v == v:
                        board.add_scalar(name, v, step + 1)
                if saving:
                    save(step + 1)
            since, seen, tally, norms = time.perf_counter(), 0, new_tally(), []
        if rank == 0 and cfg.sample_every and (step + 1) % cfg.sample_every == 0:
            write_samples(ema, cfg, out / "samples", step + 1, device)
        if stopping:
            say(f"stopped by a signal after step {step + 1}; go on with --resume")
            break
    if world > 1:
        dist.destroy_process_group()


def tensorboard(out: Path, start: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard: pip install tensorboard, or leave it out; log.csv holds the same") from None
    return SummaryWriter(str(out), purge_step=start + 1)


def peak_memory(cuda: bool) -> float:
    """GiB, of this process: on the GPU, or resident."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024       # bytes, or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as error:
        sys.exit(f"train.py: {error}\nless memory: a smaller --micro-batch, --activation-checkpointing")
    except (ValueError, OSError) as error:               # of an error in a data worker the last line says what it was
        sys.exit(f"train.py: {str(error).strip().splitlines()[-1]}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped before the first step")
