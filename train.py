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
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
import torch.utils.flop_counter
from torch.nn.parallel import DistributedDataParallel as DDP

import augment
import checkpoint
import data
import flow
import jepa
import mrc
from model_scunet import SCUNet
from train_config import PRESETS, PRETRAINING, TrainConfig
from train_dry_run import dry_run, peak_memory
from train_objectives import TIME_BUCKETS, build, datasets, held_out_columns, held_out_losses, losses, split_batch
from train_optim import averaged, lr_at, optimizers, update_average

SAMPLES, SAMPLE_STEPS = 2, 32

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def parse(argv=None) -> TrainConfig:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--model", choices=PRESETS, default="tiny")
    for f in fields(TrainConfig):
        if f.metadata:                                   # every opt() field is a flag: no second list to keep
            kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
            cli.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"], **kind)
    typed = {k: v for k, v in vars(cli.parse_args(argv)).items() if v is not None}
    return replace(PRESETS[typed.pop("model")], **typed)     # the preset first, then what the user typed


def ignore_signals(worker: int) -> None:
    """Ctrl-C reaches all processes; those that make the data go on until the loop has ended."""
    for name in STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)


def end_workers() -> None:
    """At exit Python would send SIGTERM to those that make the data, who ignore it, and wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)        # torch's handler calls their end an error
    for worker in multiprocessing.active_children():
        worker.kill()


@torch.no_grad()
def write_samples(net, cfg: TrainConfig, folder: Path, step: int, device: torch.device) -> None:
    """SAMPLES maps from the same noise each time, as .mrc (density on 0..1), and a picture of their middle slices."""
    x_1 = torch.randn(SAMPLES, 1, *[cfg.crop] * 3, generator=torch.Generator().manual_seed(0)).to(device)
    with flow.autocast(device, cfg.bf16):
        x_0 = torch.cat([flow.sample(net, x, SAMPLE_STEPS) for x in x_1.split(cfg.micro_batch)])
    density = (x_0[:, 0] * cfg.std + cfg.mean).float().cpu()
    folder.mkdir(exist_ok=True)
    for i, x in enumerate(density):
        mrc.write_map(folder / f"step_{step:06d}_{i}.mrc", mrc.Map(x, cfg.voxel_size), overwrite=True)
    try:
        from matplotlib.image import imsave
    except ImportError:                                  # the maps are there all the same
        return
    slices = torch.cat([torch.cat((x[len(x) // 2], x[:, len(x) // 2], x[:, :, len(x) // 2])) for x in density], 1)
    imsave(folder / f"step_{step:06d}.png", slices.numpy(), vmin=0, vmax=1, cmap="gray")


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
        train_set.rotate_later = True
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
                x_0 = train_set.rotate_windows(*(part.to(device, non_blocking=True) for part in x_0))
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
            bad = min((m(step, i) for i in range(accumulate) if not finite[i]), default=augment.ENDLESS)
            bad = int(agree(torch.tensor(bad), dist.ReduceOp.MIN))
            if rank == 0:
                if (out / "checkpoint.pt").exists():     # this step's weights may have gone astray already
                    shutil.copyfile(out / "checkpoint.pt", out / "checkpoint_before.pt")
                save(step)                               # the weights before this step
            agree(torch.zeros(1))                        # wait for it: the first rank to fail ends the others
            where = ("each loss is finite, the gradient is not" if bad == augment.ENDLESS else
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


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as error:
        sys.exit(f"train.py: {error}\nless memory: a smaller --micro-batch, --activation-checkpointing")
    except (ValueError, OSError) as error:               # of an error in a data worker the last line says what it was
        sys.exit(f"train.py: {str(error).strip().splitlines()[-1]}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped before the first step")
