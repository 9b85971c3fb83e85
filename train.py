"""Train a network.

    python train.py --model tiny
    torchrun --nproc-per-node 8 train.py --model s --data MAPS

CryoFM's priors ("tiny", "s", "l", ...) learn by flow matching. CryoLVM's SCUNet learns to predict
what is hidden ("jepa", or "mae" to compare), and then a task from pairs of observed and wanted
maps: `--model sharpen --init jepa.pt`, "superres", "wedge3d". Presets and departures:
train_presets.py; of the networks the papers compare against, train_baselines.py. Losses:
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
import contextlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.distributed as dist

import flow
import grey_scale
from files import own_folder
from terminal import one_line_for_memory, run_program
from train_baselines import BASELINES
from train_config import PRETRAINING, TrainConfig, flag, used_by
from train_dry_run import dry_run, speed_of
from train_log import Log, Tally, draw_samples, write_samples
from train_objectives import (
    compile_blocks,
    datasets,
    held_out_losses,
    losses,
    refuse_raw_maps,
    split_batch,
)
from train_optim import clip_gradient, set_rates, update_average
from train_presets import PRESETS
from train_ranks import Ranks, StopSignals, start_loader
from train_resume import Checkpoints, begin, every, read_training, what_is_kept

NONE = 2**62  # larger than the number of any step or micro-batch


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

    # Refuse a typed flag that the preset's objective does not use.
    changes = {name: value for name, value in typed.items() if value is not None}
    for name in changes:
        if not used_by(options[name], preset.objective):
            raise ValueError(
                f"{flag(name)}: --model {model} does not use it, only "
                f"{', '.join(options[name].metadata['only'])}; drop it"
            )
    return replace(preset, typed=tuple(changes), **changes)


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


def noise_generator(cfg: TrainConfig, number: int, device: torch.device) -> torch.Generator:
    """What times, noise and masks of micro-batch `number` are drawn with."""
    # Far from the streams of its crops, which augment.item_generator counts up.
    seed = (cfg.seed * 1_000_003 + number) * 268_636_163 % 2**63
    # Masks are a few numbers and tables: made on a GPU, they would wait for it.
    where = "cpu" if cfg.objective in PRETRAINING else device
    return torch.Generator(where).manual_seed(seed)


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
    if cfg.compile:
        ranks.say("the first step also compiles the blocks")
    if cfg.warmup >= cfg.steps:
        ranks.say(f"the learning rate rises to the end: --warmup {cfg.warmup} --steps {cfg.steps}")


def stop_failed_run(tally: Tally, done: int, per_batch: int, ranks: Ranks, cfg) -> None:
    """Raise ValueError on all ranks if a loss or gradient since the last log line is not finite.

    Nothing was saved since, because this comes before every checkpoint. It waits for the GPU.
    """
    # The first step that failed, and the first of its micro-batches, over all ranks.
    step = batch = NONE
    failure = tally.first_failure()
    if failure:
        step = done - len(tally.norms) + failure[0]
        if failure[1] < tally.accumulate:
            batch = (step * tally.accumulate + failure[1]) * ranks.world + ranks.rank  # (1)
    found = torch.tensor([step, batch])
    step, batch = ranks.reduce(found, dist.ReduceOp.MIN).tolist()
    if step == NONE:
        return

    # Items can be made again, to look at them.
    where = "each loss is finite, the gradient is not"
    if batch != NONE:
        first = batch * per_batch
        where = (
            f"the loss is not finite in micro-batch {batch}, items {first} to "
            f"{first + per_batch - 1} of the data, on rank {batch % ranks.world}"
        )
    raise ValueError(f"step {step + 1}: {where}; {what_is_kept(cfg)}")


def main(argv=None) -> None:
    # Refuse what cannot work before any work.
    cfg = parse(argv)
    ranks = Ranks()
    split_batch(cfg, ranks.world)
    refuse_raw_maps(cfg, ranks.world)
    if cfg.shard and ranks.world == 1 and not cfg.dry_run:
        raise ValueError("--shard: one process has nobody to share with; start it with torchrun")

    # One rank is enough for a dry run.
    if cfg.dry_run:
        if ranks.rank == 0:
            dry_run(cfg, ranks.device, ranks.world, ranks.say)
        return

    # One run per folder, owned until its last file is written. The first rank is the one that
    # writes, in a thread beside the training.
    with contextlib.ExitStack() as stack:
        if ranks.rank == 0:
            stack.enter_context(own_folder(Path(cfg.out), ranks.say))
        writer = stack.enter_context(ThreadPoolExecutor(1))
        train(cfg, ranks, writer)


def train(cfg: TrainConfig, ranks: Ranks, writer: ThreadPoolExecutor) -> None:
    """Take the steps of a run, from the first or from the one that was saved last."""
    accumulate, micro = split_batch(cfg, ranks.world)

    # A new run starts at step 0, a resumed one after the last step that was saved.
    out = Path(cfg.out)
    saved = read_training(out, cfg, micro, ranks.say)
    start = saved["training"]["step"] if saved else 0
    if start >= cfg.steps:
        ranks.say(f"nothing to do: step {start} of {cfg.steps}; give more --steps to go on")
        return

    # `net` is saved, `ddp` is called, `ema` is evaluated.
    ranks.join()
    device = ranks.device
    state = begin(cfg, saved, ranks)
    net, ema, opts = state.net, state.ema, state.optimizers
    if cfg.compile:
        compile_blocks(net)
    ddp = ranks.wrap(net)

    # The micro-batches of this rank, by number, from the first step to the last.
    train_set, held_out_set = datasets(cfg, ranks.say)
    if ranks.cuda:
        train_set.rotate_later = True  # the GPU turns the maps, see `to_device`
    per_batch = micro // cfg.crops_per_map
    per_step = accumulate * ranks.world
    numbers = range(start * per_step + ranks.rank, cfg.steps * per_step, ranks.world)  # (1)
    items = item_numbers(numbers, per_batch)
    loader = start_loader(train_set, items, per_batch, cfg.workers, ranks.say)
    checkpoints = Checkpoints(state, saved, cfg, micro, ranks, writer)
    del saved
    describe(net, cfg, ranks, start, accumulate, micro)

    # All ranks evaluate, so that none waits for another. The first one writes.
    held_out_crops = held_out_batch(held_out_set, cfg).to(device)
    speed = speed_of(net, ema, cfg, device, ranks.world)
    log = Log(out, cfg, start, speed, ranks.say) if ranks.rank == 0 else None
    if log and cfg.objective == "flow":  # sampling.py compares maps with them
        checkpoints.references = grey_scale.references(train_set)
    signals = StopSignals()
    tally = Tally(device, accumulate)

    for step in range(start, cfg.steps):
        lr = set_rates(opts, step, cfg)
        step_numbers = range(step * per_step + ranks.rank, (step + 1) * per_step, ranks.world)
        for number in step_numbers:
            # Fetch a micro-batch, with its own random numbers.
            with tally.waiting():
                batch = next(loader)
            x_0 = to_device(batch, train_set, device)
            generator = noise_generator(cfg, number, device)

            # Forward and backward.
            with ranks.averaging(ddp, last=number == step_numbers[-1]):
                with flow.autocast(device, cfg.bf16):
                    loss, bucket = losses(ddp, ema, x_0, cfg, generator)
                (loss.mean() / accumulate).backward()
            tally.count(loss, bucket)
        tally.count_step(clip_gradient(net, cfg.clip))

        # A signal to one rank ends all, and the clock of one rank saves.
        due = ranks.rank == 0 and checkpoints.due()
        stopping, due = ranks.agree(signals.stopping(), due)

        # Update the weights and their average.
        for optimizer in opts:
            optimizer.step()  # (1) of train_optim
            optimizer.zero_grad(set_to_none=True)
        done = step + 1
        update_average(ema, net, done, cfg)  # (3) of train_optim

        # Nothing above waits for a GPU. What follows does, and every so many steps only.
        last = done == cfg.steps or stopping
        first = done == start + 1  # shows at once that the run works
        planned = every(done, cfg.save_every) or every(done, cfg.keep_every)
        evaluating = last or every(done, cfg.eval_every)
        logging = first or evaluating or planned or every(done, cfg.log_every)
        saving = last or planned or due
        if logging or saving:
            stop_failed_run(tally, done, per_batch, ranks, cfg)
        if logging:
            held_out = []
            if evaluating:
                with tally.paused():
                    held_out = held_out_losses(net, ema, held_out_crops, cfg)
            # Not where a signal alone asked for an evaluation: an unbroken run has none there.
            if state.plateau and every(done, cfg.eval_every):
                state.plateau.step(ranks.of_first(held_out[0]))
            ranks.reduce(tally.losses)
            if log:
                log.write(done, tally, lr, held_out)
            tally = Tally(device, accumulate)
        with tally.paused():
            if saving:
                checkpoints.save(done)
            if every(done, cfg.sample_every):
                density = draw_samples(ema, cfg, device)
                if log:
                    write_samples(density, cfg, out / "samples", done)
        if stopping:
            ranks.say(f"stopped by a signal after step {done}; go on with --resume")
            break
    ranks.leave()
    checkpoints.wait()


def run() -> None:
    """`main`, whose errors are one line each."""
    hint = (
        "give a smaller --micro-batch, --batch or --crop, or for CryoFM's networks "
        "--activation-checkpointing"
    )
    try:
        with one_line_for_memory(hint):
            main()
    except (ValueError, OSError) as error:
        # Of an error in a data worker the last line says what it was.
        raise ValueError(str(error).strip().splitlines()[-1]) from None


if __name__ == "__main__":
    run_program("train.py", run, "stopped before the first step")
