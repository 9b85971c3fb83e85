"""GPU kernels of neighbourhood attention, in Triton: forward, dq, and dk with dv.

The equation numbers are those of natten3d.py, which also says which query sees which key.

One program computes one tile of one head. A tile is a block of TILE^3 tokens, the rows of a matrix.
The program goes through the tile's columns, N at a time: these are the tokens that share a window
with any of its rows. In the forward and dq kernels rows are queries and columns are keys. In the
dk, dv kernel it is the other way round. The probabilities P are never written to memory.

Tables say which tokens the rows and columns are, so the kernels know nothing of three dimensions.
A row carries 3 of 12 bits, for its places in the tile along z, y, x. A column carries the bits of
all places that it pairs with. So a row and a column are a pair, that is, one is a query that sees
the other, a key, if the row's bits are among the column's.

Shape letters: B samples, T tokens, n heads, d numbers per head; P is d, padded to a power of two;
M = TILE^3 rows.
"""

import itertools
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

try:
    import triton
    import triton.language as tl
except ImportError:  # comes with CUDA builds of torch, else pip install triton
    triton = None

# With TRITON_INTERPRET=1 Triton runs the kernels in numpy, on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TILE = 4  # tokens per axis in a tile


# ---- Tables ----


def tables(pairs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """int32: row (tiles, 2, TILE^3), column (tiles, 2, most), columns (tiles,).

    row and column hold tokens and their bits. A row outside the grid is -1. A tile has
    columns[tile] columns, and padding after them.
    pairs: (rows, columns) boolean along z, y, x, whether a row and a column are a pair.
    """
    D, H, W = (len(axis) for axis in pairs)
    place_bits = 1 << torch.arange(3 * TILE).view(3, TILE)  # of the places along z, y, x

    # Cut the grid into tiles of rows.
    row = torch.arange(D * H * W).view(D, H, W)
    row = F.pad(row, (0, -W % TILE, 0, -H % TILE, 0, -D % TILE), value=-1)
    for axis in range(3):
        row = row.unfold(axis, TILE, TILE)
    row = row.flatten(3).flatten(0, 2)  # (tiles, TILE^3)

    # A row gets the bits of its places along z, y and x, and none outside the grid.
    z, y, x = place_bits
    row_bits = (z[:, None, None] | y[:, None] | x).flatten() * (row >= 0)

    # Along each axis a column gets the bits of all rows of a tile that it pairs with.
    axis_bits = []
    for axis_pairs, bits in zip(pairs, place_bits):
        padded = F.pad(axis_pairs, (0, 0, 0, -len(axis_pairs) % TILE))
        tiles = padded.unflatten(0, (-1, TILE))  # (tiles, TILE, L)
        axis_bits.append((tiles * bits[:, None]).sum(1))  # (tiles, L)

    # The columns of a tile are the tokens that have bits along all three axes.
    column = []
    column_bits = []
    for z_bits, y_bits, x_bits in itertools.product(*axis_bits):
        places = [bits.nonzero().squeeze(1) for bits in (z_bits, y_bits, x_bits)]
        z, y, x = torch.meshgrid(*places, indexing="ij")
        column.append(((z * H + y) * W + x).flatten())
        column_bits.append((z_bits[z] | y_bits[y] | x_bits[x]).flatten())

    # Pad the columns of all tiles to one length.
    columns = torch.tensor([len(tokens) for tokens in column])

    row = torch.stack((row, row_bits), 1)
    column = torch.stack(
        [pad_sequence(part, batch_first=True) for part in (column, column_bits)], 1
    )
    return [table.int().contiguous().to(device) for table in (row, column, columns)]


# ---- Kernels ----

# N, warps and stages of the candidates: Triton times those that are offered, and keeps the fastest.
CANDIDATES = tuple(itertools.product((16, 32, 64, 128), (4, 8), (2, 3)))


def is_offered(N: int, warps: int, P: int, number_bytes: int, backward: bool) -> bool:
    """Whether a candidate fits the registers of a thread (255) on sm_80, sm_90 and sm_100.

    It follows what ptxas says (tests/benchmark_compile.py): a program with more columns than these
    keeps some of its numbers in memory, which is slow. Shared memory is never the limit. It holds
    for d = 64, of all presets. With float32, d = 32 or 128 spills up to 40 bytes on some GPUs.
    number_bytes: of a number of q. backward: a kernel of the gradients, which has more sums.
    """
    if number_bytes == 4:
        # Tensor cores cut float32, so other instructions are used, which need more registers.
        return N == 16 and warps == 8
    most = 64 if backward else 128
    return 32 <= N <= most * 64 // max(P, 64)


if triton is not None:

    def offered_configs(configs, arguments, P, **others):
        """The candidates for a call, which Triton describes by its arguments."""
        facts = (P, arguments["q"].element_size(), "grad" in arguments)
        return [c for c in configs if is_offered(c.kwargs["N"], c.num_warps, *facts)]

    configs = [
        triton.Config({"N": N}, num_warps=warps, num_stages=stages)
        for N, warps, stages in CANDIDATES
    ]
    if INTERPRETED:  # warps and stages mean nothing to the interpreter
        configs = [triton.Config({"N": 32})]
    tuned = triton.autotune(
        configs, key=["T", "n", "d"], prune_configs_by={"early_config_prune": offered_configs}
    )

    LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 and log2 are the faster instructions

    @triton.jit
    def head_offset(head, T, n, d):
        """Where a head (of B * n) begins in a (B, T, n, d) tensor."""
        return ((head // n) * T * n + head % n) * d

    @triton.jit
    def load_tokens(table, size, first, count, N: tl.constexpr):
        """N tokens and their bits from place `first` of a table (2, size).

        From place `count` on the token is -1 without bits.
        """
        i = first + tl.arange(0, N)
        token = tl.load(table + i, mask=i < count, other=-1)
        bits = tl.load(table + size + i, mask=i < count, other=0)
        return token, bits

    @triton.jit
    def load_numbers(x, token):
        """(tokens,): one number per token of a head; 0 where the token is -1."""
        return tl.load(x + token, mask=token >= 0, other=0.0)

    @triton.jit
    def load_vectors(x, token, n, d: tl.constexpr, P: tl.constexpr):
        """(tokens, P): the d numbers of each token of a head; 0 where the token is -1 or past d."""
        i = tl.arange(0, P)
        exists = (token[:, None] >= 0) & (i < d)
        return tl.load(x + token[:, None] * (n * d) + i, mask=exists, other=0.0)

    @triton.jit
    def store_vectors(x, token, value, n, d: tl.constexpr, P: tl.constexpr):
        """The inverse of load_vectors."""
        i = tl.arange(0, P)
        exists = (token[:, None] >= 0) & (i < d)
        tl.store(x + token[:, None] * (n * d) + i, value.to(x.dtype.element_ty), mask=exists)

    @triton.jit
    def are_pairs(row_bits, column_bits):
        """(rows, columns): whether the row's bits are among the column's."""
        return (row_bits[:, None] & column_bits) == row_bits[:, None]

    @triton.jit
    def matrix_product(a, b):
        """The product with sums in float32; float32 factors are not cut to tf32."""
        return tl.dot(a, b, input_precision="ieee")

    @tuned
    @triton.jit
    def forward_kernel(
        q,
        k,
        v,
        out,
        lse,
        row,
        column,
        columns,
        scale,
        T,
        n,
        most,
        d: tl.constexpr,
        P: tl.constexpr,
        M: tl.constexpr,
        N: tl.constexpr,
    ):
        tile = tl.program_id(0)
        head = tl.program_id(1).to(tl.int64)
        offset = head_offset(head, T, n, d)

        # Load the queries of this tile.
        i, bits = load_tokens(row + tile * 2 * M, M, 0, M, M)
        q_i = load_vectors(q + offset, i, n, d, P)

        # Online softmax: `top` is the largest score so far, and the sums so far are in units of
        # exp2(top).
        top = tl.full([M], -1e30, tl.float32)
        total = tl.zeros([M], tl.float32)
        o_i = tl.zeros([M, P], tl.float32)
        column += tile * 2 * most
        count = tl.load(columns + tile)
        for first in range(0, count, N):
            # Load the next N keys and values.
            j, seen_by = load_tokens(column, most, first, count, N)
            k_j = load_vectors(k + offset, j, n, d, P)
            v_j = load_vectors(v + offset, j, n, d, P)

            # Compute the scores; a query does not see keys outside its window.
            s = matrix_product(q_i, tl.trans(k_j)) * (scale * LOG2_E)
            s = tl.where(are_pairs(bits, seen_by), s, -float("inf"))

            # Express the sums so far in units of the new largest score, and continue them.
            higher = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(p, 1)  # (2)
            o_i = o_i * shrink[:, None] + matrix_product(p.to(v_j.dtype), v_j)  # (3)
            top = higher

        # Divide by the sums, and keep their log2 for the backward pass.
        store_vectors(out + offset, i, o_i / total[:, None], n, d, P)
        tl.store(lse + head * T + i, top + tl.log2(total), mask=i >= 0)

    @tuned
    @triton.jit
    def dq_kernel(
        grad,
        q,
        k,
        v,
        out,
        lse,
        delta,
        dq,
        row,
        column,
        columns,
        scale,
        T,
        n,
        most,
        d: tl.constexpr,
        P: tl.constexpr,
        M: tl.constexpr,
        N: tl.constexpr,
    ):
        tile = tl.program_id(0)
        head = tl.program_id(1).to(tl.int64)
        offset = head_offset(head, T, n, d)

        # Load what belongs to the queries of this tile.
        i, bits = load_tokens(row + tile * 2 * M, M, 0, M, M)
        q_i = load_vectors(q + offset, i, n, d, P)
        g_i = load_vectors(grad + offset, i, n, d, P)
        o_i = load_vectors(out + offset, i, n, d, P)
        lse_i = load_numbers(lse + head * T, i)

        # Compute delta, and store it for dkv_kernel.
        delta_i = tl.sum(g_i.to(tl.float32) * o_i.to(tl.float32), 1)  # (5)
        tl.store(delta + head * T + i, delta_i, mask=i >= 0)

        # Go through the keys that the queries see.
        dq_i = tl.zeros([M, P], tl.float32)
        column += tile * 2 * most
        count = tl.load(columns + tile)
        for first in range(0, count, N):
            # Load the next N keys and values.
            j, seen_by = load_tokens(column, most, first, count, N)
            k_j = load_vectors(k + offset, j, n, d, P)
            v_j = load_vectors(v + offset, j, n, d, P)

            # Compute the probabilities again, then their gradient.
            s = matrix_product(q_i, tl.trans(k_j)) * (scale * LOG2_E)
            p = tl.where(are_pairs(bits, seen_by), tl.exp2(s - lse_i[:, None]), 0.0)  # (2)
            ds = p * (matrix_product(g_i, tl.trans(v_j)) - delta_i[:, None])  # (5)
            dq_i += matrix_product(ds.to(k_j.dtype), k_j)  # (6)
        store_vectors(dq + offset, i, dq_i * scale, n, d, P)

    @tuned
    @triton.jit
    def dkv_kernel(
        grad,
        q,
        k,
        v,
        lse,
        delta,
        dk,
        dv,
        row,
        column,
        columns,
        scale,
        T,
        n,
        most,
        d: tl.constexpr,
        P: tl.constexpr,
        M: tl.constexpr,
        N: tl.constexpr,
    ):
        tile = tl.program_id(0)
        head = tl.program_id(1).to(tl.int64)
        offset = head_offset(head, T, n, d)

        # Load the keys and values of this tile. Rows are keys here.
        j, bits = load_tokens(row + tile * 2 * M, M, 0, M, M)
        k_j = load_vectors(k + offset, j, n, d, P)
        v_j = load_vectors(v + offset, j, n, d, P)

        # Go through the queries that see the keys.
        dk_j = tl.zeros([M, P], tl.float32)
        dv_j = tl.zeros([M, P], tl.float32)
        column += tile * 2 * most
        count = tl.load(columns + tile)
        for first in range(0, count, N):
            # Load what belongs to the next N queries.
            i, sees = load_tokens(column, most, first, count, N)
            q_i = load_vectors(q + offset, i, n, d, P)
            g_i = load_vectors(grad + offset, i, n, d, P)
            lse_i = load_numbers(lse + head * T, i)
            delta_i = load_numbers(delta + head * T, i)

            # Compute the probabilities again, then their gradient; both are (keys, queries).
            s = matrix_product(k_j, tl.trans(q_i)) * (scale * LOG2_E)
            p = tl.where(are_pairs(bits, sees), tl.exp2(s - lse_i), 0.0)  # (2)
            dv_j += matrix_product(p.to(g_i.dtype), g_i)  # (4)
            ds = p * (matrix_product(v_j, tl.trans(g_i)) - delta_i)  # (5)
            dk_j += matrix_product(ds.to(q_i.dtype), q_i)  # (6)

        # The sums over all queries are complete.
        store_vectors(dk + offset, j, dk_j * scale, n, d, P)
        store_vectors(dv + offset, j, dv_j, n, d, P)


# ---- Launches ----


def launch(kernel, tensors: Sequence[Tensor], table: Sequence[Tensor], scale: float) -> None:
    """Run one program per tile and head. tensors[0] is (B, D, H, W, n, d)."""
    # A grid of programs (tiles, heads of all samples), and the numbers that they need.
    B, D, H, W, n, d = tensors[0].shape
    row, column, _ = table
    programs = (len(row), B * n)
    sizes = (D * H * W, n, column.shape[2])
    P = max(16, triton.next_power_of_2(d))
    # Triton launches on the current GPU. This line has no effect on a CPU.
    with torch.cuda.device_of(tensors[0]):
        kernel[programs](*tensors, *table, scale, *sizes, d=d, P=P, M=TILE**3)


def fused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, by_query: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """(3), and log2 of the sums of (2), (B, n, D, H, W). by_query: tables, queries are rows."""
    B, D, H, W, n, _ = q.shape
    out = torch.empty_like(q)
    lse = q.new_empty(B, n, D, H, W, dtype=torch.float32)
    launch(forward_kernel, (q, k, v, out, lse), by_query, scale)
    return out, lse


def fused_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    by_query: Sequence[Tensor],
    by_key: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of (4)-(6). by_key: tables, keys are rows."""
    dq = torch.empty_like(q)
    dk = torch.empty_like(k)
    dv = torch.empty_like(v)
    delta = torch.empty_like(lse)
    # dq_kernel also writes delta, which dkv_kernel reads.
    launch(dq_kernel, (grad, q, k, v, out, lse, delta, dq), by_query, scale)
    launch(dkv_kernel, (grad, q, k, v, lse, delta, dk, dv), by_key, scale)
    return dq, dk, dv
