"""How fast this code is, beside its peers and beside what the machine can do: `python bench.py`; `python bench.py --gpu`.

    useful FLOPs of neighbourhood attention: 4 B T k^3 n d forward, 3.5 times that with the backward pass               (1)
    its least traffic: q, k, v in, o out: 4 B T n d numbers; three times that with the backward pass                    (2)
    floors: (1) / (measured rate of a matrix product), (2) / (measured rate of a copy)                                  (3)
    utilisation of a training step: 3 F maps/s / (measured rate of a matrix product), F the FLOPs of a forward pass     (4)

(1): two matrix products of 2 T k^3 d each, and five in the backward pass, one of them again. (2): q, k, v, o, g in, dq, dk, dv
out. What a tile's halo or activation checkpointing computes on top is not useful and does not count.

Attention: each peer alternates with na3d, in one process; medians, and the median of the pairs' ratios ("na3d" with itself: what
noise does). All take and return (B, D, H, W, n, d): permutes count. Tables, masks, tuning and compilation come before and are
shown apart. Error: |a - b| / |b| of one head against float64, of the output and of the worst of dq, dk, dv. Times: on a GPU the
kernels' own, from a cold L2 cache; on one CPU thread the process's CPU time, which others on the machine disturb less.
The rest, a training step (a CPU gives S and L one crop instead of 128), a posterior-sampling step and a SCUNet tile, each in a
process of its own, so that peak memory is its own.

A peer that cannot run, or would take too long, is a dash with the reason under the table.
"""
import argparse
import copy
import csv
import functools
import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
import degrade
import flow
import fourier
import model_hdit
import model_scunet
import natten3d
import natten3d_triton
import posterior
import train_config
import train_dry_run
import train_objectives
import train_optim

HERE = Path(__file__).parent


# ---- Clocks and ceilings -----------------------------------------------------------------------------------------------

@functools.lru_cache(1)
def large(device: torch.device) -> Tensor:
    return torch.empty(2**28, device=device)


def seconds(function, device: torch.device, kernels_only: bool = False) -> float:
    """Of one call. kernels_only (GPU): without launches, which the CPU makes while the GPU empties its cache by writing 1 GiB."""
    if device.type == "cuda" and kernels_only:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        large(device).zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    wait()
    begin = clock()
    function()
    wait()
    return clock() - begin


def median_seconds(function, device: torch.device, budget: float, most: int = 20) -> float:
    """After one call to warm up; that call itself if it used up the budget (seconds)."""
    first = seconds(function, device)
    return statistics.median([seconds(function, device) for _ in range(min(most, int(budget / first)))] or [first])


def ceilings(device: torch.device, dtype: torch.dtype, budget: float) -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s of a large copy, each byte read and written), measured."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    source, target = torch.randn(2, 2**28 if device.type == "cuda" else 2**26, device=device)
    rate = 2 * n**3 / median_seconds(lambda: a @ b, device, budget)
    return rate, 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, budget)


# ---- Attention: who competes. Each prepares for a shape (q for its device and dtype) and returns attention(q, k, v) --------

def ours(grid, kernel, q: Tensor):
    natten3d.plan.cache_clear(), natten3d_triton.tables.cache_clear(), natten3d.whole_bias.cache_clear()
    return lambda q, k, v: natten3d.na3d(q, k, v, kernel)


def dense(grid, kernel, q: Tensor):
    """Every pair of tokens, with the mask as numbers of q's dtype, which is faster than booleans."""
    mask = natten3d.whole_bias.__wrapped__(grid, kernel, q.dtype, q.device)            # (T, T)

    def attention(q, k, v):
        q, k, v = (t.flatten(1, 3).transpose(1, 2) for t in (q, k, v))                 # (B, n, T, d)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).unflatten(1, grid)
    return attention


def flex(grid, kernel, q: Tensor, tile=(1, 1, 1)):
    """Compiled flex_attention, tokens in raster order or tile by tile: a tile of 128 is one of its blocks, which is compact."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    (a, b, c), (nz, ny, nx) = tile, (length // t for length, t in zip(grid, tile))

    def place(i):                                        # z, y, x of the i-th token
        t, r = i // (a * b * c), i % (a * b * c)
        return t // (ny * nx) * a + r // (b * c), t // nx % ny * b + r // c % b, t % nx * c + r % c

    def seen(batch, head, i, j):
        inside = i >= 0
        for at, key, length, k in zip(place(i), place(j), grid, kernel):
            start = (at - k // 2).clamp(0, length - k)
            inside = inside & (key >= start) & (key < start + k)
        return inside

    i = torch.arange(math.prod(grid))
    count = torch.stack([seen(0, 0, rows[:, None], i).view(128, -1, 128).sum((0, 2)) for rows in i.split(128)])
    blocks = [t[None, None].to(q.device) for some in ((0 < count) & (count < 128**2), count == 128**2)     # in part; whole
              for t in (some.sum(-1).int(), some.int().sort(dim=-1, descending=True, stable=True).indices.int())]
    mask = BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=128, mask_mod=seen)
    torch.compiler.reset()                               # many shapes would reach the limit beyond which it runs uncompiled
    compiled = torch.compile(functools.partial(flex_attention, block_mask=mask), fullgraph=True, dynamic=False)

    def attention(q, k, v):
        B, *_, n, d = q.shape
        q, k, v = (t.view(B, nz, a, ny, b, nx, c, n, d).permute(0, 7, 1, 3, 5, 2, 4, 6, 8).reshape(B, n, -1, d) for t in (q, k, v))
        out = compiled(q, k, v).view(B, n, nz, ny, nx, a, b, c, d)
        return out.permute(0, 2, 5, 3, 6, 4, 7, 1, 8).reshape(B, *grid, n, d)
    return attention


def natten(grid, kernel, q: Tensor):
    """NATTEN's own kernels: on a CPU those of 0.17; on a GPU those of 0.20 or later, with the fastest of their tile shapes."""
    import natten as library
    if q.device.type == "cpu":
        from natten.functional import na3d_av, na3d_qk

        def attention(q, k, v):
            q, k, v = (t.permute(0, 4, 1, 2, 3, 5).contiguous() for t in (q, k, v))    # (B, n, D, H, W, d)
            p = na3d_qk(q * q.shape[-1] ** -0.5, k, kernel).softmax(-1)
            return na3d_av(p, v, kernel).permute(0, 2, 3, 4, 1, 5).contiguous()
        return attention

    def fastest(choices, run):
        times = [(run(c), statistics.median(seconds(lambda: run(c), q.device, True) for _ in range(5)))[1] for c in choices]
        return choices[times.index(min(times))]
    hopper = library.get_configs_for_cutlass_hopper_fna(q, q, q)
    tiles = hopper or [(shapes, None) for shapes in library.get_configs_for_cutlass_fna(q, q, q)]
    backward = (library.get_bwd_configs_for_cutlass_hopper_fna if hopper else library.get_bwd_configs_for_cutlass_fna)(q, q, q)
    if not tiles:
        raise RuntimeError("NATTEN has no kernel for this GPU, shape and dtype")
    x, run = q.detach().requires_grad_(), functools.partial(library.na3d, kernel_size=kernel)
    chosen = fastest([dict(backend="hopper-fna" if hopper else "cutlass-fna", q_tile_shape=a, kv_tile_shape=b, kernel_schedule=s)
                      for (a, b), s in tiles], lambda c: run(x.detach(), x.detach(), x.detach(), **c))
    chosen |= fastest([dict(backward_q_tile_shape=a, backward_kv_tile_shape=b) for a, b in backward],
                      lambda c: torch.autograd.grad(run(x, x, x, **chosen, **c), x, q))
    return functools.partial(run, **chosen)


WHO = {"na3d": ours, "dense SDPA with a mask": dense, "flex, raster order": flex,
       "flex, tiles of 4x4x8": functools.partial(flex, tile=(4, 4, 8)), "NATTEN": natten}


# ---- Attention: errors and times -----------------------------------------------------------------------------------------

def exact(q: Tensor, k: Tensor, v: Tensor, g: Tensor, kernel) -> list[Tensor]:
    """Output, dq, dk, dv of one head (D, H, W, d) in float64, window by window."""
    grid, d = q.shape[:3], q.shape[3]
    z, y, x = (torch.tensor(natten3d.window_starts(length, k))[:, None] + torch.arange(k) for length, k in zip(grid, kernel))
    token = lambda z, y, x: (z * grid[1] + y) * grid[2] + x
    windows = token(z[:, None, None, :, None, None], y[:, None, None, :, None], x[:, None, None, :]).flatten(3).flatten(0, 2)
    q, k, v, g = (t.detach().cpu().double().reshape(-1, d).requires_grad_() for t in (q, k, v, g))
    out = []
    for rows in torch.arange(len(q)).split(1024):        # their windows (rows, k^3, d) are 180 MB
        p = (torch.einsum("id,ijd->ij", q[rows], k[windows[rows]]) * d ** -0.5).softmax(-1)
        out.append(torch.einsum("ij,ijd->id", p, v[windows[rows]]))
        out[-1].backward(g[rows].detach())
    return [t.detach().view(*grid, d) for t in (torch.cat(out), q.grad, k.grad, v.grad)]


def shapes(args) -> list[tuple[str, int, int, int]]:
    """(name, side of the grid, n, d) of every neighbourhood level of the models."""
    if args.quick:
        return [("quick", 16, 1, 32)]
    return [(f"{name} level {level}", cfg.crop // cfg.net.patch_size // 2**level, width // cfg.net.d_head, cfg.net.d_head)
            for name in args.model for cfg in [train_config.PRESETS[name]] for level, width in enumerate(cfg.net.widths[:-1])]


def useful_flops(q: Tensor, kernel) -> dict[str, float]:
    """(1)"""
    forward = 4 * q.numel() * math.prod(kernel)
    return {"forward": forward, "forward+backward": 3.5 * forward}


def attention(args, device: torch.device, dtype: torch.dtype, rate: float, bandwidth: float, notes: list[str]) -> list[dict]:
    rows = []
    natten3d.attention(*torch.zeros(3, 1, 4, 4, 4, 1, 16), [3] * 3, 1.0, False)        # the first operator imports torch's compiler
    for (name, side, n, d), B in itertools.product(shapes(args), (1, 4, 16) if args.gpu and not args.quick else (1,)):
        grid, kernel, what = (side,) * 3, (min(7, side),) * 3, f"{name}: {B} x {side}^3 x {n} x {d}"
        q, k, v, g = torch.randn(4, B, *grid, n, d, device=device).to(dtype)
        want = exact(*(t[0, ..., 0, :] for t in (q, k, v, g)), kernel)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        useful, traffic = useful_flops(q, kernel), {"forward": 4 * q.nbytes, "forward+backward": 12 * q.nbytes}    # (2)
        own, timed = {which: [] for which in useful}, functools.partial(seconds, device=device, kernels_only=True)

        def run(function, which):
            if which == "forward+backward":
                return torch.autograd.grad(function(q, k, v), leaves, g)
            with torch.no_grad():
                return [function(q.detach(), k.detach(), v.detach())]                  # flex refuses leaves on a CPU even here

        def measure(who, function, which, row):          # fills in the row
            expected = 3.5e-3 * (row["forward ms"] or 0)
            if who != "na3d" and expected > 10 * args.seconds:
                raise TimeoutError(f"about {expected:.0f} s a call (--seconds)")
            begin = time.perf_counter()
            heads = [t[0, ..., 0, :].cpu().double() for t in run(function, which)]     # waits for the GPU
            first = time.perf_counter() - begin
            error = max(float((a - b).norm() / b.norm()) for a, b in zip(heads, want[1:] if len(heads) == 3 else want))
            mine, theirs = (lambda: run(na3d, which)), (lambda: run(function, which))
            count = max(1, min(20, int(args.seconds / (timed(mine) + timed(theirs)))))
            pairs = [(timed(mine), timed(theirs)) for _ in range(count)]
            own[which] += [a for a, _ in pairs]
            t = statistics.median(b for _, b in pairs)
            row |= {f"{which} ms": 1e3 * t, f"{which} / na3d": statistics.median(b / a for a, b in pairs),
                    f"{which} TFLOP/s": useful[which] / t / 1e12,
                    "output error" if which == "forward" else "gradient error": error,
                    "set-up s": (row["set-up s"] or 0) + max(0, first - t)}

        for who, build in WHO.items():
            columns = [f"{which} {column}" for column in ("ms", "/ na3d", "TFLOP/s") for which in useful]
            row = dict(shape=what, who=who) | dict.fromkeys((*columns, "output error", "gradient error", "set-up s"))
            rows.append(row)
            try:
                begin = time.perf_counter()
                function = build(grid, kernel, q)
                row["set-up s"] = time.perf_counter() - begin
                na3d = function if who == "na3d" else na3d
                for which in useful:
                    measure(who, function, which, row)
            except (ImportError, RuntimeError, TimeoutError) as error:
                if who == "na3d":
                    raise
                notes.append(f"{what}, {who}{', backward' if row['forward ms'] else ''}: {reason(error)}")
            print(f"{what}, {who}:", " / ".join(cell(row[f"{which} ms"]) for which in useful), "ms", file=sys.stderr, flush=True)
            function = None                              # a dense mask may be gigabytes
        for which, times in own.items():                 # na3d again, over all pairs
            t = statistics.median(times)
            rows[-len(WHO)] |= {f"{which} ms": 1e3 * t, f"{which} TFLOP/s": useful[which] / t / 1e12}
        for who, floor, ceiling in (("floor: FLOPs", useful, rate), ("floor: bytes", traffic, bandwidth)):    # (3)
            rows.append(dict(shape=what, who=who) | {f"{which} ms": 1e3 * floor[which] / ceiling for which in useful})
    return rows


def reason(error: BaseException) -> str:
    """One line; torch.compile wraps what it met."""
    inner = error.__cause__ or error
    return (str(inner).splitlines() or [type(inner).__name__])[0][:160]


# ---- Networks: a training step, a posterior-sampling step, a tile ----------------------------------------------------------

def peak(device: torch.device) -> float:
    """GiB, of this process alone: a child's ru_maxrss begins with what its parent had in memory, Linux's VmHWM does not."""
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        return train_dry_run.peak_memory(device.type == "cuda")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 2**20


def train_step(name: str, args, device: torch.device) -> dict:
    """As in train.py: forward, backward, clip, optimisers, averaged weights."""
    cfg = replace(train_config.PRESETS[name], crops_per_map=1, bf16=args.dtype == "bfloat16")
    cfg = replace(cfg, batch=2 if args.quick else cfg.batch if args.gpu or name == "tiny" else 1)
    accumulate, micro = train_objectives.split_batch(cfg, 1)
    net = model_hdit.HDiT(cfg.net).to(device)
    ema, optimizers = copy.deepcopy(net).requires_grad_(False), train_optim.optimizers(net, cfg)
    velocity = torch.compile(net) if args.compile else net
    x_0 = torch.randn(micro, 1, *[cfg.crop] * 3, device=device)

    def step():
        for _ in range(accumulate):
            with flow.autocast(device, cfg.bf16):
                loss = flow.loss(velocity, x_0, law=cfg.time_law) / accumulate
            loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        train_optim.update_ema(ema, net, 1000, cfg.ema_decay)

    t, flops = median_seconds(step, device, 6 * args.seconds, 5), 6 * train_dry_run.multiply_adds(cfg.net, cfg.crop)
    return {"step": f"{accumulate} x {micro} x {cfg.crop}^3", "who": f"{name}, {'compiled' if args.compile else 'eager'}", "s": t,
            "maps/s": cfg.batch / t, "TFLOP per map": flops / 1e12, "TFLOP/s": flops * cfg.batch / t / 1e12,
            "peak GiB": peak(device)}


def sampling_step(name: str, args, device: torch.device) -> dict:
    """As in posterior.sample_posterior: the network on every tile, the data term, noise."""
    cfg = train_config.PRESETS[name]
    if name == "tiny":
        prior = checkpoint.load(HERE / "weights/hdit_tiny.pt", kind="hdit", device=device)
    else:                                                # untrained: speed does not depend on the weights
        net = model_hdit.HDiT(cfg.net).to(device).eval().requires_grad_(False)
        prior = checkpoint.Prior(net, "hdit", cfg.voxel_size, cfg.crop, cfg.mean, cfg.std, sha256="")
    side = prior.box if args.quick else max(64, prior.box)
    y, generator = torch.randn(side, side, side, device=device), torch.Generator().manual_seed(0)
    measured = fourier.hermitian_part(degrade.wedge_mask(y.shape)).to(device)
    observation = posterior.Observation(y, measured, 0.0, y)
    step = lambda: posterior.sample_posterior(prior, observation, [generator], steps=1, t_start=0.4, inner=2)
    with torch.no_grad():
        t = median_seconds(step, device, args.seconds)
    return {"step": f"{side}^3 in tiles of {prior.box}^3", "who": name, "s": t, "voxels/s": side**3 / t, "peak GiB": peak(device)}


def scunet_tile(name: str, args, device: torch.device) -> dict:
    net = model_scunet.SCUNet(model_scunet.PRESETS[name]).to(device).eval().requires_grad_(False)
    # Not one tile: on a CPU torch then takes its slow convolution for few channels, three times as slow a tile.
    x = torch.randn(32 if args.gpu else 2, 1, *[24 if args.quick else 48] * 3, device=device)
    with torch.no_grad(), flow.autocast(device):
        t = median_seconds(lambda: net(x), device, args.seconds)
    return {"step": f"{len(x)} x {x.shape[-1]}^3", "who": name, "s": t, "voxels/s": x.numel() / t, "peak GiB": peak(device)}


HEAVY = {"train": train_step, "sampling": sampling_step, "scunet": scunet_tile}


def heavy(part: str, args, rate: float, notes: list[str]) -> list[dict]:
    """The rows of a part, each measured in a process of its own."""
    rows, names = [], ["tiny", "paper"] if part == "scunet" else args.model if args.gpu or part == "train" else ["tiny"]
    for name, compiled in itertools.product(names[:1] if args.quick else names, ("", "--compile")):
        if compiled and not (part == "train" and (args.gpu or args.compile)):
            continue
        flags = [compiled] * bool(compiled) + ["--gpu"] * args.gpu + ["--quick"] * args.quick
        command = [sys.executable, __file__, "--only", part, "--child", name, "--dtype", args.dtype, "--seconds", str(args.seconds)]
        what = f"{part}, {name} {compiled}"
        try:
            done = subprocess.run(command + flags, capture_output=True, text=True, timeout=args.limit)
            if done.returncode == 0:
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                continue
            killed = f"exit code {done.returncode} (-9: killed, too little memory as a rule)"
            notes.append(f"{what}: {(done.stderr.strip().splitlines() or [killed])[-1][:160]}")
        except subprocess.TimeoutExpired:
            notes.append(f"{what}: not done after {args.limit:g} s (--limit)")
        rows.append({"step": "-", "who": name})
    for row in rows:
        if "TFLOP/s" in row:
            row["utilisation"] = 1e12 * row["TFLOP/s"] / rate    # (4)
    return rows


# ---- Tables and the command ------------------------------------------------------------------------------------------------

def cell(x: float | str | None) -> str:
    return "-" if x is None else x if isinstance(x, str) else f"{x:,.0f}" if x >= 100 else f"{x:.1e}" if x < 1e-3 else f"{x:.3g}"


def markdown(rows: list[dict]) -> str:
    columns = list(max(rows, key=len))
    lines = [columns, ["---"] * len(columns), *([cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")] or [platform.machine()]
    return f"{names[0]}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"


def parse(argv=None) -> argparse.Namespace:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--only", nargs="+", choices=("attention", *HEAVY), default=("attention", *HEAVY))
    cli.add_argument("--model", nargs="+", choices=("tiny", "s", "l"), default=("tiny", "s", "l"), help="whose shapes and steps")
    cli.add_argument("--gpu", action="store_true", help="CUDA: batches of 1, 4, 16; training steps of 128 maps, eager and compiled")
    cli.add_argument("--quick", action="store_true", help="small shapes: does it run?")
    cli.add_argument("--dtype", choices=("float32", "bfloat16"), help="of attention and training; else bfloat16 where the hardware "
                     "has it. Sampling and SCUNet choose like sampling.py")
    cli.add_argument("--compile", action="store_true", help="training steps with torch.compile too")
    cli.add_argument("--seconds", type=float, default=5, help="for each pair of medians; a call 10 times as long is left out")
    cli.add_argument("--limit", type=float, default=600, help="seconds for each process (training, sampling, SCUNet)")
    cli.add_argument("--csv", default="runs/bench.csv", help="part, what, who, quantity, value")
    cli.add_argument("--child", metavar="NAME", help=argparse.SUPPRESS)
    args = cli.parse_args(argv)
    if args.gpu and not torch.cuda.is_available():
        raise ValueError("--gpu: torch finds no CUDA device here; leave it out to measure the CPU")
    bf16 = flow.has_bf16(torch.device("cuda" if args.gpu else "cpu"))
    args.dtype = args.dtype or ("bfloat16" if bf16 else "float32")
    if args.dtype == "bfloat16" and not bf16 and "train" in args.only:
        raise ValueError("--dtype bfloat16: not in this hardware, training would run in float32; add --only attention")
    if args.quick:
        args.seconds = min(args.seconds, 0.5)
    return args


def main(argv=None) -> None:
    args = parse(argv)
    device, dtype = torch.device("cuda" if args.gpu else "cpu"), getattr(torch, args.dtype)
    torch.manual_seed(0)
    if args.child:
        print(json.dumps(HEAVY[args.only[0]](args.child, args, device)))
        return
    rate, bandwidth = ceilings(device, dtype, args.seconds)
    print(f"{machine(device)}, {args.dtype}, torch {torch.__version__}\n"
          f"matrix product {rate / 1e12:.3g} TFLOP/s, copy {bandwidth / 1e9:.3g} GB/s", flush=True)
    Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
    with open(args.csv, "w", newline="") as file:
        table = csv.writer(file)
        table.writerows([("part", "what", "who", "quantity", "value"), ("machine", machine(device), args.dtype, "FLOP/s", rate),
                         ("machine", machine(device), args.dtype, "copy, bytes/s", bandwidth)])
        for part in args.only:
            notes = []
            rows = attention(args, device, dtype, rate, bandwidth, notes) if part == "attention" else heavy(part, args, rate, notes)
            print(f"\n{part}\n\n{markdown(rows)}\n" + "".join(f"\n{note}" for note in notes), flush=True)
            for row in rows:
                (_, what), (_, who), *values = row.items()
                table.writerows((part, what, who, quantity, value) for quantity, value in values)
            file.flush()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"bench.py: {error}")
