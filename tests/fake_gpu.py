"""How often a training step of train.py waits for the GPU, counted on a fake one.

    python tests/fake_gpu.py small small-jepa

The real loop runs on tensors that have shapes and a device but no numbers (torch's FakeTensorMode,
on a device that is registered here and called "gpu"). A line per model: its name, then the stops of
each step between the first and the last. It runs in a process of its own, because a device cannot
be unregistered.
"""

import contextlib
import itertools
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).parent.parent))
import small_runs

import flow
import jepa
import train
import train_config
import train_log
import train_objectives
import train_optim
import train_ranks
import train_resume
from train_config import PRETRAINING

_setup_privateuseone_for_python_backend("gpu")
DEVICE = torch.device("gpu", 0)
STEPS = 3
aten = torch.ops.aten


class Stops(TorchDispatchMode):
    """Counts what the host waits for: a number that it reads, and a copy between GPU and host that
    is not `non_blocking`."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].device == DEVICE:
            self.count += 1
            return args[0].dtype == torch.bool or 1.0

        # `copy_` has non_blocking as its third argument.
        result = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            waits = True not in (kwargs.get("non_blocking"), *args[2:])
            tensors = [x for x in tree_leaves((args, result)) if torch.is_tensor(x)]
            self.count += waits and len({x.device for x in tensors}) > 1
        return result


class OnGpu(train_ranks.Ranks):
    def __init__(self):
        super().__init__()
        self.device = DEVICE


def built_on_gpu(cfg):
    with DEVICE:
        net = train_objectives.build(cfg)
    # Tables that were made on the CPU go along.
    for module in net.modules():
        for name, table in module.named_buffers(recurse=False):
            setattr(module, name, table.to(DEVICE))
    return net


def with_numbers(function):
    """A function that needs numbers, and stays on the CPU, in the mode in which there are none."""

    def on_cpu(*args):
        with unset_fake_temporarily():
            x = function(*args)
        return torch.empty_like(x)

    return on_cpu


def stops_per_step(model: str) -> list[int]:
    """The stops of each step between the first and the last."""
    cfg = small_runs.PRESETS[model]
    maps = 2 if cfg.objective == "sharpen" else 1
    item = torch.zeros(cfg.crops_per_map, maps, *[cfg.crop] * 3)
    batch = torch.stack([item] * (cfg.micro_batch // cfg.crops_per_map))
    counts = []
    set_rates = train.set_rates

    def begin_step(*args):
        counts.append(stops.count)
        return set_rates(*args)

    # What a fake GPU cannot do, and what the first and the last step do beside training.
    patches = {
        train: dict(
            Ranks=OnGpu,
            set_rates=begin_step,
            datasets=lambda *_: ([item], [item] * 100),
            start_loader=lambda *_: itertools.repeat(batch),
            speed_of=lambda *_: None,
            stop_failed_run=lambda *_: None,
            held_out_losses=lambda *_: [1.0],
            grey_scale=mock.Mock(),
        ),
        train_optim: dict(has_fused=lambda _: True),
        train_resume: dict(build=built_on_gpu, network_for_use=lambda *_: None),
        train_resume.Checkpoints: dict(save=lambda *_: None),
        train_log.Log: dict(write=lambda *_: None),
        flow: dict(has_bf16=lambda _: False, autocast=lambda *_: contextlib.nullcontext()),
        torch: dict(autocast=lambda *_, **__: contextlib.nullcontext()),
        torch.nn.Module: dict(to=lambda module, _: module),
        torch.nn.init: dict(trunc_normal_=lambda x, **_: x),  # draws again until numbers are small
    }
    # Histograms are made in pieces, by the kind of device.
    patches[jepa] = dict(PIECE={DEVICE.type: jepa.PIECE["cuda"]})
    if cfg.objective in PRETRAINING:  # masks are drawn on the CPU, with numbers
        patches[jepa] |= dict(block_masks=with_numbers(jepa.block_masks))
        patches[train_config] = dict(fitting_sides=with_numbers(jepa.fitting_sides))
    else:  # times and noise are drawn on the GPU
        patches[train]["noise_generator"] = lambda *_: None
    with contextlib.ExitStack() as stack:
        for place, changes in patches.items():
            stack.enter_context(mock.patch.multiple(place, **changes))
        out = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stops = stack.enter_context(Stops())
        flags = ["--model", model, "--out", f"{out}/a", "--steps", str(STEPS)]
        train.main([*flags, "--log-every", "100", "--eval-every", "100"])
    return [after - before for before, after in zip(counts[1:], counts[2:])]


if __name__ == "__main__":
    train.PRESETS.update(small_runs.PRESETS)
    for name in sys.argv[1:]:
        print(name, *stops_per_step(name))
