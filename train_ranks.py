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
from torch.nn.parallel import DistributedDataParallel

from terminal import say

# SLURM sends SIGUSR1 before the time is up, where asked to. A terminal that closes sends SIGHUP.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Ranks:
    """This process and the others that train the same network.

    Raises ValueError if the variables that torchrun sets contradict each other.
    """

    def __init__(self):
        # Which of the processes this is, of how many, and which of those on this machine.
        self.rank = environment_number("RANK", 0)
        self.local_rank = environment_number("LOCAL_RANK", 0)
        self.world = environment_number("WORLD_SIZE", 1)
        if self.rank >= self.world:
            raise ValueError(
                f"RANK={self.rank} and WORLD_SIZE={self.world} in the environment: a rank must be "
                "smaller than their number; unset both, or start with torchrun"
            )

        # One GPU for each process of a machine.
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", self.local_rank) if self.cuda else torch.device("cpu")

    def say(self, *words) -> None:
        """Print, on the first rank only. A run goes on if nobody reads any more."""
        if self.rank == 0:
            say(*words)

    def join(self) -> None:
        """Meet the other ranks. Raises an error if they do not come: no rank trains on alone."""
        if self.cuda:
            torch.cuda.set_device(self.device)
        # NCCL for what is on a GPU. Losses and signals are on the CPU.
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.cuda else "gloo")

    def leave(self) -> None:
        """Part from the other ranks, at the end of the run."""
        if self.world > 1:
            dist.destroy_process_group()

    def reduce(self, x: torch.Tensor, operation=dist.ReduceOp.SUM) -> torch.Tensor:
        """x becomes the sum (or minimum) over all ranks; every rank waits for the others here."""
        if self.world > 1:
            dist.all_reduce(x, operation)
        return x

    def wrap(self, net: torch.nn.Module, compile: bool) -> torch.nn.Module:
        """The network as it is called: its gradients are averaged over the ranks."""
        # One process needs no wrapper.
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

    def averaging(self, ddp: torch.nn.Module, last: bool):
        """Context of a backward pass: gradients cross ranks once per step, with the last one."""
        # The passes before it add up their gradients on their own rank.
        if self.world > 1 and not last:
            return ddp.no_sync()
        return contextlib.nullcontext()


def environment_number(name: str, default: int) -> int:
    """An environment variable that is a number from 0. Raises ValueError if it is not."""
    text = os.environ.get(name, str(default))
    # torchrun sets whole numbers, a shell may set anything.
    if not text.isdecimal():
        raise ValueError(
            f"{name}={text} in the environment: must be a number from 0; unset it, or start with "
            "torchrun, which sets it"
        )
    return int(text)


class StopSignals:
    """Catches STOP_SIGNALS, so that the loop can finish its step, save and leave."""

    def __init__(self):
        self.received = False
        self.parent = os.getppid()
        for name in STOP_SIGNALS:
            # `nohup` makes a run ignore SIGHUP, so that it outlives the terminal.
            outlives = name == signal.SIGHUP and signal.getsignal(name) == signal.SIG_IGN
            if not outlives:
                signal.signal(name, self.receive)

    def receive(self, signum, frame) -> None:
        self.received = True

    def stopping(self) -> bool:
        """Whether a signal came, or torchrun has died and nobody else would end this rank."""
        # An orphan gets another parent.
        orphaned = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent
        return self.received or orphaned


def start_loader(train_set, items, items_per_batch: int, workers: int):
    """An iterator over batches of the items with these numbers, in this order."""
    # Otherwise Python waits at its exit for workers that never end.
    atexit.register(end_workers)

    # Workers make batches ahead. Pages that are pinned reach a GPU while it computes.
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
