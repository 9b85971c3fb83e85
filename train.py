"""Train a network.

    python train.py --model tiny
    torchrun --nproc-per-node 8 train.py --model s --data MAPS

CryoFM's priors ("tiny", "s", "l", ...) learn by flow matching. CryoLVM's SCUNet learns to predict
what is hidden ("jepa", or "mae" to compare), and then a task from pairs of observed and wanted
maps: `--model sharpen --init jepa.pt`, "superres", "wedge3d". Presets and departures:
train_config.py; of the networks the papers compare against, train_baselines.py. Losses:
train_objectives.py. Optimisers: train_optim.py.

A step takes `batch` crops, in micro-batches. World size W, accumulation A:

    m = (step A + i) W + rank          number of micro-batch i of a step on a rank          (1)
    items m n .. m n + n - 1           of the data set make it, n = crops / crops_per_map   (2)

The crops, noise, times and masks of a micro-batch depend on (seed, m) alone. So a run that was
stopped and resumed sees the same batches as an unbroken run. On a CPU it ends with the same
weights, bit by bit. Two ranks take the step that one rank takes.

Written to --out: log.csv; checkpoint.pt, for --resume; prior.pt, the averaged weights in half
precision for sampling.py (of CryoLVM jepa.pt, sharpen.pt, ...); samples/. SIGTERM, Ctrl-C, SIGHUP
(a closed terminal) and SIGUSR1 (SLURM) end a run after the current step, with a checkpoint and exit
code 0. --dry-run takes one step and says what a run would cost.
"""

# Threads that wait for work sleep instead of spinning. On a machine whose second core was busy, a
# step of sampling took 53 s with spinning threads and 6 s without. Set before torch is imported.
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import math
import shutil
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import flow
from files import own_folder
from train_baselines import BASELINES
from train_config import PRESETS, TrainConfig, flag, used_by
from train_dry_run import dry_run
from train_log import Log, Tally, write_samples
from train_objectives import (
    datasets,
    held_out_losses,
    losses,
    refuse_raw_maps,
    split_batch,
)
from train_optim import set_rates, update_average
from train_ranks import Ranks, StopSignals, start_loader
from train_resume import begin, network_for_use, read_training, save

NO_BATCH = 2**62  # larger than the number of any micro-batch


def parse(argv=None) -> TrainConfig:
    """The preset of --model, changed by the flags that were typed.

    Raises ValueError if a value is out of range, or if the preset does not use a flag.
    """
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    presets = PRESETS | BASELINES
    cli.add_argument("--model", choices=presets, default="tiny")
    options = {option.name: option for option in fields(TrainConfig) if option.metadata}
    for name, option in options.items():
        help = option.metadata["help"]
        if option.metadata["only"]:
            help += f" ({', '.join(option.metadata['only'])} only)"
        if option.type is bool:
            cli.add_argument(flag(name), help=help, action=argparse.BooleanOptionalAction)
        else:
            cli.add_argument(flag(name), help=help, type=option.type)

    # What was not typed is None.
    typed = vars(cli.parse_args(argv))
    model = typed.pop("model")
    preset = presets[model]

    # The preset must use every flag that was.
    changes = {name: value for name, value in typed.items() if value is not None}
    for name in changes:
        if not used_by(options[name], preset.objective):
            raise ValueError(
                f"{flag(name)}: --model {model} does not use it, only "
                f"{', '.join(options[name].metadata['only'])}; drop it"
            )
    return replace(preset, **changes)


def item_numbers(batch_numbers, per_batch: int):
    """Numbers of the items that make the micro-batches with these numbers.           (2)"""
    for number in batch_numbers:
        yield from range(number * per_batch, (number + 1) * per_batch)


def to_device(batch, train_set, device: torch.device) -> torch.Tensor:
    """Crops (micro, 1 or 2, D, D, D) on the device; a GPU turns the maps here."""
    if not torch.is_tensor(batch):  # windows and rotations, see data.MapCrops
        windows, rotations = (part.to(device, non_blocking=True) for part in batch)
        batch = train_set.rotate_windows(windows, rotations)
    return batch.flatten(0, 1).to(device, non_blocking=True)


def noise_generator(seed: int, number: int, device: torch.device) -> torch.Generator:
    """What times, noise and masks of micro-batch `number` are drawn with."""
    # Far from the streams of its crops, which augment.item_generator counts up.
    seed = (seed * 1_000_003 + number) * 268_636_163 % 2**63
    return torch.Generator(device).manual_seed(seed)


def held_out_batch(held_out_set, cfg: TrainConfig) -> torch.Tensor:
    """Crops (n, 1 or 2, D, D, D) that are never trained on, n at least --held-out-crops."""
    # Whole maps, all their crops.
    count = math.ceil(cfg.held_out_crops / cfg.crops_per_map)
    return torch.cat([held_out_set[i] for i in range(count)])


def describe(net, cfg: TrainConfig, ranks, start: int, accumulate: int, micro: int) -> None:
    """Print what is trained, on what, and how far."""
    # One line for all runs, and one for a schedule that may not be meant.
    parameters = sum(p.numel() for p in net.parameters())
    ranks.say(
        f"{parameters / 1e6:.2f} M parameters, {ranks.device}, "
        f"{ranks.world} rank(s) x {accumulate} x {micro} crops of {cfg.crop}^3, "
        f"steps {start} to {cfg.steps}, torch {torch.__version__}"
    )
    if cfg.warmup >= cfg.steps:
        ranks.say(f"the learning rate rises to the end: --warmup {cfg.warmup} --steps {cfg.steps}")


def stop_failed_run(step: int, numbers: list, finite: list, per_batch: int, ranks, out, save):
    """Save the state before this step, say which micro-batch is to blame, and end all ranks.

    numbers: of this rank's micro-batches; finite: whether the loss of each is, then the gradient.
    Raises ValueError, always.
    """
    # The lowest number over all ranks.
    bad = min((number for number, ok in zip(numbers, finite) if not ok), default=NO_BATCH)
    bad = int(ranks.reduce(torch.tensor(bad), dist.ReduceOp.MIN))

    # The weights may have gone astray some steps ago, so the checkpoint before stays, too.
    if ranks.rank == 0:
        if (out / "checkpoint.pt").exists():
            shutil.copyfile(out / "checkpoint.pt", out / "checkpoint_before.pt")
        save(step)
    # Wait for it: the first rank to fail ends the others.
    ranks.reduce(torch.zeros(1))

    # Items can be made again, to look at them.
    where = "each loss is finite, the gradient is not"
    if bad != NO_BATCH:
        first = bad * per_batch
        where = (
            f"the loss is not finite in micro-batch {bad}, items {first} to "
            f"{first + per_batch - 1} of the data, on rank {bad % ranks.world}"
        )
    raise ValueError(
        f"step {step + 1}: {where}; saved as it was after step {step}, --resume it with a lower "
        "--lr (should it fail again: checkpoint_before.pt is what was saved before)"
    )


def main(argv=None) -> None:
    # Refuse what cannot work before any work.
    cfg = parse(argv)
    ranks = Ranks()
    split_batch(cfg, ranks.world)
    refuse_raw_maps(cfg, ranks.world)

    # One rank is enough for a dry run.
    if cfg.dry_run:
        if ranks.rank == 0:
            dry_run(cfg, ranks.say)
        return

    # One run per folder. The first rank is the one that writes.
    if ranks.rank == 0:
        with own_folder(Path(cfg.out), ranks.say):
            train(cfg, ranks)
    else:
        train(cfg, ranks)


def train(cfg: TrainConfig, ranks: Ranks) -> None:
    """Take the steps of a run, from the first or from the one that was saved last."""
    accumulate, micro = split_batch(cfg, ranks.world)

    # A new run starts at step 0, a resumed one after the last step that was saved.
    out = Path(cfg.out)
    saved = read_training(out / "checkpoint.pt", cfg, micro, ranks.say)
    start = saved["training"]["step"] if saved else 0
    if start >= cfg.steps:
        ranks.say(f"nothing to do: step {start} of {cfg.steps}; give more --steps to go on")
        return

    # `net` is saved, `ddp` is called, `ema` is evaluated.
    ranks.join()
    device = ranks.device
    state = begin(cfg, saved, device, ranks.say)
    del saved
    net, ema, opts = state.net, state.ema, state.optimizers
    ddp = ranks.wrap(net, cfg.compile)

    # The micro-batches of this rank, by number, from the first step to the last.
    train_set, held_out_set = datasets(cfg, ranks.say)
    if ranks.cuda:
        train_set.rotate_later = True  # the GPU turns the maps, see `to_device`
    per_batch = micro // cfg.crops_per_map
    per_step = accumulate * ranks.world
    numbers = range(start * per_step + ranks.rank, cfg.steps * per_step, ranks.world)  # (1)
    loader = start_loader(train_set, item_numbers(numbers, per_batch), per_batch, cfg.workers)
    save_run = partial(save, state, network_for_use(ema, cfg), cfg, out, micro)
    describe(net, cfg, ranks, start, accumulate, micro)

    # The first rank measures and writes, all ranks train.
    if ranks.rank == 0:
        held_out_crops = held_out_batch(held_out_set, cfg).to(device)
        log = Log(out, cfg, start, ranks.say)
    signals = StopSignals()
    tally = Tally(device)

    for step in range(start, cfg.steps):
        lr = set_rates(opts, step, cfg)
        step_numbers = range(step * per_step + ranks.rank, (step + 1) * per_step, ranks.world)
        finite = []
        for number in step_numbers:
            # Fetch a micro-batch, with its own random numbers.
            x_0 = to_device(next(loader), train_set, device)
            generator = noise_generator(cfg.seed, number, device)

            # Forward and backward.
            with ranks.averaging(ddp, last=number == step_numbers[-1]):
                with flow.autocast(device, cfg.bf16):
                    loss, bucket = losses(ddp, ema, x_0, cfg, generator)
                (loss.mean() / accumulate).backward()
            loss = loss.detach().double()  # no .item() here: it would wait for the GPU
            tally.count(loss, bucket)
            finite.append(loss.isfinite().all())
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)
        tally.norms.append(norm)
        finite.append(norm.isfinite())

        # Stop or fail: a signal to one rank, or a bad loss of one rank, ends all at this step.
        failed = not torch.stack(finite).all()
        ends = torch.tensor([int(signals.stopping()), int(failed)])
        stopping, failing = ranks.reduce(ends).tolist()
        if failing:
            stop_failed_run(step, step_numbers, finite, per_batch, ranks, out, save_run)

        # Update the weights and their average.
        for optimizer in opts:
            optimizer.step()  # (1) of train_optim
            optimizer.zero_grad(set_to_none=True)
        done = step + 1
        update_average(ema, net, done, cfg)  # (3) of train_optim

        # Evaluate, log and save.
        last = done == cfg.steps or stopping
        saving = last or done % cfg.save_every == 0
        evaluating = last or done % cfg.eval_every == 0
        first = done == start + 1  # shows at once that the run works
        if first or saving or evaluating or done % cfg.log_every == 0:
            ranks.reduce(tally.losses)
            held_out = []
            if evaluating and ranks.rank == 0:
                with tally.paused():
                    held_out = held_out_losses(net, ema, held_out_crops, cfg)
            # Not where a signal alone asked for an evaluation: an unbroken run has none there.
            if state.plateau and done % cfg.eval_every == 0:
                first_loss = torch.tensor(held_out[0] if held_out else 0.0, dtype=torch.float64)
                state.plateau.step(float(ranks.reduce(first_loss)))  # the first rank's
            if ranks.rank == 0:
                log.write(done, tally, lr, held_out)
                if saving:
                    save_run(done)
            tally = Tally(device)
        if ranks.rank == 0 and cfg.sample_every and done % cfg.sample_every == 0:
            with tally.paused():
                write_samples(ema, cfg, out / "samples", done, device)
        if stopping:
            ranks.say(f"stopped by a signal after step {done}; go on with --resume")
            break
    ranks.leave()


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError as error:
        hint = "less memory: a smaller --micro-batch, --activation-checkpointing"
        sys.exit(f"train.py: {error}\n{hint}")
    except RuntimeError as error:  # what torch raises where the CPU's memory is too small
        if "can't allocate memory" not in str(error):
            raise
        sys.exit("train.py: out of memory; less of it: a smaller --batch, --micro-batch, --crop")
    except (ValueError, OSError) as error:
        # Of an error in a data worker the last line says what it was.
        sys.exit(f"train.py: {str(error).strip().splitlines()[-1]}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped before the first step")
