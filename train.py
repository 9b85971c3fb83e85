"""Train a prior: `python train.py --model tiny`, or `torchrun --nproc-per-node 8 train.py --model s --data MAPS`.

    theta <- FairseqAdam(theta, clip(grad L, 1)),   L the flow-matching loss, flow.py (3)                 (1)
    lr(n)  = lr * (0.01 + 0.99 n / warmup) while n < warmup, then lr, then linearly to 0 over the last `decay`  (2)
    ema   <- d ema + (1 - d) theta,                 d = min(ema_decay, (1 + n) / (10 + n))                (3)

CryoFM (arXiv:2410.08631) appendix B.1, Table 4. A batch is a function of (seed, step, rank), so a run that was stopped and
resumed sees the data, noise and times the unbroken run would have seen, and ends with the same weights.

Departure 1: the paper keeps the learning rate constant; "tiny" lets it fall to 0, which a run of an hour needs.
Departure 2: "tiny" gives the matrices of its blocks to Muon (Jordan et al. 2024; torch.optim.Muon with AdamW's update size),
which reached in 150 steps the loss that FairseqAdam alone reached in more than 250. All else stays with FairseqAdam.
"""
import argparse
import contextlib
import copy
import csv
import os
import resource
import signal
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

import checkpoint
import data
import flow
import model_hdit
from model_hdit import HDiT, HDiTConfig

HELD_OUT_TIMES = (0.05, 0.1, 0.2, 0.4, 0.8)              # as in the authors' release


def opt(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    net: HDiTConfig = HDiTConfig()
    data: str = opt("procedural", "folder of maps, PDB file or folder, archive of structures (.npz), or 'procedural'")
    out: str = opt("runs/default", "folder for checkpoint.pt, prior.pt and log.csv")
    resume: bool = opt(False, "go on from OUT/checkpoint.pt")
    seed: int = opt(0, "of weights, data, noise and times")
    steps: int = opt(150_000, "optimiser steps")
    batch: int = opt(128, "crops per optimiser step, over all ranks and accumulation")
    micro_batch: int = opt(16, "crops per forward pass of one rank")
    crop: int = opt(64, "voxels per side of a training crop")
    crops_per_map: int = opt(2, "crops cut from one map")
    voxel_size: float = opt(1.5, "Å")
    resolution_min: float = opt(2.5, "Å, best resolution of simulated maps")
    resolution_max: float = opt(4.0, "Å, worst resolution of simulated maps")
    mean: float = opt(0.04, "of the clipped density; network value = (density - mean) / std")
    std: float = opt(0.09, "of the clipped density")
    time_law: str = opt("uniform", "of the training times: uniform or logit-normal")
    optimizer: str = opt("adam", "adam: FairseqAdam for all; muon: Muon for the matrices of the blocks")
    lr: float = opt(1e-4, "peak learning rate")
    warmup: int = opt(2000, "steps of linear warm-up from 0.01 lr")
    decay: float = opt(0.0, "fraction of the steps, at the end, over which lr falls to 0")
    beta2: float = opt(0.98, "FairseqAdam; beta1 is 0.9")
    weight_decay: float = opt(0.01, "decoupled, on all parameters")
    clip: float = opt(1.0, "largest norm of the gradient")
    ema_decay: float = opt(0.99, "of the averaged weights, the ones that are used")
    bf16: bool = opt(True, "autocast to bfloat16")
    activation_checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory, a third more time")
    compile: bool = opt(False, "torch.compile the network")
    workers: int = opt(1, "processes that make the data; 0: none")
    log_every: int = opt(50, "steps between log lines")
    eval_every: int = opt(500, "steps between held-out losses")
    save_every: int = opt(500, "steps between checkpoints")

    def __post_init__(self):
        if self.crop % self.net.multiple:
            raise ValueError(f"--crop {self.crop}: this network wants a multiple of {self.net.multiple}")
        if self.steps < 1 or self.batch < 1 or self.micro_batch < 1 or self.crops_per_map < 1:
            raise ValueError("--steps, --batch, --micro-batch and --crops-per-map must be at least 1")
        if self.time_law not in ("uniform", "logit-normal"):
            raise ValueError(f"--time-law {self.time_law}: choose uniform or logit-normal")
        if self.optimizer not in ("adam", "muon"):
            raise ValueError(f"--optimizer {self.optimizer}: choose adam or muon")


TINY = dict(steps=6000, batch=16, micro_batch=16, crop=32, crops_per_map=4, mean=0.05, std=0.13, optimizer="muon", lr=2e-3,
            warmup=50, decay=0.5, ema_decay=0.999)
S = TrainConfig(crops_per_map=2)                                               # CryoFM-S: Table 4, appendix B.1
PRESETS = {
    "tiny": TrainConfig(net=model_hdit.PRESETS["tiny"], **TINY),               # the shipped prior; trains on a CPU
    "s": S,
    "l": replace(S, net=model_hdit.PRESETS["l"], steps=300_000, crop=128, crops_per_map=1, voxel_size=3.0, micro_batch=4,
                 resolution_min=6.0, resolution_max=6.0, time_law="logit-normal"),             # CryoFM-L
    **{name: replace(S, net=model_hdit.PRESETS[name]) for name in ("p2-d1", "p8-d1", "p4-d0", "p4-d2")},     # Table 7
}


def parse(argv=None) -> TrainConfig:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--model", choices=PRESETS, default="tiny")
    for f in fields(TrainConfig):
        if f.metadata:                                   # every opt() field is a flag: no second list to keep
            kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
            cli.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"], **kind)
    typed = {k: v for k, v in vars(cli.parse_args(argv)).items() if v is not None}
    return replace(PRESETS[typed.pop("model")], **typed)                       # the preset first, then what the user typed


class FairseqAdam(torch.optim.Optimizer):
    """AdamW with eps added before the bias correction: an effective eps of eps / sqrt(1 - beta2^n) (Ott et al. 2019)."""
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
            grads, m, v = [p.grad for p in params], [self.state[p]["m"] for p in params], [self.state[p]["v"] for p in params]
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            denominator = torch._foreach_sqrt(v)
            torch._foreach_add_(denominator, group["eps"])
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_addcdiv_(params, m, denominator, -lr * (1 - beta2 ** n) ** 0.5 / (1 - beta1 ** n))


def optimizers(net: torch.nn.Module, cfg: TrainConfig) -> list[torch.optim.Optimizer]:
    """FairseqAdam, after it Muon for the matrices of the blocks where asked (Departure 2)."""
    inner = lambda name, p: p.ndim == 2 and not any(s in name for s in ("norm", "time", "patch"))
    matrices = [p for name, p in net.named_parameters() if cfg.optimizer == "muon" and inner(name, p)]
    taken = {id(p) for p in matrices}
    rest = [p for p in net.parameters() if id(p) not in taken]
    adam = [FairseqAdam(rest, cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay)]
    return adam + [torch.optim.Muon(matrices, cfg.lr, cfg.weight_decay, adjust_lr_fn="match_rms_adamw")] * bool(matrices)


def lr_at(step: int, cfg: TrainConfig) -> float:
    """(2) for the 0-based step."""
    warm = min(1.0, 0.01 + 0.99 * step / cfg.warmup) if cfg.warmup else 1.0
    left = (cfg.steps - step) / (cfg.decay * cfg.steps) if cfg.decay else 1.0
    return cfg.lr * warm * min(1.0, left)


@torch.no_grad()
def update_ema(ema: torch.nn.Module, net: torch.nn.Module, n: int, decay: float) -> None:
    """(3) after update n = 1, 2, ...; buffers are copied."""
    decay = min(decay, (1 + n) / (10 + n))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
    for a, b in zip(ema.buffers(), net.buffers()):
        a.copy_(b)


def held_out(label: str) -> bool:
    """One in twenty entries, by the hash of its name, is never trained on."""
    return zlib.crc32(label.encode()) % 20 == 0


def datasets(cfg: TrainConfig):
    """(training, held-out) datasets of --data; items are (crops, 1, D, D, D)."""
    common = dict(crop=cfg.crop, crops=cfg.crops_per_map, voxel_size=cfg.voxel_size, mean=cfg.mean, std=cfg.std)
    entries = data.read_structures(cfg.data)
    parts = [s for s in entries if not held_out(s.label)], [s for s in entries if held_out(s.label)]
    simulated = dict(common, resolution=(cfg.resolution_min, cfg.resolution_max))
    return (data.SimulatedCrops(parts[0], seed=cfg.seed, **simulated),
            data.SimulatedCrops(parts[1], seed=cfg.seed + 1, **simulated))


@torch.no_grad()
def held_out_loss(net, x_0: Tensor, cfg: TrainConfig) -> list[float]:
    """Flow-matching loss of fixed held-out crops at HELD_OUT_TIMES, with fixed noise."""
    losses = []
    for t in HELD_OUT_TIMES:
        g = torch.Generator().manual_seed(0)
        parts = []
        for x in x_0.split(cfg.micro_batch):
            x_1 = torch.randn(x.shape, generator=g).to(x.device)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=cfg.bf16):
                parts.append(flow.loss(net, x, t=torch.full((len(x),), t, device=x.device), x_1=x_1, per_sample=True))
        losses.append(float(torch.cat(parts).mean()))
    return losses


def main(argv=None) -> None:
    cfg = parse(argv)
    env = lambda name, alone: int(os.environ.get(name, alone))                 # torchrun sets these; alone without it
    rank, local_rank, world = env("RANK", 0), env("LOCAL_RANK", 0), env("WORLD_SIZE", 1)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:                                        # a failure here stops the run; it never becomes N lone runs
        dist.init_process_group("nccl" if cuda else "gloo")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    accumulate, rest = divmod(cfg.batch, world * min(cfg.micro_batch, cfg.batch // world or 1))
    micro = cfg.batch // (world * accumulate) if accumulate else 0
    if rest or not micro or micro % cfg.crops_per_map:
        raise ValueError(f"--batch {cfg.batch} is not (ranks {world}) x (--micro-batch {cfg.micro_batch}) x an integer, with "
                         f"--crops-per-map {cfg.crops_per_map} dividing the micro-batch")

    torch.manual_seed(cfg.seed)
    net = HDiT(cfg.net, cfg.activation_checkpointing).to(device)
    opts = optimizers(net, cfg)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    start = 0
    if cfg.resume:
        saved = checkpoint.read(out / "checkpoint.pt")
        ema.load_state_dict(saved["weights"])
        net.load_state_dict(saved["training"]["net"])
        for optimizer, state in zip(opts, saved["training"]["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        start = saved["training"]["step"]
    ddp = DDP(net, device_ids=[local_rank] if cuda else None) if world > 1 else net
    velocity = torch.compile(ddp) if cfg.compile else ddp

    train_set, held_out_set = datasets(cfg)
    maps = micro // cfg.crops_per_map                    # items per micro-batch; item numbers make the data (seed, step, rank)
    items = ((step * accumulate + i) * world * maps + rank * maps + j
             for step in range(start, cfg.steps) for i in range(accumulate) for j in range(maps))
    loader = iter(torch.utils.data.DataLoader(train_set, batch_size=maps, sampler=items, num_workers=cfg.workers,
                                              pin_memory=cuda, prefetch_factor=8 if cfg.workers else None))
    held_out_crops = torch.cat([held_out_set[i] for i in range(-(-64 // cfg.crops_per_map))]).to(device)

    if rank == 0:
        n = sum(p.numel() for p in net.parameters())
        print(f"{n / 1e6:.2f} M parameters, {device}, {world} rank(s) x {accumulate} x {micro} crops of {cfg.crop}^3, "
              f"steps {start} to {cfg.steps}, torch {torch.__version__}", flush=True)
        log = open(out / "log.csv", "a" if start else "w", newline="")
        row = csv.writer(log)
        if not start:
            row.writerow(["step", "loss", "grad_norm", "lr", "maps_per_s", *(f"held_out_t{t}" for t in HELD_OUT_TIMES)])
    stop = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, _: stop.append(number))             # finish the step, save, leave

    def save(step):
        shared = dict(voxel_size=cfg.voxel_size, box=cfg.crop, mean=cfg.mean, std=cfg.std)
        checkpoint.save(out / "checkpoint.pt", ema, **shared,
                        training=dict(net=net.state_dict(), optimizers=[o.state_dict() for o in opts], step=step, flags=asdict(cfg)))
        checkpoint.save(out / "prior.pt", ema, **shared, half=True)

    since, seen, total, norms = time.perf_counter(), 0, torch.zeros((), device=device), []
    for step in range(start, cfg.steps):
        for optimizer in opts:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, cfg)
        for i in range(accumulate):
            x_0 = next(loader).flatten(0, 1).to(device, non_blocking=True)     # (micro, 1, D, D, D)
            g = torch.Generator().manual_seed(((cfg.seed * 1_000_003 + step) * 4099 + i) * 65537 + rank)
            quiet = ddp.no_sync() if world > 1 and i < accumulate - 1 else contextlib.nullcontext()
            with quiet:                                  # gradients cross ranks once per step
                with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
                    loss = flow.loss(velocity, x_0, law=cfg.time_law, generator=g) / accumulate
                loss.backward()
            total += loss.detach()                       # no .item() here: it would wait for the GPU
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip))
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_ema(ema, net, step + 1, cfg.ema_decay)    # (3)
        seen += 1

        last = step + 1 == cfg.steps or bool(stop)
        if (step + 1) % cfg.log_every == 0 or last:
            mean_loss = total / seen
            if world > 1:
                dist.all_reduce(mean_loss, dist.ReduceOp.AVG if cuda else dist.ReduceOp.SUM)
                mean_loss = mean_loss if cuda else mean_loss / world
            if not mean_loss.isfinite():
                raise ValueError(f"the loss is {float(mean_loss)} at step {step + 1}; resume from {out / 'checkpoint.pt'} with a "
                                 "lower --lr")
            held = held_out_loss(ema, held_out_crops, cfg) if (step + 1) % cfg.eval_every == 0 or last else []
            if rank == 0:
                rate = seen / (time.perf_counter() - since)
                memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                norm = float(torch.stack(norms).mean())
                eta = time.strftime("%H:%M:%S", time.gmtime((cfg.steps - step - 1) / rate))
                print(f"step {step + 1:6d}  loss {float(mean_loss):.4f}  |g| {norm:.2f}  lr {lr_at(step, cfg):.1e}  "
                      f"{rate:.2f} steps/s  {rate * cfg.batch:.1f} maps/s  {memory / 2 ** 30:.1f} GiB  ETA {eta}"
                      + "".join(f"  t{t} {v:.4f}" for t, v in zip(HELD_OUT_TIMES, held)), flush=True)
                row.writerow([step + 1, f"{float(mean_loss):.5f}", f"{norm:.3f}", f"{lr_at(step, cfg):.3e}",
                              f"{rate * cfg.batch:.2f}", *(f"{v:.5f}" for v in held)])
                log.flush()
            since, seen, total, norms = time.perf_counter(), 0, torch.zeros((), device=device), []
        if rank == 0 and ((step + 1) % cfg.save_every == 0 or last):
            save(step + 1)
        if stop:
            print(f"stopped by signal {stop[0]} after step {step + 1}; go on with --resume", flush=True)
            break
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
