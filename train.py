"""Train a prior: `python train.py --model tiny`; `torchrun --nproc-per-node 8 train.py --model s --data MAPS`.

    theta <- FairseqAdam(theta, clip(grad L, 1)),  L the flow-matching loss, flow.py (3)                 (1)
    lr(n) = lr (0.01 + 0.99 n / warmup) while n < warmup, then lr; linearly to 0 over the last `decay`   (2)
    ema   <- d ema + (1 - d) theta,  d = min(ema_decay, (1 + n) / (10 + n))                              (3)

CryoFM (arXiv:2410.08631) appendix B.1 and Table 4; (2)'s start, (3) and the laws of the training times as in
the authors' release.

A step takes `batch` crops, in micro-batches that ranks and accumulation share out. What is in micro-batch
number m of a run, crops, noise and times, depends on (seed, m) alone. So a run that was stopped and resumed
sees what the unbroken run would have seen and ends with the same weights, bit by bit on a CPU; and two ranks
take the step that one rank takes.

Written to --out: log.csv; prior.pt, the averaged weights in half precision, for sampling.py; checkpoint.pt,
for --resume. SIGTERM and SIGINT (Ctrl-C) end a run after the current step, with a checkpoint.

Departure 1: the paper keeps the learning rate constant; "tiny" lets it fall to 0, which a run of an hour needs.
Departure 2: "tiny" gives the matrices of its blocks to Muon (Jordan et al. 2024; torch.optim.Muon with AdamW's
update size), which reached in 150 steps the loss that FairseqAdam alone reached in more than 250. All else
stays with FairseqAdam.
"""
import argparse
import contextlib
import copy
import math
import os
import resource
import signal
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
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
HELD_OUT_CROPS = 64


def opt(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; the defaults are CryoFM-S on procedural structures."""
    net: HDiTConfig = HDiTConfig()
    data: str = opt("procedural", "folder of maps, PDB file or folder, .npz of structures, or 'procedural'")
    out: str = opt("runs/default", "folder for checkpoint.pt, prior.pt and log.csv")
    resume: bool = opt(False, "go on from OUT/checkpoint.pt")
    seed: int = opt(0, "of weights, data, noise and times")
    steps: int = opt(150_000, "optimiser steps")                                    # Table 4
    batch: int = opt(128, "crops per optimiser step, over all ranks and accumulation")        # Table 4
    micro_batch: int = opt(16, "crops per forward pass of one rank, at most")
    crop: int = opt(64, "voxels per side of a training crop")                       # section 4.1
    crops_per_map: int = opt(2, "crops cut from one map")                           # the release
    center_crops: bool = opt(False, "crop the centre of a map (CryoFM-L), not anywhere in the molecule")
    voxel_size: float = opt(1.5, "Å")                                               # section 4.1
    resolution_min: float = opt(2.5, "Å, best resolution of simulated maps")
    resolution_max: float = opt(4.0, "Å, worst resolution of simulated maps")
    mean: float = opt(0.04, "of the clipped density; network value = (density - mean) / std")  # section 4.2
    std: float = opt(0.09, "of the clipped density")                                # section 4.2
    time_law: str = opt("uniform", "of the training times: uniform or logit-normal")          # the release
    optimizer: str = opt("adam", "adam: FairseqAdam for all; muon: Muon for the matrices of the blocks")
    lr: float = opt(1e-4, "peak learning rate")                                     # B.1
    warmup: int = opt(2000, "steps of linear warm-up from 0.01 lr")                 # B.1, the release
    decay: float = opt(0.0, "fraction of the steps, at the end, over which lr falls to 0")
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
    save_every: int = opt(500, "steps between checkpoints")

    def __post_init__(self):
        for name in ("steps", "batch", "micro_batch", "crops_per_map", "voxel_size", "std",
                     "log_every", "eval_every", "save_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: it must be positive")
        if self.crop < 1 or self.crop % self.net.multiple:
            raise ValueError(f"--crop {self.crop}: this network wants a multiple of {self.net.multiple}")
        if not 0 < self.resolution_min <= self.resolution_max:
            raise ValueError(f"--resolution-min {self.resolution_min:g} must be positive and at most "
                             f"--resolution-max {self.resolution_max:g}")
        if not 0 <= self.decay <= 1 or min(self.seed, self.warmup, self.workers) < 0:
            raise ValueError("--decay must be in 0..1, and --seed, --warmup and --workers at least 0")
        if self.time_law not in ("uniform", "logit-normal"):
            raise ValueError(f"--time-law {self.time_law}: choose uniform or logit-normal")
        if self.optimizer not in ("adam", "muon"):
            raise ValueError(f"--optimizer {self.optimizer}: choose adam or muon")


S = TrainConfig()                                                                   # CryoFM-S
PRESETS = {
    # The shipped prior; trains on a CPU. Mean and std are those of simulated maps.
    "tiny": TrainConfig(net=model_hdit.PRESETS["tiny"], steps=6000, batch=16, crop=32, crops_per_map=4,
                        mean=0.05, std=0.13, optimizer="muon", lr=2e-3, warmup=50, decay=0.5, ema_decay=0.999),
    "s": S,
    # CryoFM-L: Table 4, section 4.1; the resolution of simulated maps is that of its grid.
    "l": replace(S, net=model_hdit.PRESETS["l"], steps=300_000, micro_batch=4, crop=128, crops_per_map=1,
                 center_crops=True, voxel_size=3.0, resolution_min=6.0, resolution_max=6.0,
                 time_law="logit-normal"),
    **{name: replace(S, net=model_hdit.PRESETS[name])                               # Table 7
       for name in ("p2-d1", "p8-d1", "p4-d0", "p4-d2")},
}


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


def optimizers(net: torch.nn.Module, cfg: TrainConfig) -> list[torch.optim.Optimizer]:
    """FairseqAdam, after it Muon for the matrices of the blocks where asked (Departure 2)."""
    inner = lambda name, p: p.ndim == 2 and not any(s in name for s in ("norm", "time", "patch"))
    matrices = [p for name, p in net.named_parameters() if cfg.optimizer == "muon" and inner(name, p)]
    taken = {id(p) for p in matrices}
    rest = [p for p in net.parameters() if id(p) not in taken]
    result = [FairseqAdam(rest, cfg.lr, (0.9, cfg.beta2), weight_decay=cfg.weight_decay)]
    if matrices:
        result.append(torch.optim.Muon(matrices, cfg.lr, cfg.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return result


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


# ---- Data -----------------------------------------------------------------------------------------------------

def datasets(cfg: TrainConfig, say=print):
    """(training, held-out) datasets of --data; items are (crops, 1, D, D, D).

    Raises OSError or ValueError if there is nothing to train on.
    """
    common = dict(crop=cfg.crop, crops=cfg.crops_per_map, mean=cfg.mean, std=cfg.std)
    simulated = dict(common, box=cfg.crop if cfg.center_crops else 2 * cfg.crop, voxel_size=cfg.voxel_size,
                     resolution=(cfg.resolution_min, cfg.resolution_max))
    if cfg.data == "procedural":
        return tuple(data.SimulatedCrops(data.ProceduralChains(seed), seed=seed, **simulated)
                     for seed in (cfg.seed, cfg.seed + 1))
    if data.list_files(cfg.data, data.MAP_SUFFIXES):     # in a folder with both, maps come before models
        entries, refused = data.read_volumes(cfg.data, cfg.voxel_size, cfg.crop if cfg.center_crops else None)
        for line in refused:
            say(f"skipped {line}")
        say(f"{cfg.data}: {len(refused)} maps skipped, {len(entries)} read, "
            f"{sum(v.density.nbytes for v in entries) / 2 ** 30:.2f} GiB at {cfg.voxel_size:g} Å per voxel")
        make = lambda part, seed: data.MapCrops(part, center=cfg.center_crops, seed=seed, **common)
    else:
        entries = data.read_structures(cfg.data)
        make = lambda part, seed: data.SimulatedCrops(part, seed=seed, **simulated)
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
    remainder = {entry.label: zlib.crc32(entry.label.encode()) % 20 for entry in entries}
    held_out = {label for label, r in remainder.items() if r == 0}
    if len(held_out) in (0, len(remainder)):
        held_out = {min(remainder, key=remainder.get)}
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
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


@torch.no_grad()
def held_out_loss(net, x_0: Tensor, cfg: TrainConfig) -> list[float]:
    """Flow-matching loss of fixed held-out crops at HELD_OUT_TIMES, with fixed noise."""
    losses = []
    for t in HELD_OUT_TIMES:
        g = torch.Generator().manual_seed(0)
        parts = []
        for x in x_0.split(cfg.micro_batch):
            x_1 = torch.randn(x.shape, generator=g).to(x.device)
            with flow.autocast(x.device, cfg.bf16):
                times = torch.full((len(x),), t, device=x.device)
                parts.append(flow.loss(net, x, t=times, x_1=x_1, per_sample=True))
        losses.append(float(torch.cat(parts).mean()))
    return losses


# ---- Resume, log ----------------------------------------------------------------------------------------------

def read_training(path: Path, cfg: TrainConfig, say=print) -> dict:
    """The checkpoint to go on from. Raises OSError if there is none, ValueError if it does not fit."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no checkpoint to resume from; leave out --resume to start a run")
    saved = checkpoint.read(path)
    if not saved.get("training"):
        raise ValueError(f"{path}: holds no training state; --resume wants the checkpoint.pt of a run")
    flags = saved["training"]["flags"]
    if flags["net"] != asdict(cfg.net) or flags["optimizer"] != cfg.optimizer:
        raise ValueError(f"{path}: another network or optimiser; give the --model and --optimizer it began with")
    say(f"resuming {path} after step {saved['training']['step']}")
    for name, now in asdict(cfg).items():
        if flags.get(name, now) != now and name not in ("out", "resume"):
            say(f"  changed: --{name.replace('_', '-')} {flags[name]} -> {now}")
    return saved


def open_log(path: Path, start: int):
    """log.csv, to append to; a run resumed after step `start` writes the later rows again, so they are cut."""
    rows = ["step,loss,grad_norm,lr,maps_per_s," + ",".join(f"held_out_t{t}" for t in HELD_OUT_TIMES)]
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
    net = HDiT(cfg.net, cfg.activation_checkpointing).to(device)
    opts = optimizers(net, cfg)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    if saved:
        ema.load_state_dict(saved["weights"])
        net.load_state_dict(saved["training"]["net"])
        for optimizer, state in zip(opts, saved["training"]["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        del saved
    # `net` is saved, `velocity` is called, `ema` is evaluated: no prefixed keys on disk. Buffers never change.
    ddp = DDP(net, device_ids=[local_rank] if cuda else None, broadcast_buffers=False) if world > 1 else net
    velocity = torch.compile(ddp) if cfg.compile else ddp

    train_set, held_out_set = datasets(cfg, say)
    m = lambda step, i: (step * accumulate + i) * world + rank                 # the number of a micro-batch
    maps = micro // cfg.crops_per_map                                          # items per micro-batch
    items = (m(step, i) * maps + j
             for step in range(start, cfg.steps) for i in range(accumulate) for j in range(maps))
    loader = iter(torch.utils.data.DataLoader(
        train_set, batch_size=maps, sampler=items, num_workers=cfg.workers, pin_memory=cuda,
        prefetch_factor=8 if cfg.workers else None, worker_init_fn=ignore_signals))

    def save(step):
        shared = dict(voxel_size=cfg.voxel_size, box=cfg.crop, mean=cfg.mean, std=cfg.std)
        training = dict(net=net.state_dict(), optimizers=[optimizer.state_dict() for optimizer in opts], step=step,
                        flags=asdict(cfg))
        checkpoint.save(out / "checkpoint.pt", ema, **shared, training=training)
        checkpoint.save(out / "prior.pt", ema, **shared, half=True)

    say(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {device}, "
        f"{world} rank(s) x {accumulate} x {micro} crops of {cfg.crop}^3, steps {start} to {cfg.steps}, "
        f"torch {torch.__version__}")
    if rank == 0:                                        # measures and writes; all ranks train
        count = math.ceil(HELD_OUT_CROPS / cfg.crops_per_map)
        held_out_crops = torch.cat([held_out_set[i] for i in range(count)]).to(device)
        out.mkdir(parents=True, exist_ok=True)
        log = open_log(out / "log.csv", start)
    stop = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda signum, _: stop.append(signum))             # finish the step, save, leave

    since, seen, total, norms = time.perf_counter(), 0, torch.zeros((), device=device), []
    for step in range(start, cfg.steps):
        for optimizer in opts:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, cfg)                                 # (2)
        for i in range(accumulate):
            x_0 = next(loader).flatten(0, 1).to(device, non_blocking=True)     # (micro, 1, D, D, D)
            seed = (cfg.seed * 1_000_003 + m(step, i)) * 268_636_163 % 2 ** 63      # none that crops use
            g = torch.Generator(device).manual_seed(seed)
            quiet = ddp.no_sync() if world > 1 and i < accumulate - 1 else contextlib.nullcontext()
            with quiet:                                  # gradients cross ranks once per step
                with flow.autocast(device, cfg.bf16):
                    loss = flow.loss(velocity, x_0, law=cfg.time_law, generator=g) / accumulate
                loss.backward()
            total += loss.detach()                       # no .item() here: it would wait for the GPU
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip))
        for optimizer in opts:
            optimizer.step()                                                   # (1)
            optimizer.zero_grad(set_to_none=True)
        update_ema(ema, net, step + 1, cfg.ema_decay)                          # (3)
        seen += 1

        stopping = torch.tensor(len(stop))
        if world > 1:
            dist.all_reduce(stopping)                    # a signal to one rank stops all, at the same step
        last = step + 1 == cfg.steps or bool(stopping)
        saving = last or (step + 1) % cfg.save_every == 0
        evaluating = last or (step + 1) % cfg.eval_every == 0
        if saving or evaluating or (step + 1) % cfg.log_every == 0:
            mean_loss, norm = total / seen, torch.stack(norms).mean()
            if world > 1:
                dist.all_reduce(mean_loss)               # sums; every rank knows, so every rank raises
                mean_loss /= world
            if not (mean_loss.isfinite() and norm.isfinite()):
                raise ValueError(f"loss {float(mean_loss):g}, gradient norm {float(norm):g} in the steps up to "
                                 f"{step + 1}; --resume from the last checkpoint with a lower --lr")
            if rank == 0:
                held = held_out_loss(ema, held_out_crops, cfg) if evaluating else []
                rate = seen / (time.perf_counter() - since)
                eta = timedelta(seconds=round((cfg.steps - step - 1) / rate))
                lr, maps_per_s = lr_at(step, cfg), rate * cfg.batch
                say(f"step {step + 1:6d}  loss {float(mean_loss):.4f}  |g| {float(norm):.2f}  lr {lr:.1e}  "
                    f"{rate:.2f} steps/s  {maps_per_s:.1f} maps/s  {peak_memory(cuda):.1f} GiB  ETA {eta}"
                    + "".join(f"  t{t} {v:.4f}" for t, v in zip(HELD_OUT_TIMES, held)))
                row = [f"{float(mean_loss):.5f}", f"{float(norm):.3f}", f"{lr:.3e}", f"{maps_per_s:.2f}"]
                print(step + 1, *row, *(f"{v:.5f}" for v in held), sep=",", file=log, flush=True)
                if saving:
                    save(step + 1)
            since, seen, total, norms = time.perf_counter(), 0, torch.zeros((), device=device), []
        if stopping:
            say(f"stopped by a signal after step {step + 1}; go on with --resume")
            break
    if world > 1:
        dist.destroy_process_group()


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
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
