"""Neighbourhood attention in three dimensions: every token attends to a k x k x k window of tokens.

On an axis of L tokens with an odd kernel k (k > L is taken as L) query i sees the keys j of its window
    s_i <= j < s_i + k,   s_i = clamp(i - k//2, 0, L - k),                                      (1)
shifted inwards near a face, never cut or padded: every query sees exactly k keys. In three dimensions the
window W_i is the product of the windows along z, y, x. With scale 1/sqrt(d) unless another is given,
    P_ij = exp(scale <q_i, k_j>) / sum_{j' in W_i} exp(scale <q_i, k_j'>)     for j in W_i      (2)
    o_i  = sum_j P_ij v_j                                                                       (3)
and for a gradient g = dL/do, with P computed again instead of stored,
    dv_j = sum_i P_ij g_i                                                                       (4)
    dS_ij = P_ij (<g_i, v_j> - delta_i),   delta_i = <g_i, o_i>                                 (5)
    dq_i = scale sum_j dS_ij k_j,   dk_j = scale sum_i dS_ij q_i                                (6)

(1)-(3): Hassani et al. 2023 (arXiv:2204.07143) section 3; CryoFM's HDiT has k = 7. (4)-(6): Dao et al. 2022
(arXiv:2205.14135) appendix B. Departure: NATTEN refuses k > L, here it means the whole axis.

Four ways to the same numbers: `reference` is (1)-(3) word for word; `tiled` makes matrix products of it in plain
PyTorch; the Triton kernels never write P to memory; and a kernel that covers the grid is ordinary attention.
Shape letters: B samples, D H W tokens along z y x, T = D H W, n heads, d numbers per head.
"""

import functools
import itertools
import math
from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from natten3d_triton import INTERPRETED, TILE, fused, fused_backward, sees, triton, window_starts

CHUNK = 2**20                                         # scores that "tiled" holds at once: more would leave the cache


def na3d(q: Tensor, k: Tensor, v: Tensor, kernel_size: int | Sequence[int], *, scale: float | None = None,
         backend: str = "auto") -> Tensor:
    """Neighbourhood attention, (1)-(3).

    q, k, v: (B, D, H, W, heads, head_dim), floating point, at least one token per axis.
    kernel_size: odd; one number or three (z, y, x). scale: 1/sqrt(head_dim) unless given.
    backend: "reference", "tiled" (any device), "triton" (CUDA, head_dim <= 128, not float64) or "auto": triton
    where it can be, else tiled. Returns (B, D, H, W, heads, head_dim), differentiable once.
    Under autocast q, k, v are cast to its dtype, as scaled_dot_product_attention does (float64 stays); otherwise to
    the widest of the three. With a 16-bit dtype "tiled" rounds the scores too, "triton" does not.
    Raises ValueError for unequal shapes, a kernel that is not odd, an unknown or impossible backend.
    """
    if q.dim() != 6 or not q.shape == k.shape == v.shape or 0 in q.shape[1:]:
        raise ValueError(f"q, k, v are {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; "
                         "give three tensors of one shape (B, D, H, W, heads, head_dim)")
    sizes = (kernel_size,) * 3 if isinstance(kernel_size, int) else tuple(kernel_size)
    if len(sizes) != 3 or any(size < 1 or size % 2 == 0 for size in sizes):
        raise ValueError(f"kernel_size is {kernel_size}; give one or three odd numbers: a window has a centre")
    if backend not in ("auto", "reference", "tiled", "triton"):
        raise ValueError(f'backend is "{backend}"; give "auto", "reference", "tiled" or "triton"')
    device, grid, d = q.device.type, q.shape[1:4], q.shape[5]
    dtype = functools.reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype))
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    possible = triton and (device == "cuda" or INTERPRETED) and d <= 128 and dtype != torch.float64
    if backend == "triton" and not possible:
        raise ValueError(f'backend "triton" got {dtype} on {device} with head_dim {d}; it needs the module triton '
                         "(pip install triton), CUDA, head_dim <= 128, float32 or narrower")
    if backend == "auto":
        backend = "triton" if possible and device == "cuda" else "tiled"

    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    kernel = [min(size, length) for size, length in zip(sizes, grid)]
    scale = d ** -0.5 if scale is None else float(scale)
    if backend == "reference":
        return reference(q, k, v, kernel, scale)
    everything = kernel == list(grid)
    # On small grids with few hidden pairs (8^3 tokens and k = 7) attention over all pairs is up to 20 % faster than
    # tiles in float32 on a CPU; in bfloat16 the tiles win by 25 %.
    T = math.prod(grid)
    almost = backend == "tiled" and dtype == torch.float32 and T <= 1.5 * math.prod(kernel) and T * T <= CHUNK
    if everything or almost:
        make = whole_bias.__wrapped__ if torch.compiler.is_compiling() else whole_bias    # torch.compile sees no caches
        mask = None if everything else make(tuple(grid), tuple(kernel), dtype, q.device)
        q, k, v = (t.flatten(1, 3).transpose(1, 2) for t in (q, k, v))                # (B, n, T, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return out.transpose(1, 2).unflatten(1, grid)
    return attention(q, k, v, kernel, scale, backend == "triton")[0]


def reference(q: Tensor, k: Tensor, v: Tensor, kernel: Sequence[int], scale: float) -> Tensor:
    """(1)-(3), one query after the other."""
    B, D, H, W, n, d = q.shape
    starts = [window_starts(length, size) for length, size in zip((D, H, W), kernel)]
    out = []
    for query in itertools.product(range(D), range(H), range(W)):
        window = [slice(start[i], start[i] + size) for start, i, size in zip(starts, query, kernel)]
        keys, values = (t[:, *window].reshape(B, -1, n, d) for t in (k, v))           # (B, k^3, n, d)
        p = (scale * torch.einsum("bnd,bjnd->bnj", q[:, *query], keys)).softmax(-1)   # (2)
        out.append(torch.einsum("bnj,bjnd->bnd", p, values))                          # (3)
    return torch.stack(out, 1).view(q.shape)


# --- Tiled: a tile is a block of neighbouring queries, its keys the union of their windows; a mask tells who sees
# what. Tiles that are translates of one another form a group: they share the mask, and their queries and keys are
# strided views of the volume, so that a group is a few batched matrix products. No loop below runs over tokens.

class Span(NamedTuple):
    """`count` blocks of `length` tokens along an axis; the first begins at `start`, the next `step` further."""
    count: int
    start: int
    step: int
    length: int


class Group(NamedTuple):
    queries: tuple[Span, Span, Span]                  # along z, y, x
    keys: tuple[Span, Span, Span]
    bias: Tensor                                      # (queries of a tile, its keys): 0 in the window, -inf outside
    masked: bool                                      # whether anything is outside


def axis_groups(length: int, k: int) -> list[tuple[Span, Span]]:
    """Cut one axis into tiles: groups as (queries, keys).

    By (1) the first k//2 + 1 queries share one window and so do the last: tiles without mask, at either end alike. (If
    k is the length, all queries share it.) Between them come tiles of TILE queries, then what is left.
    """
    ends, edge = (1, length) if k == length else (2, k // 2 + 1)
    piece = math.ceil(edge / math.ceil(edge / (2 * TILE)))                            # large edges: several tiles
    groups = [(Span(ends, first, length - edge, min(piece, edge - first)), Span(ends, 0, max(1, length - k), k))
              for first in range(0, edge, piece)]
    full, rest = divmod(length - ends * edge, TILE)
    if full:
        groups.append((Span(full, edge, TILE, TILE), Span(full, 1, TILE, TILE + k - 1)))
    if rest:
        groups.append((Span(1, length - edge - rest, 1, rest), Span(1, length - k - rest, 1, rest + k - 1)))
    return groups


@functools.lru_cache(8)
@torch.inference_mode(False)                          # else one made in inference could not be used in training
def whole_bias(grid: tuple, kernel: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(T, T), for attention over all pairs: 0 in the window, -inf outside."""
    outside = ~functools.reduce(torch.kron, map(sees, grid, kernel))
    return torch.zeros(outside.shape, dtype=dtype).masked_fill_(outside, -math.inf).to(device)


@functools.lru_cache(64)
def plan(grid: tuple, kernel: tuple, dtype: torch.dtype, device: torch.device) -> tuple[list[Group], int]:
    """The groups that make up a grid, cut so that a head has at most CHUNK scores, and how many heads fit a chunk."""
    groups = []
    for axes in itertools.product(*map(axis_groups, grid, kernel)):
        queries, keys = zip(*axes)
        z, y, x = (sees(length, k)[a.start:a.start + a.length, b.start:b.start + b.length]
                   for length, k, a, b in zip(grid, kernel, queries, keys))
        inside = torch.kron(torch.kron(z, y), x)
        bias = torch.zeros(inside.shape, dtype=dtype).masked_fill_(~inside, -math.inf).to(device)
        groups += halve(Group(queries, keys, bias, not inside.all()))
    return groups, max(1, CHUNK // max(map(scores, groups)))


def scores(group: Group) -> int:
    return group.bias.numel() * math.prod(span.count for span in group.keys)


def halve(group: Group) -> list[Group]:
    """Cut a group along the first axis that has several tiles until its scores fit a chunk."""
    axis = next((i for i in range(3) if group.keys[i].count > 1), None)
    if axis is None or scores(group) <= CHUNK:
        return [group]
    half = group.keys[axis].count // 2

    def part(spans, first, count):
        s = spans[axis]
        return *spans[:axis], s._replace(start=s.start + first * s.step, count=count), *spans[axis + 1:]

    sizes = (0, half), (half, group.keys[axis].count - half)
    return [g for size in sizes
            for g in halve(group._replace(queries=part(group.queries, *size), keys=part(group.keys, *size)))]


def tiles(x: Tensor, spans: Sequence[Span]) -> Tensor:
    """The tiles as a view: x (n, D, H, W, d) -> (n, tiles z, y, x, tokens of a tile z, y, x, d)."""
    n, *axes, d = x.stride()
    size = len(x), *(s.count for s in spans), *(s.length for s in spans), x.shape[-1]
    stride = n, *(s.step * a for s, a in zip(spans, axes)), *axes, d
    return x.as_strided(size, stride, x.storage_offset() + sum(s.start * a for s, a in zip(spans, axes)))


def gather(x: Tensor, spans: Sequence[Span]) -> Tensor:
    """The tiles as a batch of matrices: x (n, D, H, W, d) -> (n * tiles, tokens of a tile, d)."""
    view = tiles(x, spans)
    return view.reshape(view.shape[:4].numel(), -1, x.shape[-1])


def put(x: Tensor, spans: Sequence[Span], matrices: Tensor) -> None:
    """The inverse of gather, for tiles that do not overlap (queries)."""
    view = tiles(x, spans)
    view.copy_(matrices.view(view.shape))


def add(x: Tensor, spans: Sequence[Span], matrices: Tensor) -> None:
    """The adjoint of gather, for tiles that overlap (keys): every c-th tile of an axis is added in one go, with c so
    large that these do not overlap. The order of the sum is fixed, so are its bits."""
    matrices = matrices.view(tiles(x, spans).shape)
    apart = [min(s.count, math.ceil(s.length / s.step)) for s in spans]
    for first in itertools.product(*map(range, apart)):
        some = [Span(len(range(i, s.count, c)), s.start + i * s.step, c * s.step, s.length)
                for s, i, c in zip(spans, first, apart)]
        every = [slice(i, None, c) for i, c in zip(first, apart)]
        tiles(x, some).add_(matrices[:, *every])


def head_parts(q: Tensor, heads: int):
    """Index a few heads of one sample at a time: memory and bits do not depend on the batch."""
    for sample, head in itertools.product(range(q.shape[0]), range(0, q.shape[4], heads)):
        yield sample, ..., slice(head, head + heads), slice(None)


def head_first(x: Tensor) -> Tensor:
    return x.permute(3, 0, 1, 2, 4)                   # (D, H, W, n, d) -> (n, D, H, W, d)


def probabilities(q: Tensor, k: Tensor, group: Group, scale: float) -> Tensor:
    """(2) for matrices q (tiles, queries, d) and k (tiles, keys, d)."""
    return torch.baddbmm(group.bias, q, k.mT, beta=group.masked, alpha=scale).softmax(-1)


def tiled(q: Tensor, k: Tensor, v: Tensor, kernel: Sequence[int], scale: float) -> Tensor:
    out = torch.empty_like(q)
    groups, heads = plan(tuple(q.shape[1:4]), tuple(kernel), q.dtype, q.device)
    for part in head_parts(q, heads):
        Q, K, V = (head_first(t[part]).contiguous() for t in (q, k, v))
        for group in groups:
            p = probabilities(gather(Q, group.queries), gather(K, group.keys), group, scale)
            put(head_first(out[part]), group.queries, torch.bmm(p, gather(V, group.keys)))             # (3)
    return out


def tiled_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kernel: Sequence[int],
                   scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    wide = torch.promote_types(q.dtype, torch.float32)                   # for delta and for sums over tiles
    groups, heads = plan(tuple(q.shape[1:4]), tuple(kernel), q.dtype, q.device)
    for part in head_parts(q, heads):
        Q, K, V, G = (head_first(t[part]).contiguous() for t in (q, k, v, grad))
        delta = (G.to(wide) * head_first(out[part])).sum(-1, keepdim=True).to(q.dtype)                 # (5)
        dK, dV = torch.zeros_like(K, dtype=wide), torch.zeros_like(V, dtype=wide)
        for group in groups:
            q_t, g_t, delta_t = (gather(t, group.queries) for t in (Q, G, delta))
            k_t, v_t = gather(K, group.keys), gather(V, group.keys)
            p = probabilities(q_t, k_t, group, scale)
            add(dV, group.keys, torch.bmm(p.mT, g_t))                                                  # (4)
            ds = torch.bmm(g_t, v_t.mT).sub_(delta_t).mul_(p)                                          # (5)
            put(head_first(dq[part]), group.queries, torch.bmm(ds, k_t).mul_(scale))                   # (6)
            add(dK, group.keys, torch.bmm(ds.mT, q_t))
        head_first(dk[part]).copy_(dK.mul_(scale))
        head_first(dv[part]).copy_(dV)
    return dq, dk, dv


# --- The operator: one opaque node for torch.compile and autograd. It runs outside autocast (whose dtype na3d has
# chosen already), on contiguous tensors.

@torch.library.custom_op("cryo::na3d", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, kernel: Sequence[int], scale: float,
              use_triton: bool) -> tuple[Tensor, Tensor]:
    """(3), and what the Triton backward needs of (2): the log of its sums; the tiled one takes the softmax again."""
    q, k, v = (t.contiguous() for t in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        return fused(q, k, v, kernel, scale) if use_triton else (tiled(q, k, v, kernel, scale), q.new_empty(0))


@torch.library.custom_op("cryo::na3d_backward", mutates_args=())
def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kernel: Sequence[int],
                       scale: float, use_triton: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(4)-(6)"""
    grad, q, k, v = (t.contiguous() for t in (grad, q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        if use_triton:
            return fused_backward(grad, q, k, v, out, lse, kernel, scale)
        return tiled_backward(grad, q, k, v, out, kernel, scale)


@attention.register_fake
def _(q, k, v, kernel, scale, use_triton):
    B, D, H, W, n, d = q.shape
    lse = q.new_empty(B, n, D, H, W, dtype=torch.float32) if use_triton else q.new_empty(0)
    return q.new_empty(q.shape), lse


@attention_backward.register_fake
def _(grad, q, k, v, out, lse, kernel, scale, use_triton):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def save_for_backward(ctx, inputs, output):
    q, k, v, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output)


def backward(ctx, grad, _):
    return *attention_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None


attention.register_autograd(backward, setup_context=save_for_backward)
