"""One training process among others: ranks, signals, data workers.

torchrun starts one process per GPU and tells each its RANK. Without torchrun there is one process.
All ranks stop together, at the same step, so that the checkpoint is that of all of them.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# SLURM sends SIGUSR1 before the time is up, where asked to.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Ranks:
    """This process and the others that train the same network."""

    def __init__(self):
        # torchrun sets these.
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", self.local_rank) if self.cuda else torch.device("cpu")

    def say(self, *words) -> None:
        """Print, on the first rank only."""
        if self.rank == 0:
            print(*words, flush=True)

    def join(self) -> None:
        """Meet the other ranks. Raises an error if they do not come: no rank trains on alone."""
        if self.cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.cuda else "gloo")

    def leave(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def reduce(self, x: torch.Tensor, operation=dist.ReduceOp.SUM) -> torch.Tensor:
        """x becomes the sum (or minimum) over all ranks; every rank waits for the others here."""
        if self.world > 1:
            dist.all_reduce(x, operation)
        return x

    def wrap(self, net: nn.Module, compile: bool) -> nn.Module:
        """The network as it is called: its gradients are averaged over the ranks."""
        if self.world > 1:
            # torch 2.11 warns about an argument whose new name it does not know.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            net = DistributedDataParallel(
                net,
                device_ids=[self.local_rank] if self.cuda else None,
                broadcast_buffers=False,  # buffers never change
                gradient_as_bucket_view=True,
            )
        return torch.compile(net) if compile else net

    def averaging(self, ddp: nn.Module, last: bool):
        """Context of a backward pass: gradients cross ranks once per step, with the last one."""
        if self.world > 1 and not last:
            return ddp.no_sync()
        return contextlib.nullcontext()


class StopSignals:
    """Catches SIGTERM, Ctrl-C and SIGUSR1, so that the loop can finish its step, save and leave."""

    def __init__(self):
        self.received = False
        self.parent = os.getppid()
        for name in STOP_SIGNALS:
            signal.signal(name, self.receive)

    def receive(self, signum, frame) -> None:
        self.received = True

    def stopping(self) -> bool:
        """Whether a signal came, or torchrun has died and nobody else would end this rank."""
        # A process whose parent has died gets another parent.
        orphaned = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent
        return self.received or orphaned


def start_loader(train_set, items, items_per_batch: int, workers: int):
    """An iterator over batches of the items with these numbers, in this order."""
    atexit.register(end_workers)
    loader = torch.utils.data.DataLoader(
        train_set,
        batch_size=items_per_batch,
        sampler=items,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=8 if workers else None,
        worker_init_fn=ignore_signals,
    )
    return iter(loader)


def ignore_signals(worker: int) -> None:
    """Ctrl-C reaches all processes, but data workers must go on until the loop has ended."""
    for name in STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)


def end_workers() -> None:
    """Kill the data workers: they ignore SIGTERM, so Python's exit would wait for them forever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call their end an error
    for worker in multiprocessing.active_children():
        worker.kill()
