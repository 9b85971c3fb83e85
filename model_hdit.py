"""The velocity network of CryoFM: a 3-D hourglass diffusion transformer (HDiT).

A map is cut into patches of p^3 voxels, each one token. The outer levels see neighbours only (na3d), the innermost sees every
token. Between levels 2x2x2 tokens are merged into one wider token, and split again on the way back up:

    x  -> patch_in -> down_levels[0] -> merges[0] -> ... -> mid_level -> ... -> splits[0] -> up_levels[0] -> patch_out -> v

    x   <- x + Attn(AdaRMS(x, c));  x <- x + FF(AdaRMS(x, c))                                        (1)
    AdaRMS(x, c) = x (1 + W c) / sqrt(mean x^2 + eps)                                                (2)
    q^, k^ = sqrt(s_h) q / |q|, sqrt(s_h) k / |k|;  logits = q^ . k^ = s_h cos(q, k)                 (3)
    RoPE: y1 = x1 cos a - x2 sin a,  y2 = x2 cos a + x1 sin a,  a = (z f, y f, x f)                  (4)
    FF(x) = W_down (u * gelu(g)),  (u, g) = W_up x                                                   (5)
    split: lerp(skip, W x, fac)                                                                      (6)
    c = W_c [cos phi, sin phi],  phi = (2 pi 1000 t) w,  w ~ N(0, 1) fixed                           (7)

CryoFM (arXiv:2410.08631) section 4.2, Tables 4 and 7; Crowson et al. 2024 (HDiT) for (1)-(6). Names of parameters and buffers
are those of the public weights, which load with strict=True.

Departure 1: (7) is computed in float32 whatever the autocast dtype. The authors' code computes phi in half precision under
autocast, where it loses all meaning for t > 0.2; `time_phase` = "float16" or "bfloat16" reproduces that for their weights.
Departure 2: kernels larger than the token grid are clamped to it (NATTEN refuses them), so any map size divisible by
patch * 2^(levels - 1) works.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from natten3d import na3d

EPS = 1e-6                       # in (2), (3) and the final norm, as in the authors' release


@dataclass(frozen=True)
class HDiTConfig:
    """Sizes of the network; the defaults are CryoFM-S."""
    patch_size: int = 4
    depths: tuple[int, ...] = (4, 8)         # blocks per level, outer to inner; outer levels run twice (down and up)
    widths: tuple[int, ...] = (768, 1536)
    d_head: int = 64
    kernel_size: int = 7                     # of the neighbourhood attention, in tokens
    mapping_width: int = 256                 # of the time conditioning c
    ff_mult: int = 3
    time_phase: str = "float32"              # dtype of (7); other values only for the authors' weights

    def __post_init__(self):
        if len(self.depths) != len(self.widths) or not self.depths:
            raise ValueError(f"depths {self.depths} and widths {self.widths} need one entry per level")
        if any(width % self.d_head for width in self.widths):
            raise ValueError(f"widths {self.widths} must be multiples of d_head {self.d_head}")
        if self.d_head < 12 or self.mapping_width % 2:
            raise ValueError(f"d_head {self.d_head} must be at least 12 and mapping_width {self.mapping_width} even")
        if self.time_phase not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"time_phase {self.time_phase!r}: choose float32, float16 or bfloat16")

    @property
    def multiple(self) -> int:
        """Every side of an input map must be a multiple of this."""
        return self.patch_size * 2 ** (len(self.depths) - 1)


PRESETS = {
    "tiny": HDiTConfig(depths=(2, 4), widths=(128, 256)),                         # the shipped prior: 5.65 M
    "s": HDiTConfig(),                                                            # Table 4, CryoFM-S: 64^3, 1.5 A
    "l": HDiTConfig(depths=(2, 2, 12), widths=(320, 640, 1280)),                  # Table 4, CryoFM-L: 128^3, 3 A
    "p2-d1": HDiTConfig(patch_size=2),                                            # Table 7 from here on
    "p8-d1": HDiTConfig(patch_size=8),
    "p4-d0": HDiTConfig(depths=(12,), widths=(1536,)),
    "p4-d2": HDiTConfig(depths=(2, 2, 8), widths=(384, 768, 1536)),
}


# Shape letters: B maps; D, H, W voxels or tokens along z, y, x; E channels of a token; n heads; d channels of a head.

def merge_patches(x: Tensor, p: int) -> Tensor:
    """(B, D p, H p, W p, E) -> (B, D, H, W, p^3 E): channels ordered (z, y, x, e), e fastest."""
    B, D, H, W, E = x.shape
    x = x.view(B, D // p, p, H // p, p, W // p, p, E).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(B, D // p, H // p, W // p, p ** 3 * E)


def split_patches(x: Tensor, p: int) -> Tensor:
    """The inverse of merge_patches."""
    B, D, H, W, E = x.shape
    x = x.view(B, D, H, W, p, p, p, E // p ** 3).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(B, D * p, H * p, W * p, E // p ** 3)


def positions(shape: tuple[int, int, int], device) -> Tensor:
    """Cell centres (D, H, W, 3) as (z, y, x); the longest side spans [-1, 1]."""
    axes = [(2 * torch.arange(n, device=device, dtype=torch.float32) + 1 - n) / max(shape) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


class AdaRMSNorm(nn.Module):
    """(2), in float32."""
    def __init__(self, width: int, cond_width: int):
        super().__init__()
        self.linear = nn.Linear(cond_width, width, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale = 1 + self.linear(cond)[:, None, None, None].float()             # (B, 1, 1, 1, E)
        square = x.float().square().mean(-1, keepdim=True)
        return (x.float() * (scale * torch.rsqrt(square + EPS))).to(x.dtype)


class RMSNorm(nn.Module):
    """(2) with a learned scale instead of a condition: the last norm."""
    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        square = x.float().square().mean(-1, keepdim=True)
        return (x.float() * (self.scale * torch.rsqrt(square + EPS))).to(x.dtype)


class AxialRoPE(nn.Module):
    """(4): the first 6 nf channels of a head turn with the token's position, the others stay as they are."""
    def __init__(self, d_head: int, n_heads: int):
        super().__init__()
        n_freqs = d_head // 3 // 4                                             # nf per axis: 5 for d_head 64
        log_freqs = torch.linspace(math.log(math.pi), math.log(10 * math.pi), n_heads * n_freqs + 1)[:-1]
        self.register_buffer("freqs", log_freqs.exp().view(n_freqs, n_heads).T.contiguous())   # (n, nf)

    def forward(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """pos (D, H, W, 3) -> cos and sin of (D, H, W, n, 3 nf), float32."""
        angle = (pos[..., None, :, None] * self.freqs.float()[:, None, :]).flatten(-2)
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(4) on x (B, D, H, W, n, d)."""
    half = cos.shape[-1]
    x1, x2, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), dim=-1)


class SelfAttention(nn.Module):
    """(3) and (4); `kernel_size` None means global attention."""
    def __init__(self, config: HDiTConfig, width: int, kernel_size: int | None):
        super().__init__()
        self.n_heads, self.kernel_size = width // config.d_head, kernel_size
        self.norm = AdaRMSNorm(width, config.mapping_width)
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.scale = nn.Parameter(torch.full((self.n_heads,), 10.0))           # s_h of (3)
        self.pos_emb = AxialRoPE(config.d_head, self.n_heads)
        self.out_proj = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.out_proj.weight)

    def forward(self, x: Tensor, pos: Tensor, cond: Tensor) -> Tensor:
        B, D, H, W, E = x.shape
        q, k, v = self.qkv_proj(self.norm(x, cond)).view(B, D, H, W, 3, self.n_heads, -1).unbind(4)
        cos, sin = self.pos_emb(pos)
        root_scale = self.scale.sqrt()[:, None]
        q, k = (rotate(u.float() * (root_scale * torch.rsqrt(u.float().square().sum(-1, keepdim=True) + EPS)), cos, sin)
                .to(v.dtype) for u in (q, k))                                  # (3), then (4)
        if self.kernel_size is None:
            q, k, v = (u.reshape(B, D * H * W, self.n_heads, -1).transpose(1, 2) for u in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)
        else:
            out = na3d(q, k, v, self.kernel_size, scale=1.0)
        return self.out_proj(out.reshape(B, D, H, W, E))


class FeedForward(nn.Module):
    """(5)."""
    def __init__(self, config: HDiTConfig, width: int):
        super().__init__()
        self.norm = AdaRMSNorm(width, config.mapping_width)
        self.up_proj = nn.Linear(width, 2 * config.ff_mult * width, bias=False)
        self.down_proj = nn.Linear(config.ff_mult * width, width, bias=False)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        u, g = self.up_proj(self.norm(x, cond)).chunk(2, dim=-1)
        return self.down_proj(u * F.gelu(g))


class Block(nn.Module):
    """(1)."""
    def __init__(self, config: HDiTConfig, width: int, kernel_size: int | None):
        super().__init__()
        self.self_attn = SelfAttention(config, width, kernel_size)
        self.ff = FeedForward(config, width)

    def forward(self, x: Tensor, pos: Tensor, cond: Tensor) -> Tensor:
        x = x + self.self_attn(x, pos, cond)
        return x + self.ff(x, cond)


class Merge(nn.Module):
    """p^3 neighbouring tokens -> one; also the patch embedding."""
    def __init__(self, p: int, width_in: int, width_out: int):
        super().__init__()
        self.p = p
        self.proj = nn.Linear(p ** 3 * width_in, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(merge_patches(x, self.p))


class Split(nn.Module):
    """(6): one token -> 2x2x2, mixed with the skip connection."""
    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.proj = nn.Linear(width_in, 8 * width_out, bias=False)
        self.fac = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = split_patches(self.proj(x), 2)
        return torch.lerp(skip, x, self.fac.to(x.dtype))


class PatchOut(nn.Module):
    """Tokens -> voxels; zero at the start, so that an untrained network predicts v = 0."""
    def __init__(self, p: int, width: int):
        super().__init__()
        self.p = p
        self.proj = nn.Linear(width, p ** 3, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return split_patches(self.proj(x), self.p)


class HDiT(nn.Module):
    """The network. `activation_checkpointing` recomputes each block in the backward pass: less memory, a third more time."""
    def __init__(self, config: HDiTConfig, activation_checkpointing: bool = False):
        super().__init__()
        self.config, self.activation_checkpointing = config, activation_checkpointing
        *outer, inner = zip(config.depths, config.widths)
        level = lambda depth, width, kernel: nn.ModuleList(Block(config, width, kernel) for _ in range(depth))
        pairs = list(zip(config.widths[:-1], config.widths[1:]))
        self.patch_in = Merge(config.patch_size, 1, config.widths[0])
        self.time_emb = nn.Module()
        self.time_emb.register_buffer("weight", torch.randn(config.mapping_width // 2, 1))     # w of (7)
        self.time_in_proj = nn.Linear(config.mapping_width, config.mapping_width, bias=False)
        self.down_levels = nn.ModuleList(level(depth, width, config.kernel_size) for depth, width in outer)
        self.merges = nn.ModuleList(Merge(2, a, b) for a, b in pairs)
        self.mid_level = level(*inner, None)
        self.splits = nn.ModuleList(Split(b, a) for a, b in pairs)
        self.up_levels = nn.ModuleList(level(depth, width, config.kernel_size) for depth, width in outer)
        self.out_norm = RMSNorm(config.widths[0])
        self.patch_out = PatchOut(config.patch_size, config.widths[0])

    def time_features(self, t: Tensor) -> Tensor:
        """(7) without W_c: t (B,) in [0, 1] -> (B, mapping_width)."""
        dtype = getattr(torch, self.config.time_phase)                         # Departure 1
        with torch.autocast(t.device.type, enabled=False):
            phase = (2 * math.pi * (1000 * t.float()))[:, None].to(dtype) * self.time_emb.weight.T.to(dtype)
            return torch.cat((phase.cos(), phase.sin()), dim=-1).float()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, 1, D, H, W) in network scale, t (B,) or () in [0, 1] -> velocity (B, 1, D, H, W), float32.

        Raises ValueError if a side is no multiple of config.multiple.
        """
        B, C, *shape = x.shape
        if C != 1 or any(n % self.config.multiple for n in shape):
            raise ValueError(f"map of shape {tuple(x.shape)}: want (B, 1, D, H, W) with sides that are multiples of "
                             f"{self.config.multiple}")
        cond = self.time_in_proj(self.time_features(t.expand(B)))              # (B, mapping_width)
        x = self.patch_in(x[:, 0, ..., None])                                  # (B, D, H, W, E), now in tokens
        pos, skips = positions(x.shape[1:4], x.device), []
        for blocks, merge in zip(self.down_levels, self.merges):
            x = self.run(blocks, x, pos, cond)
            skips.append((x, pos))
            x = merge(x)
            pos = positions(x.shape[1:4], x.device)
        x = self.run(self.mid_level, x, pos, cond)
        for blocks, split, (skip, pos) in reversed(list(zip(self.up_levels, self.splits, skips))):
            x = self.run(blocks, split(x, skip), pos, cond)
        return self.patch_out(self.out_norm(x))[..., 0][:, None].float()

    def run(self, blocks: nn.ModuleList, x: Tensor, pos: Tensor, cond: Tensor) -> Tensor:
        for block in blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, pos, cond, use_reentrant=False)
            else:
                x = block(x, pos, cond)
        return x
