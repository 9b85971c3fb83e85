"""Speed and memory, beside peers and beside what the machine can do: `python bench.py [--gpu]`.

    floors of attention: useful FLOPs / (measured rate of a matrix product),
                         least traffic / (measured rate of a copy)                              (1)
    utilisation of training: 3 F maps/s / (rate of a matrix product), F FLOPs of a forward pass (2)

Attention (the peers, useful FLOPs and least traffic are those of bench_peers.py): every peer
alternates with na3d. The table holds medians, and medians of the ratios of pairs ("na3d" beside
itself shows the noise). Tables, masks, tuning and compilation are shown apart, as set-up. The error
is |a - b| / |b| of one head against float64, for the output and for the worst of dq, dk, dv.
GPU times are those of the kernels alone, from a cold L2 cache. One CPU thread is timed by its CPU
time, which other programs disturb less. A peer that cannot run, or would take too long, is a dash,
with the reason under the table.

Networks: a training step (on a CPU of one crop for S and L), a step of posterior sampling, SCUNet
on tiles, steps of whole tasks on maps (bench_maps.py), and calls of the shipped networks on 1 to 16
tiles. Each runs in a process of its own, so that its peak memory is its own. Training takes
bfloat16 where the hardware has it; the others choose their dtype like sampling.py.
"""

import argparse
import functools
import itertools
import math
import multiprocessing
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

import bench_maps
import checkpoint
import flow
import model_hdit
import model_scunet
import natten3d
import train_dry_run
import train_objectives
import train_optim
import train_presets
from bench_peers import PASSES, PEERS, Problem, first_head, kernel_seconds, seconds
from terminal import run_program

# ---- What the machine can do ----


def median_seconds(function: Callable, device: torch.device, budget: float, most: int = 20):
    """Median time after one call to warm up; that call's time if it used up the budget."""
    first = seconds(function, device)
    count = min(most, int(budget / first))
    return statistics.median([seconds(function, device) for _ in range(count)] or [first])


def ceilings(device: torch.device, dtype: torch.dtype, budget: float) -> tuple[float, float]:
    """FLOP/s of a large matrix product; bytes/s of a large copy, which reads and writes each."""
    # Large enough to be limited by the arithmetic, and by the memory.
    n, numbers = (8192, 2**28) if device.type == "cuda" else (2048, 2**26)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    product_seconds = median_seconds(lambda: a @ b, device, budget)
    source, target = torch.randn(2, numbers, device=device)
    copy_seconds = median_seconds(lambda: target.copy_(source), device, budget)
    return 2 * n**3 / product_seconds, 2 * source.nbytes / copy_seconds


# ---- Attention ----


def problems(args) -> Iterator[Problem]:
    """Every level of the models that has neighbourhood attention, in every batch size."""
    batches = (1, 4, 16) if args.gpu and not args.quick else (1,)
    for name, B in itertools.product(args.model, batches):
        config = train_presets.PRESETS[name]
        for level, width in enumerate(config.net.widths[:-1]):
            # Count the tokens and heads of this level.
            side = config.crop // config.net.patch_size // 2**level
            d = config.net.d_head
            shape = (B, side, side, side, width // d, d)

            # Draw q, k, v and a gradient of the output.
            *qkv, grad = torch.randn(4, *shape, device=args.device).to(args.dtype)
            kernel = (min(config.net.kernel_size, side),) * 3
            what = f"{name} level {level}: {B} x {side}^3 x {width // d} x {d}"
            yield Problem(what, kernel, [x.requires_grad_() for x in qkv], grad)


def measure_peer(problem: Problem, exact: dict, prepare: Callable, row: dict, budget: float):
    """Fill in the row of a peer. Raises TimeoutError before a pass that would take too long."""
    # Make tables and masks.
    begin = time.perf_counter()
    peer = prepare(problem)
    row["set-up s"] = time.perf_counter() - begin
    ours = functools.partial(natten3d.na3d, kernel_size=problem.kernel)
    clock = functools.partial(kernel_seconds, device=problem.grad.device)
    for which, (relative_flops, _) in PASSES.items():
        # Guess the time of the backward pass from that of the forward pass.
        expected = relative_flops * row.get("forward ms", 0) / 1e3
        if expected > 10 * budget and row["who"] != "na3d":
            raise TimeoutError(f"{which} takes about {expected:.0f} s a call (--seconds)")

        # The first call may compile and tune. Its results are compared with float64.
        begin = time.perf_counter()
        heads = [first_head(x) for x in problem.run(peer, which)]  # waits for the GPU
        first_seconds = time.perf_counter() - begin
        errors = [(a - b).norm() / b.norm() for a, b in zip(heads, exact[which], strict=True)]

        # Alternate with na3d as often as the budget allows, after one pair to warm up.
        run_ours = functools.partial(problem.run, ours, which)
        run_peer = functools.partial(problem.run, peer, which)
        count = int(budget / (clock(run_ours) + clock(run_peer)))
        pairs = [(clock(run_ours), clock(run_peer)) for _ in range(max(1, min(20, count)))]
        median = statistics.median(b for _, b in pairs)

        row[f"{which} ms"] = 1e3 * median
        row[f"{which} / na3d"] = statistics.median(b / a for a, b in pairs)
        row[f"{which} TFLOP/s"] = problem.useful_flops(which) / median / 1e12
        row[f"{which} error"] = float(max(errors))
        row["set-up s"] += max(0, first_seconds - median)


def attention_rows(args, rate: float, bandwidth: float, notes: list[str]) -> list[dict]:
    """A row for every peer and floor of every problem. A peer that cannot run leaves a note."""
    rows = []
    for problem in problems(args):
        exact = problem.exact()
        for who, prepare in PEERS.items():
            print(f"{problem.name}, {who}", file=sys.stderr, flush=True)
            row = {"shape": problem.name, "who": who}
            rows.append(row)
            try:
                measure_peer(problem, exact, prepare, row, args.seconds)
            except (ImportError, RuntimeError, TimeoutError) as error:
                # torch.compile wraps the error that it met.
                notes.append(f"{problem.name}, {who}: {error.__cause__ or error}")

        # Add the floors.                                                              (1)
        flops_row = {"shape": problem.name, "who": "floor: FLOPs"}
        bytes_row = {"shape": problem.name, "who": "floor: bytes"}
        for which, (_, tensors) in PASSES.items():
            flops_row[f"{which} ms"] = 1e3 * problem.useful_flops(which) / rate
            bytes_row[f"{which} ms"] = 1e3 * tensors * problem.grad.nbytes / bandwidth
        rows += [flops_row, bytes_row]
    return rows


# ---- Networks: a training step, a posterior-sampling step, tiles ----


def peak_memory(device: torch.device) -> float:
    """GiB of this process alone."""
    # ru_maxrss of a new process begins with what its parent held. Linux's VmHWM does not.
    peak = bench_maps.memory_of_process("VmHWM")
    if device.type == "cuda" or math.isnan(peak):
        return train_dry_run.peak_memory(device.type == "cuda")
    return peak


def train_step(name: str, args) -> dict:
    """As in train.py: forward, backward, clip, optimisers, averaged weights."""
    # Take the preset's settings, but smaller batches where they would take too long.
    name, _, compiled = name.partition(", ")
    config = train_presets.PRESETS[name]
    batch = config.batch if args.gpu or name == "tiny" else 1
    if args.quick:
        batch = 2
    config = replace(config, crops_per_map=1, bf16=args.dtype == torch.bfloat16, batch=batch)
    accumulate, micro = train_objectives.split_batch(config, 1)

    # Build what train.py builds.
    net = model_hdit.HDiT(config.net).to(args.device)
    ema = train_optim.averaged(net, config)
    optimizers = train_optim.optimizers(net, config)
    velocity = torch.compile(net) if compiled else net
    x_0 = torch.randn(micro, 1, *[config.crop] * 3, device=args.device)

    def step():
        # Add up the gradients of the micro-batches.
        for _ in range(accumulate):
            with flow.autocast(args.device, config.bf16):
                loss = flow.loss(velocity, x_0, law=config.time_law) / accumulate
            loss.backward()

        # Update the weights and their average.
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        train_optim.update_average(ema, net, 1000, config)

    # The first step compiles, which is not what we measure.
    if compiled:
        step()
    step_seconds = median_seconds(step, args.device, 6 * args.seconds, 5)
    flops = 6 * train_dry_run.multiply_adds(config.net, config.crop)
    return {
        "step": f"{accumulate} x {micro} x {config.crop}^3",
        "s": step_seconds,
        "maps/s": batch / step_seconds,
        "TFLOP per map": flops / 1e12,
        "TFLOP/s": flops * batch / step_seconds / 1e12,
    }


def untrained(name: str, args) -> checkpoint.Prior:
    """An untrained prior of a preset, because speed does not depend on the weights."""
    config = train_presets.PRESETS[name]
    net = model_hdit.HDiT(config.net).to(args.device).eval().requires_grad_(False)
    scale = (config.voxel_size, config.crop, config.mean, config.std)
    return checkpoint.Prior(net, "hdit", *scale, sha256="")


def sampling_step(name: str, args) -> dict:
    """As in posterior.sample_posterior: the network on every tile, the data term, noise."""
    prior = untrained(name, args)
    side = prior.box if args.quick else max(64, prior.box)
    take_steps, count = bench_maps.wedge_steps(prior, side, args.device)
    with torch.no_grad():
        step_seconds = median_seconds(take_steps, args.device, args.seconds) / count
    tiles = f"{side}^3 in tiles of {prior.box}^3"
    return {"step": tiles, "s": step_seconds, "voxels/s": side**3 / step_seconds}


def map_step(name: str, args) -> dict:
    """A step of a task on a whole map, beside the network's own time: bench_maps.py."""
    task, _, side = name.partition(" ")
    prior = shipped(task, args)
    net = bench_maps.Identity() if args.identity else prior.net
    prior = replace(prior, net=bench_maps.Timed(net, args.device))
    return bench_maps.measure_map(task, prior, int(side), args.device)


def shipped(task: str, args) -> checkpoint.Prior:
    """The network in weights/ that `sampling.py --task` takes."""
    file = {"wedge": "hdit_tiny.pt", "sharpen": "scunet_tiny_sharpen.pt"}[task]
    return checkpoint.load(Path(__file__).parent / "weights" / file, device=args.device)


def call_of_tiles(name: str, args) -> dict:
    """One call of a shipped network on some tiles."""
    task, _, count = name.partition(" ")
    prior = shipped(task, args)
    x = torch.randn(int(count), 1, *[prior.box] * 3, device=args.device)
    inputs = [x, torch.full((len(x),), 0.2, device=args.device)][: 2 if task == "wedge" else 1]
    with torch.no_grad(), flow.autocast(args.device):
        call = median_seconds(lambda: prior.net(*inputs), args.device, args.seconds)
    return {"step": f"{count} x {prior.box}^3", "ms per tile": 1e3 * call / len(x)}


def scunet_tile(name: str, args) -> dict:
    """SCUNet's forward pass on a batch of tiles."""
    net = (
        model_scunet.SCUNet(model_scunet.PRESETS[name]).to(args.device).eval().requires_grad_(False)
    )
    # Not one tile: on a CPU torch then takes a convolution for few channels, three times as slow.
    count = 32 if args.gpu else 2
    side = 24 if args.quick else 48
    x = torch.randn(count, 1, side, side, side, device=args.device)
    with torch.no_grad(), flow.autocast(args.device):
        step_seconds = median_seconds(lambda: net(x), args.device, args.seconds)
    tiles = f"{count} x {side}^3"
    return {"step": tiles, "s": step_seconds, "voxels/s": x.numel() / step_seconds}


NETWORK_PARTS = {
    "train": train_step,
    "sampling": sampling_step,
    "scunet": scunet_tile,
    "maps": map_step,
    "tiles": call_of_tiles,
}


def measure_network(part: str, name: str, args) -> dict:
    """A row. It runs in a process of its own."""
    torch.manual_seed(0)
    row = {"who": name} | NETWORK_PARTS[part](name, args)
    return row | {"peak GiB": peak_memory(args.device)}


def names_of_rows(part: str, args) -> list[str]:
    """The networks of a part, or its tasks with sizes. Training is measured eager and compiled."""
    if part == "maps":
        names = [f"{task} {side}" for task in args.task for side in args.side]
    elif part == "tiles":
        names = [f"{task} {count}" for task in args.task for count in (1, 2, 4, 8, 16)]
    elif part == "scunet":
        names = ["tiny", "paper"]
    elif part == "train" and not args.quick:
        names = [name + suffix for name in args.model for suffix in ("", ", compiled")]
    else:
        names = args.model
    return names[:1] if args.quick else names


def network_rows(part: str, args, rate: float, notes: list[str]) -> list[dict]:
    """The rows of training, sampling or SCUNet, each from a process of its own."""
    names = names_of_rows(part, args)

    # Start a process for each. If it fails, or is killed for its memory, a note says so.
    rows = []
    for name in names:
        row = {"who": name}
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                row = pool.submit(measure_network, part, name, args).result()
            except (RuntimeError, ValueError, OSError) as error:
                notes.append(f"{part}, {name}: {error}")
        if "TFLOP/s" in row:
            row["utilisation"] = 1e12 * row["TFLOP/s"] / rate  # (2)
        rows.append(row)
    return rows


# ---- Tables and the command ----

# The rows of RESULTS.md, "Speed", that lack NATTEN until a GPU has run, and their problems.
RESULTS_ROWS = {
    "S: 16^3, 12": "s level 0: 1 x 16^3 x 12 x 64",
    "L: 32^3, 5": "l level 0: 1 x 32^3 x 5 x 64",
    "L: 16^3, 10": "l level 1: 1 x 16^3 x 10 x 64",
    "tiny: 8^3, 2": "tiny level 0: 1 x 8^3 x 2 x 64",
}


def pair(row: dict, unit: str) -> str:
    """Forward / forward + backward of a row; a dash where it was not measured."""
    cells = [row.get(f"{which} {unit}", "-") for which in PASSES]
    return " / ".join(cell if isinstance(cell, str) else f"{cell:.3g}" for cell in cells)


def results_table(rows: list[dict]) -> str:
    """The rows of RESULTS_ROWS as RESULTS.md prints them, with this machine's numbers."""
    found = {(row["shape"], row["who"]): row for row in rows}
    table = []
    for name, problem in RESULTS_ROWS.items():
        # Times of na3d and of the floor in ms, those of the peers relative to na3d's.
        cells = {"tokens, heads x 64": name}
        for who in (*PEERS, "floor: FLOPs"):
            in_ms = who in ("na3d", "floor: FLOPs")
            column = f"{who}, ms" if in_ms else who
            cells[column] = pair(found.get((problem, who), {}), "ms" if in_ms else "/ na3d")
        table.append(cells)
    return markdown(table)


def say_exponents(rows: list[dict], notes: list[str]) -> None:
    """How time and memory grow with the number of voxels, for each task, as notes."""
    for task in bench_maps.STEPS:
        measured = [row for row in rows if row["who"].startswith(task) and "s" in row]
        sides = [int(row["who"].split()[1]) for row in measured]
        if len(sides) < 2:
            continue
        slope = bench_maps.exponent(sides, [row["s"] for row in measured])
        peak = bench_maps.exponent(sides, [row["peak GiB"] for row in measured])
        notes.append(f"{task}: time ~ voxels^{slope:.2f}, peak memory ~ voxels^{peak:.2f}")


def markdown(rows: list[dict]) -> str:
    """A table with the columns of the longest row."""
    columns = list(max(rows, key=len))
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        cells = [row.get(column, "-") for column in columns]
        lines.append([cell if isinstance(cell, str) else f"{cell:.4g}" for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse(argv=None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parts = ["attention", *NETWORK_PARTS]
    models = ["tiny", "s", "l"]
    cli.add_argument("--only", nargs="+", choices=parts, default=parts)
    cli.add_argument("--model", nargs="+", choices=models, default=models, help="shapes and steps")
    cli.add_argument(
        "--gpu",
        action="store_true",
        help="CUDA: every model, whole batches, and the rows that RESULTS.md lacks",
    )
    tasks = list(bench_maps.STEPS)
    cli.add_argument("--task", nargs="+", choices=tasks, default=tasks, help="of maps and tiles")
    cli.add_argument("--side", nargs="+", type=int, default=[64, 128], help="voxels, of maps")
    cli.add_argument("--identity", action="store_true", help="maps: leave out the network")
    cli.add_argument("--quick", action="store_true", help="small shapes, to see whether it runs")
    dtypes = ["float32", "bfloat16"]
    cli.add_argument("--dtype", choices=dtypes, help="of attention and training")
    cli.add_argument("--seconds", type=float, default=5, help="for each pair of medians")
    args = cli.parse_args(argv)
    if args.gpu and not torch.cuda.is_available():
        raise ValueError("--gpu: torch finds no CUDA device; leave it out to measure the CPU")
    args.device = torch.device("cuda" if args.gpu else "cpu")
    has_bf16 = flow.has_bf16(args.device)
    if args.dtype == "bfloat16" and not has_bf16 and "train" in args.only:
        raise ValueError("--dtype bfloat16: not in this hardware; use float32, or --only attention")
    if args.dtype is None:
        args.dtype = "bfloat16" if has_bf16 else "float32"
    args.dtype = getattr(torch, args.dtype)
    if args.quick:
        args.model = ["tiny"]
        args.side = [64]
        args.seconds = min(args.seconds, 0.5)
    return args


def main(argv=None) -> None:
    args = parse(argv)
    torch.manual_seed(0)

    # Measure what the machine can do.
    rate, bandwidth = ceilings(args.device, args.dtype, args.seconds)
    name = torch.cuda.get_device_name() if args.gpu else torch.backends.cpu.get_cpu_capability()
    print(f"{name}, {torch.get_num_threads()} thread(s), {args.dtype}, torch {torch.__version__}")
    print(f"matrix product {rate / 1e12:.3g} TFLOP/s, copy {bandwidth / 1e9:.3g} GB/s", flush=True)

    # Measure and print one part after the other.
    for part in args.only:
        notes = []
        if part == "attention":
            rows = attention_rows(args, rate, bandwidth, notes)
        else:
            rows = network_rows(part, args, rate, notes)
        if part == "maps":
            say_exponents(rows, notes)
        notes = [textwrap.shorten(note, 200) for note in notes]
        print(f"\n{part}\n", markdown(rows), "", *notes, sep="\n", flush=True)
        if part == "attention" and args.gpu:
            print(f"\nfor RESULTS.md, Speed ({name})\n", results_table(rows), sep="\n", flush=True)


if __name__ == "__main__":
    run_program("bench.py", main, "stopped, nothing written")
