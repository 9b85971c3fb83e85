"""Neighbourhood attention in three dimensions: every token attends to a k x k x k window of tokens.

An axis has L tokens and an odd kernel k. Query i sees the keys j of its window,
    s_i <= j < s_i + k,   s_i = clamp(i - k//2, 0, L - k).                              (1)
Near a face the window is shifted inwards. It is never cut or padded, so every query sees k keys.
In three dimensions the window W_i is the product of the windows along z, y, x:
    P_ij = exp(scale <q_i, k_j>) / sum_{j' in W_i} exp(scale <q_i, k_j'>)               (2)
    o_i  = sum_{j in W_i} P_ij v_j                                                      (3)
The backward pass computes P again instead of storing it. For a gradient g = dL/do
    dv_j  = sum_i P_ij g_i                                                              (4)
    dS_ij = P_ij (<g_i, v_j> - delta_i),   delta_i = <g_i, o_i>                         (5)
    dq_i  = scale sum_j dS_ij k_j,   dk_j = scale sum_i dS_ij q_i                       (6)

(1)-(3): Hassani et al. 2023 (arXiv:2204.07143) section 3. CryoFM's HDiT has k = 7.
(4)-(6): Dao et al. 2022 (arXiv:2205.14135) appendix B.
Departure: NATTEN refuses k > L. Here k > L means the whole axis, k = L.

Four ways lead to the same numbers. `reference` is (1)-(3) word for word, and slow. `tiled` turns it
into matrix products in plain PyTorch. The Triton kernels (natten3d_triton.py) never write P to
memory. `attend_to_all` is ordinary attention, for kernels that cover the grid or almost do.

Shape letters: B samples; D, H, W tokens along z, y, x; T = D H W; n heads; d numbers per head.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from natten3d_triton import INTERPRETED, TILE, fused, fused_backward, tables, triton

CHUNK = 2**20  # scores that "tiled" holds at once; more would leave the processor's cache


def na3d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Neighbourhood attention (1)-(3): returns (B, D, H, W, n, d), differentiable once.

    q, k, v: (B, D, H, W, n, d), floating point, at least one token per axis.
    kernel_size: odd, one number or three (z, y, x). scale: 1/sqrt(d) unless given.
    backend: "reference", "tiled" (any device), "triton" (CUDA, d <= 128, not float64) or "auto",
    which is triton where possible and else tiled.
    Under autocast q, k, v are cast to its dtype, as scaled_dot_product_attention does (float64
    stays), otherwise to the widest of the three. With a 16-bit dtype "tiled" rounds the scores
    too, "triton" does not.
    Raises ValueError for unequal shapes, an even kernel, an unknown or impossible backend.
    """
    if q.dim() != 6 or not q.shape == k.shape == v.shape or 0 in q.shape[1:]:
        raise ValueError(
            f"q, k, v are {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; "
            "give three tensors of one shape (B, D, H, W, heads, head_dim)"
        )

    # Clamp the kernel to the grid, and fill in the default scale.
    grid = q.shape[1:4]
    kernel = clamp_kernel(kernel_size, grid)
    scale = q.shape[5] ** -0.5 if scale is None else float(scale)

    # Bring all three to one dtype: that of autocast, or else the widest.
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if torch.is_autocast_enabled(q.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)

    # Choose one of the four ways, and compute.
    backend = choose_backend(backend, q)
    if backend == "reference":
        return reference(q, k, v, kernel, scale)
    if kernel == grid:
        return attend_to_all(q, k, v, None, scale)
    # float64 always goes by tiles, so that tests can check them on small grids.
    if backend == "tiled" and dtype != torch.float64 and hides_few_pairs(grid, kernel):
        # torch.compile cannot see through the cache.
        bias_of = whole_bias if torch.compiler.is_compiling() else cached_whole_bias
        bias = bias_of(grid, kernel, dtype, q.device)
        return attend_to_all(q, k, v, bias, scale)
    return attention(q, k, v, kernel, scale, backend == "triton")[0]


def clamp_kernel(kernel_size: int | Sequence[int], grid: Sequence[int]) -> tuple[int, ...]:
    """The kernel along z, y, x, at most as large as the grid. Raises ValueError if it is even."""
    sizes = (kernel_size,) * 3 if isinstance(kernel_size, int) else tuple(kernel_size)
    if len(sizes) != 3 or any(size < 1 or size % 2 == 0 for size in sizes):
        raise ValueError(
            f"kernel_size is {kernel_size}; give one or three odd numbers, "
            "because a window has a centre"
        )
    return tuple(map(min, sizes, grid))  # Departure


def choose_backend(backend: str, q: Tensor) -> str:
    """What "auto" means for q. Raises ValueError for a backend that is unknown or cannot run."""
    if backend not in ("auto", "reference", "tiled", "triton"):
        raise ValueError(f'backend is "{backend}"; give "auto", "reference", "tiled" or "triton"')
    fits_triton = q.shape[5] <= 128 and q.dtype != torch.float64
    possible = triton is not None and (q.is_cuda or INTERPRETED) and fits_triton
    if backend == "triton" and not possible:
        raise ValueError(
            f'backend "triton" got {q.dtype} on {q.device.type} with head_dim {q.shape[5]}; '
            "it needs the module triton (pip install triton), CUDA, head_dim <= 128, "
            "float32 or narrower"
        )
    if backend == "auto":
        return "triton" if possible and q.is_cuda else "tiled"
    return backend


# ---- Definition: which query sees which key, and attention word for word ----


def window_starts(length: int, k: int) -> list[int]:
    """s_i of (1) for every query of an axis."""
    return [min(max(i - k // 2, 0), length - k) for i in range(length)]


def visible_keys(length: int, k: int) -> Tensor:
    """(queries, keys) of one axis, boolean: True where the query sees the key, (1)."""
    start = torch.tensor(window_starts(length, k))[:, None]
    key = torch.arange(length)
    return (start <= key) & (key < start + k)


def reference(q: Tensor, k: Tensor, v: Tensor, kernel: Sequence[int], scale: float) -> Tensor:
    """(1)-(3), one query after the other."""
    B, D, H, W, n, d = q.shape
    starts = [window_starts(length, size) for length, size in zip((D, H, W), kernel)]
    out = []
    for query in itertools.product(range(D), range(H), range(W)):
        # Cut the window of this query out of the keys and values.
        corner = [start[i] for start, i in zip(starts, query)]
        window = [slice(first, first + size) for first, size in zip(corner, kernel)]
        keys = k[:, *window].reshape(B, -1, n, d)  # (B, k^3, n, d)
        values = v[:, *window].reshape(B, -1, n, d)

        # Take the softmax over the window, and with it the mean of the values.
        scores = scale * torch.einsum("bnd,bjnd->bnj", q[:, *query], keys)
        p = scores.softmax(-1)  # (2)
        out.append(torch.einsum("bnj,bjnd->bnd", p, values))  # (3)
    return torch.stack(out, 1).view(q.shape)


# ---- Attention over all pairs of tokens ----


def hides_few_pairs(grid: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether attention over all pairs is the faster way on a CPU.

    On 8^3 tokens with k = 7 tiles take 1.7 times as long in float32 and 2.4 times in bfloat16
    (AVX-512 BF16; forward and backward 1.7 and 1.4 times). On 16^3 tokens the tiles win.
    """
    T = math.prod(grid)
    return T / math.prod(kernel) <= 1.5 and T * T <= CHUNK


def make_bias(inside: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What to add to the scores: 0 where `inside` is True, else -inf."""
    bias = torch.zeros(inside.shape, dtype=dtype)
    return bias.masked_fill_(~inside, -math.inf).to(device)


@torch.inference_mode(False)  # a tensor made in inference mode could not be used in training
def whole_bias(grid: tuple, kernel: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The bias (T, T) that makes attention over all pairs of tokens neighbourhood attention."""
    # A query sees a key if it does so along all three axes.
    inside = functools.reduce(torch.kron, map(visible_keys, grid, kernel))
    return make_bias(inside, dtype, device)


cached_whole_bias = functools.lru_cache(8)(whole_bias)


def attend_to_all(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention of all tokens to all tokens, with bias (T, T) on the scores."""
    grid = q.shape[1:4]
    q, k, v = (x.flatten(1, 3).transpose(1, 2) for x in (q, k, v))  # (B, n, T, d)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2).unflatten(1, grid)


# ---- Tiled: the plan ----
#
# A tile is a block of neighbouring queries. Its keys are the union of their windows, and a bias
# says which query sees which key. Tiles that are translates of one another form a group: they
# share the bias, and their queries and keys are strided views of the volume. A group is a few
# batched matrix products, so no loop runs over tokens.


class Blocks(NamedTuple):
    """Blocks of `length` neighbouring tokens along an axis, one beginning at each of `starts`."""

    starts: range
    length: int

    def first(self) -> slice:
        """The tokens of the first block."""
        return slice(self.starts[0], self.starts[0] + self.length)


class Group(NamedTuple):
    """Tiles that share one bias."""

    queries: Sequence[Blocks]  # along z, y, x
    keys: Sequence[Blocks]
    bias: Tensor  # (queries of a tile, its keys): 0 in the window, -inf outside
    masked: bool  # whether anything is outside


def axis_groups(length: int, k: int) -> list[tuple[Blocks, Blocks]]:
    """Cut one axis into tiles: groups as (queries, keys)."""
    # By (1) the first k//2 + 1 queries share one window, and so do the last. These edges need no
    # mask and form one group. If k is the length, all queries share one window.
    edge = length if k == length else k // 2 + 1
    last = length - edge  # where the last edge begins
    edge_keys = Blocks(range(0, length - k + 1, max(1, length - k)), k)

    # Cut a large edge into several tiles.
    pieces = math.ceil(edge / (2 * TILE))
    piece = math.ceil(edge / pieces)
    groups = []
    for first in range(0, edge, piece):
        starts = range(first, first + last + 1, max(1, last))
        groups.append((Blocks(starts, min(piece, edge - first)), edge_keys))

    # Between the edges come tiles of TILE queries, then what is left.
    full, rest = divmod(last - edge, TILE)
    inner = range(edge, last, TILE)
    for starts, size in ((inner[:full], TILE), (inner[full:], rest)):
        if starts:
            key_starts = range(starts.start - k // 2, starts.stop - k // 2, TILE)
            groups.append((Blocks(starts, size), Blocks(key_starts, size + k - 1)))
    return groups


def split_group(axes: Sequence[tuple[Blocks, Blocks]], most: int) -> list:
    """Halve a group along its first axis with several tiles, until a part has `most` or one."""
    # Count the tiles along every axis.
    counts = [len(queries.starts) for queries, _ in axes]
    if math.prod(counts) <= max(most, 1):
        return [axes]
    axis = next(axis for axis in range(3) if counts[axis] > 1)
    half = counts[axis] // 2

    # Cut queries and keys alike, and the halves again if they are still too large.
    parts = []
    for tiles in (slice(half), slice(half, None)):
        part = list(axes)
        part[axis] = [Blocks(blocks.starts[tiles], blocks.length) for blocks in axes[axis]]
        parts += split_group(part, most)
    return parts


@functools.lru_cache(64)
def plan(
    grid: tuple, kernel: tuple, dtype: torch.dtype, device: torch.device
) -> tuple[list[Group], int]:
    """The groups that make up a grid, and the number of heads whose scores together fit CHUNK."""
    groups = []
    most_scores = 1
    for axes in itertools.product(*map(axis_groups, grid, kernel)):
        # All tiles of a group look alike, so the first one tells which query sees which key.
        visible = [
            visible_keys(length, k)[queries.first(), keys.first()]
            for length, k, (queries, keys) in zip(grid, kernel, axes)
        ]
        inside = functools.reduce(torch.kron, visible)
        bias = make_bias(inside, dtype, device)

        # Cut large groups, so that the scores of one head fit CHUNK.
        for part in split_group(axes, CHUNK // bias.numel()):
            queries, keys = zip(*part)
            groups.append(Group(queries, keys, bias, not inside.all()))
            tile_count = math.prod(len(blocks.starts) for blocks in keys)
            most_scores = max(most_scores, tile_count * bias.numel())
    return groups, max(1, CHUNK // most_scores)


# ---- Tiled: the computation ----


def tile_view(x: Tensor, blocks: Sequence[Blocks]) -> Tensor:
    """x (n, D, H, W, d) -> a view (n, tiles z, y, x, tokens of a tile z, y, x, d)."""
    for axis, (starts, length) in enumerate(blocks, start=1):
        # Cut out what the blocks cover, then make an axis of blocks and one of their tokens.
        covered = starts[-1] + length - starts[0]
        x = x.narrow(axis, starts[0], covered).unfold(axis, length, starts.step)
    return x.movedim(4, -1)


def gather_tiles(x: Tensor, blocks: Sequence[Blocks]) -> Tensor:
    """x (n, D, H, W, d) -> a batch of matrices (n * tiles, tokens of a tile, d)."""
    view = tile_view(x, blocks)
    return view.reshape(view.shape[:4].numel(), -1, x.shape[-1])


def write_tiles(x: Tensor, blocks: Sequence[Blocks], matrices: Tensor) -> None:
    """The inverse of gather_tiles, for tiles that do not overlap (queries)."""
    view = tile_view(x, blocks)
    view.copy_(matrices.view(view.shape))


def add_tiles(x: Tensor, blocks: Sequence[Blocks], matrices: Tensor) -> None:
    """The adjoint of gather_tiles, for tiles that overlap (keys).

    Every c-th tile of an axis is added at once, with c so large that these do not overlap. The
    order of the sum is fixed, so two runs agree bit by bit.
    """
    view = tile_view(x, blocks)
    matrices = matrices.view(view.shape)

    # Two blocks overlap if the next one starts before this one ends.
    strides = [min(len(b.starts), math.ceil(b.length / b.starts.step)) for b in blocks]  # c
    for first in itertools.product(*map(range, strides)):
        apart = [slice(i, None, c) for i, c in zip(first, strides)]
        view[:, *apart].add_(matrices[:, *apart])


def head_parts(count: int, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Yield views (count, D, H, W, d) of all tensors: `count` heads of one sample at a time.

    So neither the memory nor the rounding of a sample depends on the rest of the batch.
    """
    B, _, _, _, n, _ = tensors[0].shape
    for sample in range(B):
        for head in range(0, n, count):
            yield [x[sample, ..., head : head + count, :].movedim(3, 0) for x in tensors]


def probabilities(q: Tensor, k: Tensor, group: Group, scale: float) -> Tensor:
    """(2) for matrices q (tiles, queries, d) and k (tiles, keys, d)."""
    return torch.baddbmm(group.bias, q, k.mT, beta=group.masked, alpha=scale).softmax(-1)


def tiled(q: Tensor, k: Tensor, v: Tensor, kernel: Sequence[int], scale: float) -> Tensor:
    """(3) for all queries, a group of tiles at a time."""
    out = torch.empty_like(q)
    groups, head_count = plan(q.shape[1:4], tuple(kernel), q.dtype, q.device)
    for *parts, out_part in head_parts(head_count, q, k, v, out):
        # Tiles overlap, so they are gathered faster from a contiguous copy.
        q_part, k_part, v_part = (part.contiguous() for part in parts)
        for group in groups:
            q_tiles = gather_tiles(q_part, group.queries)
            k_tiles = gather_tiles(k_part, group.keys)
            v_tiles = gather_tiles(v_part, group.keys)
            p = probabilities(q_tiles, k_tiles, group, scale)  # (2)
            write_tiles(out_part, group.queries, torch.bmm(p, v_tiles))  # (3)
    return out


def tiled_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kernel: Sequence[int], scale: float
) -> list[Tensor]:
    """dq, dk, dv of (4)-(6), a group of tiles at a time."""
    # Compute delta and the sums over tiles in float32 at least.
    wide = torch.promote_types(q.dtype, torch.float32)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    groups, head_count = plan(q.shape[1:4], tuple(kernel), q.dtype, q.device)
    for parts in head_parts(head_count, q, k, v, grad, out, *gradients):
        q_part, k_part, v_part, g_part = (part.contiguous() for part in parts[:4])
        out_part, dq_part, dk_part, dv_part = parts[4:]
        delta = (g_part.to(wide) * out_part).sum(-1, keepdim=True)  # (5)
        delta = delta.to(q.dtype)
        dk_sum = torch.zeros_like(k_part, dtype=wide)
        dv_sum = torch.zeros_like(v_part, dtype=wide)

        for group in groups:
            # Gather what the tiles of this group need.
            q_tiles = gather_tiles(q_part, group.queries)
            g_tiles = gather_tiles(g_part, group.queries)
            delta_tiles = gather_tiles(delta, group.queries)
            k_tiles = gather_tiles(k_part, group.keys)
            v_tiles = gather_tiles(v_part, group.keys)

            # Compute the probabilities again, then the gradients of this group.
            p = probabilities(q_tiles, k_tiles, group, scale)  # (2)
            add_tiles(dv_sum, group.keys, torch.bmm(p.mT, g_tiles))  # (4)
            ds = torch.bmm(g_tiles, v_tiles.mT).sub_(delta_tiles).mul_(p)  # (5)
            write_tiles(dq_part, group.queries, torch.bmm(ds, k_tiles).mul_(scale))  # (6)
            add_tiles(dk_sum, group.keys, torch.bmm(ds.mT, q_tiles))  # (6), scaled below
        # The sums over tiles are complete: scale those of dk, and round both.
        dk_part.copy_(dk_sum.mul_(scale))
        dv_part.copy_(dv_sum)
    return gradients


# ---- The operator: one opaque node for torch.compile and autograd ----
#
# It runs outside autocast, because na3d has chosen the dtype already, and on contiguous tensors.


@functools.lru_cache(64)
def token_tables(grid: tuple, kernel: tuple, device: torch.device) -> tuple[list[Tensor], ...]:
    """What the Triton kernels need of (1): tables with queries as rows, and with keys as rows."""
    sees = [visible_keys(length, k) for length, k in zip(grid, kernel)]
    seen = [axis.T for axis in sees]
    return tables(sees, device), tables(seen, device)


@torch.library.custom_op("cryo::na3d", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, kernel: Sequence[int], scale: float, use_triton: bool
) -> tuple[Tensor, Tensor]:
    """(3), and `lse`: log2 of the sums in (2), which only the Triton backward pass needs."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    with torch.autocast(q.device.type, enabled=False):
        if not use_triton:
            return tiled(q, k, v, kernel, scale), q.new_empty(0)
        by_query, _ = token_tables(q.shape[1:4], tuple(kernel), q.device)
        return fused(q, k, v, scale, by_query)


@torch.library.custom_op("cryo::na3d_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kernel: Sequence[int],
    scale: float,
    use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of (4)-(6), from the gradient of the output and what the forward pass saved."""
    grad, q, k, v = (x.contiguous() for x in (grad, q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        if not use_triton:
            return tuple(tiled_backward(grad, q, k, v, out, kernel, scale))
        by_query, by_key = token_tables(q.shape[1:4], tuple(kernel), q.device)
        return fused_backward(grad, q, k, v, out, lse, scale, by_query, by_key)


# Shapes and dtypes of the results, for torch.compile.
@attention.register_fake
def fake_attention(q, k, v, kernel, scale, use_triton):
    B, D, H, W, n, d = q.shape
    lse = q.new_empty(B, n, D, H, W, dtype=torch.float32) if use_triton else q.new_empty(0)
    return q.new_empty(q.shape), lse


@attention_backward.register_fake
def fake_backward(grad, q, k, v, out, lse, kernel, scale, use_triton):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def save_for_backward(ctx, inputs, output):
    q, k, v, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output)


def backward(ctx, grad, _):  # `lse` has no gradient, and neither have the settings
    gradients = attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return *gradients, None, None, None


attention.register_autograd(backward, setup_context=save_for_backward)
