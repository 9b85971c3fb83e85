"""What a training run would cost: `python train.py --model s --data maps --dry-run`.
"""
import resource
import sys
import time

import torch.utils.flop_counter

import flow
from model_hdit import HDiTConfig
from train_config import TrainConfig
from train_objectives import build, datasets, losses, split_batch
from train_optim import averaged, optimizers, update_average


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


def peak_memory(cuda: bool) -> float:
    """GiB, of this process: on the GPU, or resident."""
    if cuda:
        return torch.cuda.max_memory_allocated() / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024       # bytes, or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30
