"""What a training run would cost: `python train.py --model s --data maps --dry-run`."""

import math
import resource
import sys
import time
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import flow
from model_hdit import HDiTConfig
from train_config import RESTORATIONS, TrainConfig
from train_objectives import build, datasets, losses, split_batch
from train_optim import averaged, optimizers, update_average
from train_resume import start_from

GIB = 2**30


# FLOP/s of tensor cores in bfloat16, without sparsity, by what torch calls the GPU. NVIDIA's data
# sheets of A100, H100, H200 and B200. The first name that fits counts.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


class Speed(NamedTuple):
    """What a run's speed is measured by."""

    precision: str  # of its matrix products: "bf16" or "fp32"
    flop: float  # of a crop, forward and backward; nan where the peak is not known
    peak: float  # FLOP/s of all ranks; nan if not known

    def mfu(self, crops_per_s: float) -> float:
        """Model FLOP utilisation, a share; nan where the peak is not known (PaLM, appendix B)."""
        return crops_per_s * self.flop / self.peak


class Step(NamedTuple):
    """One training step, measured."""

    seconds: float
    loss: float
    kept: int  # bytes that autograd keeps for the backward pass


def multiply_adds(net: HDiTConfig, box: int) -> int:
    """Multiply-adds of one forward pass on box^3 voxels.

    Norms, activations and the time features are left out; they are less than 0.1 %.
    """
    # The outermost level has one token per patch.
    side = box // net.patch_size
    total = 2 * side**3 * net.patch_size**3 * net.widths[0]  # patches in and out
    levels = len(net.depths)
    for level, (depth, width) in enumerate(zip(net.depths, net.widths)):
        # The innermost level attends to all tokens and runs once, the others run down and up.
        innermost = level == levels - 1
        keys = side**3 if innermost else min(net.kernel_size, side) ** 3
        passes = 1 if innermost else 2

        # Of one token: projections and feed-forward, then attention; (3), (5) of model_hdit.
        block = width**2 * (4 + 3 * net.ff_mult) + 2 * keys * width
        total += passes * depth * side**3 * block

        # Merge eight tokens into one on the way down, split them on the way up.
        if not innermost:
            side //= 2
            total += 2 * side**3 * 8 * width * net.widths[level + 1]
    return total


def peak_flops(device: torch.device) -> float:
    """PEAK_FLOPS of a device, nan if it is not listed."""
    if device.type != "cuda":
        return math.nan
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), math.nan)


def speed_of(net, ema, cfg: TrainConfig, device: torch.device, world: int) -> Speed:
    """What the speed of a run on `world` such devices is measured by. All ranks call it together.

    Recomputed activations are not counted: they are no work that the model asks for.
    """
    # The peaks are those of bfloat16.
    bf16 = cfg.bf16 and flow.has_bf16(device)
    peak = peak_flops(device) if bf16 else math.nan
    flop = math.nan
    if not math.isnan(peak):
        maps = 2 if cfg.objective in RESTORATIONS else 1
        x = torch.zeros(1, maps, *[cfg.crop] * 3, device=device)
        flop = 3 * forward_flop(net, ema, x, cfg)  # a backward pass costs two forward passes
    return Speed("bf16" if bf16 else "fp32", flop, world * peak)


def dry_run(cfg: TrainConfig, device: torch.device, world: int, say=print) -> None:
    """Print parameters, FLOP, memory, speed and days of a run, from one step; write nothing.

    world: ranks that the run would have. On a CPU the step takes one crop, on a GPU a micro-batch.
    """
    # The network as a run would begin with it.
    cuda = device.type == "cuda"
    torch.manual_seed(cfg.seed)
    net = build(cfg).to(device)
    if cfg.init:
        start_from(net, cfg, say)

    # A micro-batch of real data.
    parameters = sum(p.numel() for p in net.parameters())
    micro = split_batch(cfg, world)[1]
    crops = micro if cuda else 1

    train_set, _ = datasets(cfg, say)
    items = -(-crops // cfg.crops_per_map)  # rounded up
    x_0 = torch.cat([train_set[i] for i in range(items)])[:crops].to(device)

    # How much arithmetic a crop is.
    forward = forward_flop(net, averaged(net, cfg), x_0, cfg)
    # A backward pass costs two forward passes, and one more where activations are recomputed.
    flop = forward * (4 if cfg.activation_checkpointing else 3)
    say(
        f"{parameters:,} parameters; a map of {cfg.crop}^3: {forward / 1e9:,.0f} GFLOP forward, "
        f"{flop / 1e12:.2f} TFLOP forward and backward"
    )

    # Take the step: memory, time and loss.
    step = measure_step(net, x_0, cfg)
    state = 20 * parameters / GIB  # weights, gradient, average, two moments: 4 bytes each
    if cfg.shard:
        state /= world
    kept = step.kept / crops / GIB
    say(
        f"memory: {state:.1f} GiB for weights, gradient, average and moments, {kept:.2f} GiB for "
        f"the backward pass of each map as run here: {state + micro * kept:.0f} GiB with "
        f"--micro-batch {micro}, before what is temporary"
    )
    note = "" if cuda else ", where a micro-batch of 1 stands for all"
    say(
        f"one step of {crops} crop(s) on {device}{note}: loss {step.loss:.4f}, "
        f"{step.seconds:.2f} s, peak {peak_memory(cuda):.1f} GiB"
    )

    # The whole run, without what the ranks send each other.
    seconds = step.seconds / crops * cfg.batch / world
    where = "here" if world == 1 else f"on {world} ranks like this one"
    say(
        f"so a step of {cfg.batch} takes {seconds:,.1f} s {where}, {cfg.steps:,} steps "
        f"{seconds * cfg.steps / 86400:,.1f} days "
        f"({flop * crops / step.seconds / 1e12:.3g} TFLOP/s)"
    )


def loss_of(net, ema, x: torch.Tensor, cfg: TrainConfig) -> torch.Tensor:
    """The loss of a training step, a scalar."""
    generator = torch.Generator(x.device).manual_seed(cfg.seed)
    return losses(net, ema, x, cfg, generator)[0].mean()


@torch.no_grad()
def forward_flop(net, ema, x: torch.Tensor, cfg: TrainConfig) -> int:
    """FLOP of the forward pass of one crop. Torch cannot count na3d, so HDiT has a formula."""
    if cfg.objective == "flow":
        return 2 * multiply_adds(cfg.net, cfg.crop)
    # Torch counts while it computes.
    with FlopCounterMode(display=False) as counter:
        loss_of(net, ema, x[:1], cfg)
    return counter.get_total_flops()


def measure_step(net, x: torch.Tensor, cfg: TrainConfig) -> Step:
    """Take a training step of the crops x and measure it; on a GPU the second one counts."""
    cuda = x.device.type == "cuda"
    ema = averaged(net, cfg)
    opts = optimizers(net, cfg)
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def weigh(tensor):
        # Several tensors may share one storage: count it once. The weights are there anyway.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unchanged(tensor):
        return tensor

    # The first step on a GPU also loads kernels.
    for _ in range(2 if cuda else 1):
        since = time.perf_counter()
        kept.clear()
        watch = torch.autograd.graph.saved_tensors_hooks(weigh, unchanged)
        with watch, flow.autocast(x.device, cfg.bf16):
            loss = loss_of(net, ema, x, cfg)

        # Backward and update, as the loop of train.py does.
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(ema, net, 1, cfg)
        value = float(loss.detach())  # waits for the GPU
        seconds = time.perf_counter() - since
    return Step(seconds, value, sum(kept.values()))


def peak_memory(cuda: bool) -> float:
    """The most memory that this process has held, in GiB: of the GPU, or resident."""
    if cuda:
        return torch.cuda.max_memory_allocated() / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
