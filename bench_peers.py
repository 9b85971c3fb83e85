"""Neighbourhood attention and its peers: one problem, and every way to compute it at its best.

    FLOPs of neighbourhood attention: 4 B T k^3 n d forward, 3.5 times that with backward       (1)
    its least traffic: 4 B T n d numbers forward (q, k, v, o), three times that with backward   (2)

(1) counts two matrix products of 2 T k^3 d each forward and five backward, one of them done again.
(2) counts q, k, v, o, g read and dq, dk, dv written. Work on the halo of a tile or for activation
checkpointing is not useful and does not count.

The peers are attention over all pairs with a mask, PyTorch's flex_attention and NATTEN. All take
and return (B, D, H, W, n, d), so that the permutes they need count.

Shape letters: B samples; D, H, W tokens along z, y, x; T = D H W; n heads; d numbers per head.
"""

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import natten3d

# FLOPs relative to the forward pass, (1), and tensors read or written, (2).
PASSES = {"forward": (1, 4), "forward+backward": (3.5, 12)}


# ---- Clocks ----


def seconds(function: Callable, device: torch.device) -> float:
    """Time of one call, launches included."""
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter
    begin = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def kernel_seconds(function: Callable, device: torch.device) -> float:
    """Time of one call: on a GPU that of the kernels alone."""
    if device.type != "cuda":
        return seconds(function, device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    # The CPU makes the launches while the GPU empties its cache by writing 1 GiB.
    torch.empty(2**28, device=device).zero_()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


# ---- The problem ----


@dataclass
class Problem:
    """One shape of attention. All tensors are (B, D, H, W, n, d)."""

    name: str
    kernel: tuple
    qkv: list[Tensor]  # leaves
    grad: Tensor  # of the output

    def run(self, attention: Callable, which: str) -> Sequence[Tensor]:
        """The output (which = "forward"), or dq, dk, dv."""
        if which == "forward+backward":
            return torch.autograd.grad(attention(*self.qkv), self.qkv, self.grad)
        # flex refuses leaves on a CPU even where no gradient is wanted, so detach them.
        with torch.no_grad():
            return [attention(*(x.detach() for x in self.qkv))]

    def exact(self) -> dict[str, Sequence[Tensor]]:
        """What `run` should return for the first head, in float64."""
        qkv = [first_head(x).requires_grad_() for x in self.qkv]
        head = Problem(self.name, self.kernel, qkv, first_head(self.grad))
        attention = functools.partial(natten3d.na3d, kernel_size=self.kernel)
        return {which: head.run(attention, which) for which in PASSES}

    def useful_flops(self, which: str) -> float:
        return PASSES[which][0] * 4 * self.grad.numel() * math.prod(self.kernel)  # (1)


def first_head(x: Tensor) -> Tensor:
    """One head of one sample in float64, (1, D, H, W, 1, d)."""
    return x[:1, ..., :1, :].detach().cpu().double()


# ---- The peers: each function prepares for one problem and returns attention(q, k, v) ----


def prepare_na3d(problem: Problem) -> Callable:
    """This project's attention."""
    # Making the tables anew is part of the set-up.
    for cached in (natten3d.plan, natten3d.token_tables, natten3d.cached_whole_bias):
        cached.cache_clear()
    return functools.partial(natten3d.na3d, kernel_size=problem.kernel)


def prepare_dense(problem: Problem) -> Callable:
    """Every pair of tokens, with the mask as numbers of q's dtype, faster than booleans."""
    q = problem.grad  # shaped like q
    bias = natten3d.whole_bias(q.shape[1:4], problem.kernel, q.dtype, q.device)  # (T, T)
    return functools.partial(natten3d.attend_to_all, bias=bias, scale=q.shape[5] ** -0.5)


def prepare_flex(problem: Problem, tile: tuple = (1, 1, 1)) -> Callable:
    """Compiled flex_attention, with tokens in raster order or tile by tile.

    A tile of 128 tokens is one of flex's blocks, which is then compact.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # The grid has nz x ny x nx tiles of a x b x c tokens.
    grid = problem.grad.shape[1:4]
    a, b, c = tile
    nz, ny, nx = (length // side for length, side in zip(grid, tile))

    def coordinates(i):
        """z, y, x of the i-th token: the corner of its tile plus its place in the tile."""
        corner, place = i // (a * b * c), i % (a * b * c)
        z = corner // (ny * nx) * a + place // (b * c)
        y = corner // nx % ny * b + place // c % b
        x = corner % nx * c + place % c
        return z, y, x

    def in_window(query, key, length, k):  # (1) of natten3d.py
        start = (query - k // 2).clamp(0, length - k)
        return (start <= key) & (key < start + k)

    def sees(batch, head, i, j):
        z, y, x = map(in_window, coordinates(i), coordinates(j), grid, problem.kernel)
        return z & y & x

    # flex skips blocks of 128 x 128 scores in which no token sees another.
    T = math.prod(grid)
    mask = create_block_mask(sees, None, None, T, T, device=problem.grad.device)
    # Without a reset many shapes reach the limit beyond which flex runs uncompiled.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def by_tile(t):  # (B, D, H, W, n, d) -> (B, n, T, d)
        t = t.unflatten(3, (nx, c)).unflatten(2, (ny, b)).unflatten(1, (nz, a))
        return t.permute(0, 7, 1, 3, 5, 2, 4, 6, 8).flatten(2, 7)

    def attention(q, k, v):
        out = compiled(by_tile(q), by_tile(k), by_tile(v), block_mask=mask)
        out = out.unflatten(2, (nz, ny, nx, a, b, c))
        return out.permute(0, 2, 5, 3, 6, 4, 7, 1, 8).reshape(q.shape)

    return attention


def prepare_natten(problem: Problem) -> Callable:
    """NATTEN (0.20 or later) on a GPU, with the fastest of its tile shapes for this problem."""
    q = problem.grad  # shaped like q
    if q.device.type == "cpu":
        raise RuntimeError("NATTEN has no CPU kernels since version 0.20")
    import natten

    # List the tile shapes that NATTEN offers on this GPU, forward and backward.
    backend = "hopper-fna"
    forward = natten.get_configs_for_cutlass_hopper_fna(q, q, q)
    backward = natten.get_bwd_configs_for_cutlass_hopper_fna(q, q, q)
    if not forward:
        backend = "cutlass-fna"
        forward = [(shapes, None) for shapes in natten.get_configs_for_cutlass_fna(q, q, q)]
        backward = natten.get_bwd_configs_for_cutlass_fna(q, q, q)

    # Take the fastest pair of a forward and a backward configuration.
    choices = list(itertools.product(forward, backward))
    if not choices:
        raise RuntimeError("NATTEN has no kernel for this GPU, shape and dtype")
    run = functools.partial(natten.na3d, kernel_size=problem.kernel, backend=backend)

    def attention_with(choice: tuple) -> Callable:
        ((q_tile, kv_tile), schedule), (backward_q_tile, backward_kv_tile) = choice
        tiles = dict(q_tile_shape=q_tile, kv_tile_shape=kv_tile, kernel_schedule=schedule)
        tiles["backward_q_tile_shape"] = backward_q_tile
        tiles["backward_kv_tile_shape"] = backward_kv_tile
        return functools.partial(run, **tiles)

    def time_of(choice: tuple) -> float:
        step = functools.partial(problem.run, attention_with(choice), "forward+backward")
        step()  # warm up
        return statistics.median(kernel_seconds(step, q.device) for _ in range(5))

    return attention_with(min(choices, key=time_of))


PEERS = {
    "na3d": prepare_na3d,
    "dense SDPA with a mask": prepare_dense,
    "flex, raster order": prepare_flex,
    "flex, tiles of 4x4x8": functools.partial(prepare_flex, tile=(4, 4, 8)),
    "NATTEN": prepare_natten,
}
