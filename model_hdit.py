"""The velocity network of CryoFM: a 3-D hourglass diffusion transformer (HDiT).

A map is cut into patches of p^3 voxels, and each patch becomes one token. The outer levels attend
to neighbouring tokens only (na3d), the innermost level to all tokens. Between two levels 2x2x2
tokens are merged into one wider token, and split again on the way back up:

    x -> patch_in -> down_levels[0] -> merges[0] -> ... -> mid_level
                  -> ... -> splits[0] -> up_levels[0] -> out_norm -> patch_out -> v

    x <- x + Attn(AdaRMS(x, c)),  then  x <- x + FF(AdaRMS(x, c))                       (1)
    AdaRMS(x, c) = x (1 + W c) / sqrt(mean x^2 + eps)                                   (2)
    q^ = sqrt(s_h) q / |q|,  k^ = sqrt(s_h) k / |k|,  so q^ . k^ = s_h cos(q, k)        (3)
    RoPE: y1 = x1 cos a - x2 sin a,  y2 = x2 cos a + x1 sin a,  a = (z f, y f, x f)     (4)
    FF(x) = W_down (u * gelu(g)),  (u, g) = W_up x                                      (5)
    split: lerp(skip, W x, fac)                                                         (6)
    c = W_c [cos phi, sin phi],  phi = (2 pi 1000 t) w,  w ~ N(0, 1), fixed             (7)

In (3) s_h is a learned number for each head. In (4) (z, y, x) is the token's position. In (6) `fac`
is learned.

CryoFM (arXiv:2410.08631) section 4.2, Tables 4 and 7. (1)-(6) are from Crowson et al. 2024 (HDiT).
Parameters and buffers have the names of the public weights, which load with strict=True.

Departure 1: (7) is computed in float32 whatever the autocast dtype. The authors' code computes phi
in half precision under autocast, where phi means nothing for t > 0.2. In the innermost level it
computes the angles of (4) so, too, which changes them by up to 0.012 (float16) or 0.11 (bfloat16).
`time_phase` and `rotary_phase` "float16" or "bfloat16" do the same, for the authors' weights.
Departure 2: a kernel larger than the token grid is clamped to it (NATTEN refuses it), so any map
size works that is divisible by patch_size * 2^(levels - 1).
Departure 3: a network trained on t = 0.000, 0.001, ... alone gets t rounded to the nearest of them,
because from one to the next (7) turns by w full circles. The release rounds down.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from natten3d import na3d

EPS = 1e-6  # in (2), (3) and the last norm, as in the authors' release


@dataclass(frozen=True)
class HDiTConfig:
    """Sizes of the network. The defaults are CryoFM-S."""

    patch_size: int = 4
    depths: tuple[int, ...] = (4, 8)  # blocks per level, outer to inner, on each way
    widths: tuple[int, ...] = (768, 1536)
    d_head: int = 64
    kernel_size: int = 7  # of the neighbourhood attention, in tokens
    mapping_width: int = 256  # of the time conditioning c
    ff_mult: int = 3
    # How the network was trained. Ours differ from the defaults by --time-law logit-normal alone.
    time_phase: str = "float32"  # dtype of phi in (7)
    rotary_phase: str = "float32"  # dtype of the angles (4) in the innermost level
    whole_thousandths: bool = False  # it knows only t = 0.000, 0.001, ... (Departure 3)

    def __post_init__(self):
        if len(self.depths) != len(self.widths) or not self.depths:
            raise ValueError(
                f"depths {self.depths} and widths {self.widths} need one entry per level"
            )
        if any(width % self.d_head for width in self.widths):
            raise ValueError(f"widths {self.widths} must be multiples of d_head {self.d_head}")
        if self.d_head < 12:
            raise ValueError(f"d_head {self.d_head} must be at least 12, for one frequency in (4)")
        if self.mapping_width % 2:
            raise ValueError(f"mapping_width {self.mapping_width} must be even")
        for name in ("time_phase", "rotary_phase"):
            dtype = getattr(self, name)
            if dtype not in ("float32", "float16", "bfloat16"):
                raise ValueError(f"{name} {dtype!r}: choose float32, float16 or bfloat16")

    @property
    def multiple(self) -> int:
        """Every side of an input map must be a multiple of this."""
        return self.patch_size * 2 ** (len(self.depths) - 1)


PRESETS = {
    # The shipped prior, 5.65 M parameters.
    "tiny": HDiTConfig(depths=(2, 4), widths=(128, 256)),
    # Table 4: CryoFM-S for 64^3 voxels of 1.5 Å, CryoFM-L for 128^3 voxels of 3 Å.
    "s": HDiTConfig(),
    "l": HDiTConfig(depths=(2, 2, 12), widths=(320, 640, 1280)),
    # Table 7: other patch sizes, and other numbers of levels.
    "p2-d1": HDiTConfig(patch_size=2),
    "p8-d1": HDiTConfig(patch_size=8),
    "p4-d0": HDiTConfig(depths=(12,), widths=(1536,)),
    "p4-d2": HDiTConfig(depths=(2, 2, 8), widths=(384, 768, 1536)),
}


# Shape letters: B maps; D, H, W voxels or tokens along z, y, x; E channels of a token;
# n heads; d channels of a head.


def merge_patches(x: Tensor, p: int) -> Tensor:
    """(B, D p, H p, W p, E) -> (B, D, H, W, p^3 E): channels ordered (z, y, x, e), e fastest."""
    B, D, H, W, E = x.shape
    x = x.view(B, D // p, p, H // p, p, W // p, p, E)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)


def split_patches(x: Tensor, p: int) -> Tensor:
    """The inverse of merge_patches."""
    B, D, H, W, _ = x.shape
    x = x.view(B, D, H, W, p, p, p, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(B, D * p, H * p, W * p, -1)


def positions(grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Cell centres (D, H, W, 3) as (z, y, x). The longest side spans [-1, 1]."""
    # The centre of cell i of n is at (2 i + 1) / n - 1 on an axis that spans [-1, 1].
    axes = []
    for n in grid:
        i = torch.arange(n, device=device, dtype=torch.float32)
        axes.append((2 * i + 1 - n) / max(grid))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def rms_normalise(x: Tensor, scale: Tensor) -> Tensor:
    """(2) with `scale` for 1 + W c, computed in float32."""
    mean_square = x.float().square().mean(-1, keepdim=True)
    return (x.float() * (scale * torch.rsqrt(mean_square + EPS))).to(x.dtype)


class AdaRMSNorm(nn.Module):
    """(2): normalise each token. The scale of each channel depends on the condition c."""

    def __init__(self, width: int, cond_width: int):
        super().__init__()
        self.linear = nn.Linear(cond_width, width, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale = 1 + self.linear(cond)[:, None, None, None].float()  # (B, 1, 1, 1, E)
        return rms_normalise(x, scale)


class RMSNorm(nn.Module):
    """(2) with a learned scale instead of a condition: the last norm."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalise(x, self.scale)


class AxialRoPE(nn.Module):
    """(4): the first 6 nf channels of a head turn with the token's position, the others stay."""

    def __init__(self, d_head: int, n_heads: int):
        super().__init__()
        n_freqs = d_head // 3 // 4  # nf per axis: 5 for d_head 64

        # The frequencies of all heads together are spaced evenly in log f, from pi to 10 pi.
        count = n_heads * n_freqs
        # On the CPU, because torch imports its compiler, for 2 s, to do this on the meta device.
        ends = math.log(math.pi), math.log(10 * math.pi)
        log_freqs = torch.linspace(*ends, count + 1, device="cpu")[:-1]
        freqs = log_freqs.exp().view(n_freqs, n_heads).T
        self.register_buffer("freqs", freqs.contiguous())  # (n, nf)

    def forward(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """pos (D, H, W, 3) -> cos and sin of the angles (D, H, W, n, 3 nf), float32.

        The angles are products in the dtype of pos.
        """
        # Every coordinate of a token times every frequency of a head.
        angle = pos[..., None, :, None] * self.freqs.to(pos.dtype)[:, None, :]
        angle = angle.flatten(-2).float()  # (D, H, W, n, 3, nf) -> (D, H, W, n, 3 nf)
        return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(4) on x (B, D, H, W, n, d)."""
    half = cos.shape[-1]
    x1, x2, rest = x.tensor_split((half, 2 * half), dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), dim=-1)


def set_length(x: Tensor, length: Tensor) -> Tensor:
    """length x / |x|, in float32."""
    square = x.float().square().sum(-1, keepdim=True)
    return x.float() * (length * torch.rsqrt(square + EPS))


class SelfAttention(nn.Module):
    """(3) and (4). A `kernel_size` of None means attention to all tokens."""

    def __init__(self, config: HDiTConfig, width: int, kernel_size: int | None):
        super().__init__()
        self.n_heads = width // config.d_head
        self.kernel_size = kernel_size
        self.phase = getattr(torch, "float32" if kernel_size else config.rotary_phase)
        self.norm = AdaRMSNorm(width, config.mapping_width)
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.scale = nn.Parameter(torch.full((self.n_heads,), 10.0))  # s_h of (3)
        self.pos_emb = AxialRoPE(config.d_head, self.n_heads)
        self.out_proj = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.out_proj.weight)

    def forward(self, x: Tensor, pos: Tensor, cond: Tensor) -> Tensor:
        # Project the normalised tokens to queries, keys and values.
        qkv = self.qkv_proj(self.norm(x, cond))
        q, k, v = qkv.unflatten(-1, (3, self.n_heads, -1)).unbind(4)  # (B, D, H, W, n, d)

        # Scale queries and keys, (3), and turn them by their positions, (4).
        length = self.scale.sqrt()[:, None]
        cos, sin = self.pos_emb(pos.to(self.phase))  # Departure 1
        q = apply_rotary(set_length(q, length), cos, sin).to(v.dtype)
        k = apply_rotary(set_length(k, length), cos, sin).to(v.dtype)

        # Attend to the neighbours, or to all tokens. The scale of the logits is in q and k.
        if self.kernel_size is None:
            q, k, v = (u.flatten(1, 3).transpose(1, 2) for u in (q, k, v))  # (B, n, D H W, d)
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)
        else:
            out = na3d(q, k, v, self.kernel_size, scale=1.0)  # Departure 2
        return self.out_proj(out.reshape(x.shape))


class FeedForward(nn.Module):
    """(5): process each token by itself."""

    def __init__(self, config: HDiTConfig, width: int):
        super().__init__()
        hidden = config.ff_mult * width
        self.norm = AdaRMSNorm(width, config.mapping_width)
        self.up_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        # One half of the hidden channels gates the other.
        u, g = self.up_proj(self.norm(x, cond)).chunk(2, dim=-1)
        return self.down_proj(u * F.gelu(g))


class Block(nn.Module):
    """(1): attention, then the feed-forward network, each added to its input."""

    def __init__(self, config: HDiTConfig, width: int, kernel_size: int | None):
        super().__init__()
        self.self_attn = SelfAttention(config, width, kernel_size)
        self.ff = FeedForward(config, width)

    def forward(self, x: Tensor, pos: Tensor, cond: Tensor) -> Tensor:
        # Tokens exchange information, then each one is processed by itself.
        x = x + self.self_attn(x, pos, cond)
        return x + self.ff(x, cond)


class Merge(nn.Module):
    """p^3 neighbouring tokens -> one token. With width_in = 1 it turns patches into tokens."""

    def __init__(self, p: int, width_in: int, width_out: int):
        super().__init__()
        self.p = p
        self.proj = nn.Linear(p**3 * width_in, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(merge_patches(x, self.p))


class Split(nn.Module):
    """(6): one token -> 2x2x2 tokens, mixed with the skip connection."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.proj = nn.Linear(width_in, 8 * width_out, bias=False)
        self.fac = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        # `fac` is learned: 0 takes the skip connection alone, 1 the split tokens alone.
        x = split_patches(self.proj(x), 2)
        return torch.lerp(skip, x, self.fac.to(x.dtype))


class PatchOut(nn.Module):
    """Tokens -> voxels. Zero at the start, so an untrained network predicts v = 0."""

    def __init__(self, p: int, width: int):
        super().__init__()
        self.p = p
        self.proj = nn.Linear(width, p**3, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return split_patches(self.proj(x), self.p)


class HDiT(nn.Module):
    """The network. All levels but the innermost exist twice: for the way down and the way up.

    `activation_checkpointing` recomputes every block in the backward pass. This takes less memory
    and a third more time.
    """

    def __init__(self, config: HDiTConfig, activation_checkpointing: bool = False):
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing

        # The innermost level exists once, all others on both ways.
        *outer, (mid_depth, mid_width) = zip(config.depths, config.widths)
        width_pairs = list(zip(config.widths, config.widths[1:]))

        def level(depth: int, width: int, kernel_size: int | None) -> nn.ModuleList:
            return nn.ModuleList(Block(config, width, kernel_size) for _ in range(depth))

        # From voxels to tokens.
        self.patch_in = Merge(config.patch_size, 1, config.widths[0])

        # The time conditioning (7).
        self.time_emb = nn.Module()
        # w, rounded so that prior.pt, in half precision, has the same.
        frequencies = torch.randn(config.mapping_width // 2, 1).half().float()
        self.time_emb.register_buffer("weight", frequencies)
        self.time_in_proj = nn.Linear(config.mapping_width, config.mapping_width, bias=False)

        # The hourglass: down_levels[i] and up_levels[i] have the same number of tokens.
        kernel = config.kernel_size
        self.down_levels = nn.ModuleList(level(depth, width, kernel) for depth, width in outer)
        self.merges = nn.ModuleList(Merge(2, wide, wider) for wide, wider in width_pairs)
        self.mid_level = level(mid_depth, mid_width, None)
        self.splits = nn.ModuleList(Split(wider, wide) for wide, wider in width_pairs)
        self.up_levels = nn.ModuleList(level(depth, width, kernel) for depth, width in outer)

        # From tokens back to voxels.
        self.out_norm = RMSNorm(config.widths[0])
        self.patch_out = PatchOut(config.patch_size, config.widths[0])

    def time_features(self, t: Tensor) -> Tensor:
        """(7) without W_c: t (B,) in [0, 1] -> (B, mapping_width)."""
        dtype = getattr(torch, self.config.time_phase)  # Departure 1
        with torch.autocast(t.device.type, enabled=False):
            t = 1000 * t.float()
            if self.config.whole_thousandths:
                t = t.round()  # Departure 3
            phase = (2 * math.pi * t)[:, None].to(dtype) * self.time_emb.weight.T.to(dtype)
            return torch.cat((phase.cos(), phase.sin()), dim=-1).float()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, 1, D, H, W) in network scale, t (B,) or () in [0, 1] -> velocity, shaped as x.

        The velocity is float32. Raises ValueError if a side is no multiple of config.multiple.
        """
        B, C, *sides = x.shape
        if C != 1 or any(n % self.config.multiple for n in sides):
            raise ValueError(
                f"map of shape {tuple(x.shape)}: want (B, 1, D, H, W) "
                f"with sides that are multiples of {self.config.multiple}"
            )
        # Turn the time into the vector that conditions every block.              (7)
        cond = self.time_in_proj(self.time_features(t.expand(B)))  # (B, mapping_width)

        # Cut the map into patches, one token each.
        x = self.patch_in(x[:, 0, ..., None])  # (B, D, H, W, E), in tokens from here on

        # Go down: run a level, remember its tokens, merge 2x2x2 of them into one.
        skips = []
        for blocks, merge in zip(self.down_levels, self.merges):
            x = self.run_blocks(blocks, x, cond)
            skips.append(x)
            x = merge(x)

        # The innermost level attends to all tokens.
        x = self.run_blocks(self.mid_level, x, cond)

        # Go back up: split every token, mix in the remembered tokens, run the level.
        for blocks, split in zip(reversed(self.up_levels), reversed(self.splits)):
            x = split(x, skips.pop())
            x = self.run_blocks(blocks, x, cond)

        # Turn the tokens into voxels.
        x = self.patch_out(self.out_norm(x))[..., 0]
        return x[:, None].float()

    def run_blocks(self, blocks: Iterable[Block], x: Tensor, cond: Tensor) -> Tensor:
        """The blocks of one level, one after the other."""
        pos = positions(x.shape[1:4], x.device)
        for block in blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, pos, cond, use_reentrant=False)
            else:
                x = block(x, pos, cond)
        return x
