"""One training process among others: ranks, shards, signals, data workers.

torchrun starts one process per GPU and tells each its RANK. Without torchrun there is one process.
All ranks stop together, at the same step, so that the checkpoint is that of all of them.

Every rank holds the whole network (PyTorch's DistributedDataParallel). With --shard each rank holds
a part of every weight (PyTorch's FSDP2, `fully_shard`), and the ranks lend each other the weights
of one block at a time.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from terminal import say

# SLURM sends SIGUSR1 before the time is up, where asked to. A terminal that closes sends SIGHUP.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

MOST_PREFETCHED = 8  # batches that a data worker makes ahead, at most
SHARED_MEMORY = Path("/dev/shm")  # where the batches of data workers lie


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
        self.vote = None  # of the step before, see `agree`
        self.reduced = None  # the last tensor of `reduce`

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
        if self.vote:
            self.vote[1].wait()
        if self.world > 1:
            # Gloo's threads drop their last tensors, for which they need Python's lock. The end of
            # the group waits for these threads and keeps the lock. So let them have it before.
            dist.barrier()
            time.sleep(0.2)
            dist.destroy_process_group()

    def reduce(self, x: torch.Tensor, operation=dist.ReduceOp.SUM) -> torch.Tensor:
        """x becomes the sum (or minimum) over all ranks; every rank waits for the others here."""
        if self.world > 1:
            # Python must let go of a tensor last. Gloo's threads would need its lock for that.
            self.reduced = x
            dist.all_reduce(x, operation)
        return x

    def of_first(self, value: float) -> float:
        """A number of the first rank, on every rank."""
        number = torch.tensor(value if self.rank == 0 else 0.0, dtype=torch.float64)
        return float(self.reduce(number))

    def agree(self, *wishes: bool) -> list[bool]:
        """Whether any rank wished each of these, the same answer on every rank.

        Several ranks get the answer of the step before, so that none waits for another. Nothing
        here is on a GPU, so nobody waits for one either.
        """
        if self.world == 1:
            return list(wishes)

        # Ask now, and read what was asked one step ago.
        before = self.vote
        asked = torch.tensor(wishes, dtype=torch.uint8)
        self.vote = asked, dist.all_reduce(asked, dist.ReduceOp.MAX, async_op=True)
        if before is None:
            return [False] * len(wishes)
        answer, work = before
        work.wait()
        return answer.bool().tolist()

    def wrap(self, net: torch.nn.Module) -> torch.nn.Module:
        """The network as it is called: its gradients are averaged over the ranks."""
        # One process needs no wrapper, and a sharded network does it by itself.
        if self.world == 1 or isinstance(net, FSDPModule):
            return net
        # torch 2.11 warns about an argument whose new name it does not know.
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        return DistributedDataParallel(
            net,
            device_ids=[self.local_rank] if self.cuda else None,
            # Buffers never change, but for the running code_std of a VAE: each rank has its own,
            # and that of the first is saved.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def shard(self, net: torch.nn.Module, blocks: Iterable[torch.nn.Module]) -> None:
        """Leave each rank its part of the weights, on its device: of each block, then of the rest.

        A whole network on the CPU never lies on a GPU whole.
        """
        # It warns that a view comes out of the network. Nobody changes that in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        mesh = init_device_mesh(self.device.type, (self.world,))
        for module in (*blocks, net):
            # True: give weights back after each pass, also of an evaluation that has no backward.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)

    def averaging(self, ddp: torch.nn.Module, last: bool):
        """Context of a backward pass: gradients cross ranks once per step, with the last one."""
        # The passes before it add up their gradients on their own rank.
        if isinstance(ddp, FSDPModule):
            ddp.set_requires_gradient_sync(last)
        elif isinstance(ddp, DistributedDataParallel) and not last:
            return ddp.no_sync()
        return contextlib.nullcontext()


def whole(x: torch.Tensor) -> torch.Tensor:
    """A tensor whose parts lie on all ranks, whole on each of them; any other as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def own_part(x: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor whose parts lie on all ranks; any other as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def parted(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The opposite of `whole`: x, the same on every rank, parted as `like` is."""
    if not isinstance(like, DTensor):
        return x
    x = x.to(like.device)
    # None: every rank has x already, so nothing is sent.
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


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


def prefetched(batch_bytes: int, workers: int) -> int:
    """How many batches each of `workers` processes of a rank may make ahead, from 1.

    Raises ValueError if half of what is free in /dev/shm, shared by the ranks of this machine, does
    not hold one batch of each worker.
    """
    ranks_here = environment_number("LOCAL_WORLD_SIZE", 1)
    free = MOST_PREFETCHED * batch_bytes * workers
    if SHARED_MEMORY.exists():
        disk = os.statvfs(SHARED_MEMORY)
        free = disk.f_bavail * disk.f_frsize // 2 // ranks_here
    count = free // (batch_bytes * workers)
    if count < 1:
        raise ValueError(
            f"--workers {workers}: {ranks_here} rank(s) x {workers} worker(s) x one batch of "
            f"{batch_bytes / 2**20:.0f} MiB do not fit into half of what is free in "
            f"{SHARED_MEMORY}; give fewer --workers, a smaller --micro-batch, or more shared "
            "memory (docker run --shm-size)"
        )
    return min(MOST_PREFETCHED, count)


def start_loader(train_set, items, items_per_batch: int, workers: int, say=print):
    """An iterator over batches of the items with these numbers, in this order.

    Raises ValueError if the shared memory is too small for the batches of the workers.
    """
    # Otherwise Python waits at its exit for workers that never end.
    atexit.register(end_workers)

    # One item tells how large a batch is: a tensor, or windows and rotations.
    prefetch = None
    if workers:
        item = train_set[0]
        parts = [item] if torch.is_tensor(item) else item
        batch_bytes = items_per_batch * sum(part.nbytes for part in parts)
        prefetch = prefetched(batch_bytes, workers)
        say(
            f"data: {workers} worker(s) per rank make up to {prefetch} batches of "
            f"{batch_bytes / 2**20:.1f} MiB ahead, {workers * prefetch * batch_bytes / 2**30:.2f} "
            f"GiB of {SHARED_MEMORY} per rank"
        )

    # Workers make batches ahead. Pages that are pinned reach a GPU while it computes.
    loader = torch.utils.data.DataLoader(
        train_set,
        batch_size=items_per_batch,
        sampler=items,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=prefetch,
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
