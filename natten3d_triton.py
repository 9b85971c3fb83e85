"""GPU kernels of neighbourhood attention, in Triton: forward, dq, and dk with dv.

Equation numbers are those of natten3d.py.
"""
import functools
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:                                   # comes with CUDA builds of torch, else pip install triton
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"   # Triton then runs the kernels in numpy, on the CPU
TILE = 4                                              # queries per axis in a tile


def window_starts(length: int, k: int) -> list[int]:
    return [min(max(i - k // 2, 0), length - k) for i in range(length)]               # (1)


def sees(length: int, k: int) -> Tensor:
    """(queries, keys) of one axis, True where (1) holds."""
    start, j = torch.tensor(window_starts(length, k))[:, None], torch.arange(length)
    return (start <= j) & (j < start + k)


# --- Triton: one program per tile (of TILE^3 rows) and head. It goes through the tile's columns, the tokens that share
# a window with any of its rows, N at a time. Rows are queries and columns keys in the forward and dq kernels, the
# other way round for dk and dv. Tables say which tokens these are, so the kernels know nothing of three dimensions: a
# row carries 3 of 12 bits, its place in the tile along z, y, x; a column carries the bits of all places along z, y, x
# that pair with it; row and column are a pair if the row's bits are among the column's.

@functools.lru_cache(64)
def tables(grid: tuple, kernel: tuple, device: torch.device, rows_are_keys: bool) -> tuple[Tensor, ...]:
    """int32: row, row_bits (tiles, TILE^3), column, column_bits (tiles, most), columns (tiles,).

    A tile has columns[tile] columns, the rest of its line is padding. A row outside the grid is -1.
    """
    row, row_bits, column, column_bits = [], [], [], []
    for axis, (length, k) in enumerate(zip(grid, kernel)):
        bit = 1 << (TILE * axis + torch.arange(TILE))
        pairs = sees(length, k).T if rows_are_keys else sees(length, k)
        pairs = F.pad(pairs, (0, 0, 0, -length % TILE)).unflatten(0, (-1, TILE))      # (tiles, TILE, L)
        bits = (pairs * bit[:, None]).sum(1)                                          # (tiles, L)
        most = (bits > 0).sum(1).max()
        column.append((bits == 0).int().sort(stable=True).indices[:, :most])          # columns with bits come first
        column_bits.append(bits.gather(1, column[-1]))
        row.append(torch.arange(len(bits) * TILE).view(-1, TILE))
        row_bits.append(bit * (row[-1] < length))

    def outer(function, z, y, x):                     # (tiles, m) along z, y, x -> (all tiles, all m)
        full = function(z[:, None, None, :, None, None], y[:, None, None, :, None], x[:, None, None, :])
        return full.flatten(3).flatten(0, 2).int()

    token = lambda z, y, x: (z * grid[1] + y) * grid[2] + x
    either = lambda z, y, x: z | y | x
    all_three = lambda z, y, x: (z > 0) & (y > 0) & (x > 0)
    inside, real = outer(all_three, *row_bits), outer(all_three, *column_bits)
    order = real.sort(dim=1, descending=True, stable=True).indices                    # padding goes last
    most = int(real.sum(1).max())
    found = (outer(token, *row).masked_fill(inside == 0, -1), outer(either, *row_bits),
             outer(token, *column).gather(1, order)[:, :most], outer(either, *column_bits).gather(1, order)[:, :most],
             real.sum(1).int())
    return tuple(t.contiguous().to(device) for t in found)


if triton is not None:
    configs = [triton.Config({"N": N}, num_warps=warps, num_stages=stages)
               for N in (32, 64, 128) for warps in (4, 8) for stages in (2, 3)]
    tuned = triton.autotune(configs[:1] if INTERPRETED else configs, key=["T", "n", "d"])

    LOG2_E = tl.constexpr(1.4426950408889634)         # exp2 and log2 are the faster instructions

    @triton.jit
    def load_tokens(token, bits, at, count, N: tl.constexpr):
        """N entries of a table from position `at`; beyond `count` the token is -1 and has no bits."""
        i = tl.arange(0, N)
        return tl.load(token + at + i, mask=i < count, other=-1), tl.load(bits + at + i, mask=i < count, other=0)

    @triton.jit
    def load(x, token, n, d: tl.constexpr, P: tl.constexpr):
        """(tokens, P): the d numbers of each token of a head; 0 where the token is -1 or past d."""
        i = tl.arange(0, P)
        return tl.load(x + token[:, None] * (n * d) + i, mask=(token[:, None] >= 0) & (i < d), other=0.0)

    @triton.jit
    def store(x, token, value, n, d: tl.constexpr, P: tl.constexpr):
        i = tl.arange(0, P)
        tl.store(x + token[:, None] * (n * d) + i, value.to(x.dtype.element_ty), mask=(token[:, None] >= 0) & (i < d))

    @triton.jit
    def product(a, b):                                # sums in float32; float32 factors are not cut to tf32
        return tl.dot(a, b, input_precision="ieee")

    @tuned
    @triton.jit
    def forward_kernel(q, k, v, out, lse, row, row_bits, column, column_bits, columns, scale, T, n, most,
                       d: tl.constexpr, P: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
        tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)                  # head of B * n
        at = ((head // n) * T * n + head % n) * d
        i, bits = load_tokens(row, row_bits, tile * M, M, M)
        q_i = load(q + at, i, n, d, P)
        top, total = tl.full([M], -1e30, tl.float32), tl.zeros([M], tl.float32)
        o_i = tl.zeros([M, P], tl.float32)
        count = tl.load(columns + tile)
        for first in range(0, count, N):
            j, seen_by = load_tokens(column, column_bits, tile * most + first, count - first, N)
            k_j, v_j = load(k + at, j, n, d, P), load(v + at, j, n, d, P)
            s = product(q_i, tl.trans(k_j)) * (scale * LOG2_E)
            s = tl.where((bits[:, None] & seen_by) == bits[:, None], s, -float("inf"))
            higher = tl.maximum(top, tl.max(s, 1))    # online softmax: sums so far are in units of exp2(top)
            p, shrink = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)
            total = total * shrink + tl.sum(p, 1)                                     # (2)
            o_i = o_i * shrink[:, None] + product(p.to(v_j.dtype), v_j)               # (3)
            top = higher
        store(out + at, i, o_i / total[:, None], n, d, P)
        tl.store(lse + head * T + i, top + tl.log2(total), mask=i >= 0)

    @tuned
    @triton.jit
    def dq_kernel(grad, q, k, v, out, lse, delta, dq, row, row_bits, column, column_bits, columns, scale, T, n, most,
                  d: tl.constexpr, P: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
        tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
        at = ((head // n) * T * n + head % n) * d
        i, bits = load_tokens(row, row_bits, tile * M, M, M)
        q_i, g_i = load(q + at, i, n, d, P), load(grad + at, i, n, d, P)
        lse_i = tl.load(lse + head * T + i, mask=i >= 0, other=0.0)
        delta_i = tl.sum(g_i.to(tl.float32) * load(out + at, i, n, d, P).to(tl.float32), 1)            # (5)
        tl.store(delta + head * T + i, delta_i, mask=i >= 0)                          # for dkv_kernel
        dq_i = tl.zeros([M, P], tl.float32)
        count = tl.load(columns + tile)
        for first in range(0, count, N):
            j, seen_by = load_tokens(column, column_bits, tile * most + first, count - first, N)
            k_j, v_j = load(k + at, j, n, d, P), load(v + at, j, n, d, P)
            s = product(q_i, tl.trans(k_j)) * (scale * LOG2_E)
            p = tl.where((bits[:, None] & seen_by) == bits[:, None], tl.exp2(s - lse_i[:, None]), 0.0)  # (2)
            ds = p * (product(g_i, tl.trans(v_j)) - delta_i[:, None])                 # (5)
            dq_i += product(ds.to(k_j.dtype), k_j)                                    # (6)
        store(dq + at, i, dq_i * scale, n, d, P)

    @tuned
    @triton.jit
    def dkv_kernel(grad, q, k, v, lse, delta, dk, dv, row, row_bits, column, column_bits, columns, scale, T, n, most,
                   d: tl.constexpr, P: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
        tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
        at = ((head // n) * T * n + head % n) * d
        j, bits = load_tokens(row, row_bits, tile * M, M, M)                          # rows are keys here,
        k_j, v_j = load(k + at, j, n, d, P), load(v + at, j, n, d, P)
        dk_j, dv_j = tl.zeros([M, P], tl.float32), tl.zeros([M, P], tl.float32)
        count = tl.load(columns + tile)
        for first in range(0, count, N):
            i, seen = load_tokens(column, column_bits, tile * most + first, count - first, N)
            q_i, g_i = load(q + at, i, n, d, P), load(grad + at, i, n, d, P)
            lse_i = tl.load(lse + head * T + i, mask=i >= 0, other=0.0)
            delta_i = tl.load(delta + head * T + i, mask=i >= 0, other=0.0)
            s = product(k_j, tl.trans(q_i)) * (scale * LOG2_E)                        # so s is (keys, queries)
            p = tl.where((bits[:, None] & seen) == bits[:, None], tl.exp2(s - lse_i), 0.0)             # (2)
            dv_j += product(p.to(g_i.dtype), g_i)                                     # (4)
            ds = p * (product(v_j, tl.trans(g_i)) - delta_i)                          # (5)
            dk_j += product(ds.to(q_i.dtype), q_i)                                    # (6)
        store(dk + at, j, dk_j * scale, n, d, P)
        store(dv + at, j, dv_j, n, d, P)


def launch(kernel_function, tensors: Sequence[Tensor], table: Sequence[Tensor], scale: float) -> None:
    B, D, H, W, n, d = tensors[0].shape
    with torch.cuda.device_of(tensors[0]):            # Triton launches on the current GPU; no effect on the CPU
        kernel_function[len(table[0]), B * n](*tensors, *table, scale, D * H * W, n, table[2].shape[1], d=d,
                                              P=max(16, triton.next_power_of_2(d)), M=TILE**3)


def fused(q: Tensor, k: Tensor, v: Tensor, kernel: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    lse = q.new_empty(len(q), q.shape[4], *q.shape[1:4], dtype=torch.float32)         # log2 of the sums of (2)
    launch(forward_kernel, (q, k, v, out, lse), tables(tuple(q.shape[1:4]), tuple(kernel), q.device, False), scale)
    return out, lse


def fused_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kernel: Sequence[int],
                   scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    by_query, by_key = (tables(tuple(q.shape[1:4]), tuple(kernel), q.device, keys) for keys in (False, True))
    launch(dq_kernel, (grad, q, k, v, out, lse, delta, dq), by_query, scale)         # writes delta too
    launch(dkv_kernel, (grad, q, k, v, lse, delta, dk, dv), by_key, scale)
    return dq, dk, dv


