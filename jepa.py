"""CryoLVM's objectives: pre-training by predicting what is hidden (JEPA, or MAE to compare), and the loss of fine-tuning.

Cells of a map are hidden. A predictor guesses, from the tokens of the visible cells, the tokens that a slow copy of the
encoder makes of the hidden ones; it answers in the space of features, where noise need not be predicted:

    s = W f_theta(m x) ,  s' = W' f_theta'(x)          tokens of a map: m = 0 in hidden cells; the copy sees all  (1)
    s^_i = g_phi({s_j + z_j : j visible}, {e + z_k : k hidden})_i       e learned, z_i = sincos(position i)      (2)
    L = E_x <SmoothL1_beta(s^_i - LN s'_i)>            <> over the hidden i and all channels                     (3)
    theta' <- mu theta' + (1 - mu) theta,  mu = mu_0 + (mu_1 - mu_0) n / N,  W likewise                          (4)
    MAE: L = E_x <(net(m x) - x)^2>                    <> over the hidden voxels                                 (5)

Fine-tuning adds to the squared error a distance between grey-value histograms, smooth so that it has a gradient:

    h_j(x) = 1/n sum_i exp(-((x_i - c_j) / sigma)^2 / 2),  c_j centres of equal bins on [0, 1]                   (6)
    p = h(x) / sum_j h_j(x),  q likewise of y,  m = (p + q) / 2                                                  (7)
    JS(p | q) = 1/2 sum_j p_j log(p_j / m_j) + 1/2 sum_j q_j log(q_j / m_j)    in [0, log 2] nats                (8)
    L = alpha <(x - y)^2> + (1 - alpha) JS                                                                       (9)

(1)-(3): CryoLVM section 3.1, eq. 1 and Figs. 1, 2; (6), (8), (9): section 3.2, eq. 2-5. The authors published no code; what
the paper leaves open is as in the public I-JEPA (Assran et al. 2023): LN without parameters, beta, blocks, mu, schedules;
and V-JEPA (Bardes et al. 2024): z, one pass of g for all blocks. (5): He et al. 2022, Table 11's comparator.

Erratum 1: eq. 2 is not normalised, yet eq. 3 takes h for a distribution; (7) makes it one. `normalise=False` is eq. 2.
Departure 1: the text masks tokens, after the encoder, whose visible tokens have then seen what is to be predicted; Fig. 1
draws the mask on the input. Ours is on the input, as zeros; `mask_at="embedding"` is the text.
Departure 2: the text adds z to the targets too. Then they differ from place to place even if the encoder is constant, and
a collapse looks like progress. Ours carry no z.
Departure 3: (3) is a mean where eq. 1 has a sum: it compares between masks and maps.
Not stated: bins, sigma, alpha: 64, a bin's width, 0.5. Size of the predictor: 6 blocks, 192 wide.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

EPS = 1e-8                       # added to h in (7): a map with no value near [0, 1] is then uniform, without a gradient
PIECE = {"cpu": 2 ** 18, "cuda": 2 ** 26}    # numbers held at once in (6): what fits a CPU's cache, or 256 MB of a GPU's memory


@dataclass(frozen=True)
class JEPAConfig:
    """Sizes of the predictor."""
    width: int = 192
    depth: int = 6
    heads: int = 6
    mask_at: str = "input"       # or "embedding": Departure 1

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"a predictor of width {self.width} cannot be shared by {self.heads} heads")
        if self.mask_at not in ("input", "embedding"):
            raise ValueError(f"mask_at {self.mask_at!r}: choose 'input' or 'embedding'")


PRESETS = {"tiny": JEPAConfig(width=96, depth=3, heads=3), "paper": JEPAConfig()}

# Shape letters: B maps; D, H, W voxels; d, h, w cells of the feature grid along z, y, x; L = d h w tokens, x fastest;
# C channels of a token; n voxels and K bins of a histogram. token_mask (B, d, h, w): True = visible.


# ---- Masks and positions -----------------------------------------------------------------------------------------------

def block_sides(grid: tuple[int, int, int], scale: tuple[float, float], aspect: float) -> Tensor:
    """(k, 3): every block of whole cells that holds a share of the grid within `scale`, no side > aspect * another."""
    sides = torch.cartesian_prod(*[torch.arange(1, n + 1) for n in grid]).view(-1, 3)
    share = sides.prod(1) / math.prod(grid)
    return sides[(share >= scale[0]) & (share <= scale[1]) & (sides.amax(1) <= aspect * sides.amin(1))]


def block_masks(maps: int, grid: tuple[int, int, int], generator: Generator | None = None, *, blocks: int = 4,
                scale: tuple[float, float] = (0.15, 0.2), aspect: float = 1.5, least: int = 8) -> Tensor:
    """token_mask (maps, d, h, w): False in the union of `blocks` random blocks, anywhere in the grid and free to overlap.

    scale: least and largest share of the grid in a block; aspect: longest to shortest side; least: tokens visible at least.
    I-JEPA draws one size of block per batch. On 6^3 only 3 x 3 x 4 cells, in any order, fit; on average 54 % stay visible.
    Raises ValueError if no block fits, or if `blocks` of them could leave fewer than `least` tokens.
    """
    sides = block_sides(grid, scale, aspect)
    if len(sides) == 0:
        raise ValueError(f"no block of whole cells holds {scale[0]:g} to {scale[1]:g} of {tuple(grid)} cells; give larger "
                         "crops (48 voxels are 6 cells) or a wider scale")
    visible = math.prod(grid) - blocks * int(sides.prod(1).max())
    if visible < least:
        raise ValueError(f"{blocks} blocks can leave {max(visible, 0)} of {math.prod(grid)} tokens visible, want {least}; "
                         "take larger crops, fewer blocks, or a lower scale")
    device = "cpu" if generator is None else generator.device
    rand = lambda *shape: torch.rand(maps, blocks, *shape, generator=generator, device=device)
    side = sides.to(device)[(rand() * len(sides)).long()]                      # (B, blocks, 3)
    corner = (rand(3) * (torch.tensor(grid, device=device) - side + 1)).long()
    z, y, x = (((r := torch.arange(n, device=device)) >= corner[..., i, None]) & (r < (corner + side)[..., i, None])
               for i, n in enumerate(grid))                                    # each (B, blocks, cells of the axis)
    hidden = z[..., :, None, None] & y[..., None, :, None] & x[..., None, None, :]
    return ~hidden.any(1)


def hide(x: Tensor, token_mask: Tensor) -> Tensor:
    """m x of (1): maps (B, 1, D, H, W) with zeros, no density, in the cells where token_mask (B, d, h, w) is False.

    Raises ValueError if a side is no multiple of the grid's.
    """
    if len(x) != len(token_mask) or any(side % n for side, n in zip(x.shape[2:], token_mask.shape[1:], strict=True)):
        raise ValueError(f"maps {tuple(x.shape)} do not divide into cells of a mask {tuple(token_mask.shape)}")
    m = F.interpolate(token_mask[:, None].to(x.dtype), x.shape[2:], mode="nearest")    # exact: sides are multiples
    return x * m


def positions(grid: tuple[int, int, int], width: int) -> Tensor:
    """z of (2): (L, width) float64, V-JEPA's table: equal parts for z, y, x, cut at `width`; half of a part sin, half cos."""
    part = 2 * math.ceil(width / 6)
    omega = 10000.0 ** (-torch.arange(part // 2, dtype=torch.float64) / (part // 2))
    r = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float64) for n in grid]).view(-1, 3)
    angle = r[..., None] * omega                                               # (L, 3, part / 2)
    return torch.cat((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :width]


# ---- Networks ----------------------------------------------------------------------------------------------------------

class TokenEncoder(nn.Module):
    """W f_theta of (1): maps (B, 1, D, H, W) -> tokens (B, L, C). `encoder`: (B, 1, D, H, W) -> features (B, C, d, h, w)."""
    def __init__(self, encoder: nn.Module, width: int):
        super().__init__()
        self.encoder = encoder
        self.embed = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(self.encoder(x).flatten(2).transpose(1, 2))


class JEPA(nn.Module):
    """What the optimiser trains, context encoder and predictor in one module, so that one DDP wrapper serves.

    The target encoder is a deep copy of `.context`, kept outside: `update_target`. encoder: as in TokenEncoder, `width` its
    channels; grid: cells of its features (6^3 for crops of 48^3).
    """
    def __init__(self, encoder: nn.Module, width: int, grid: tuple[int, int, int], config: JEPAConfig = JEPAConfig()):
        super().__init__()
        self.config = config
        self.context = TokenEncoder(encoder, width)
        self.register_buffer("positions", positions(grid, width).float(), persistent=False)
        self.mask_token = nn.Parameter(torch.empty(width))                     # e; 1-D, so that no decay reaches it
        block = lambda: nn.TransformerEncoderLayer(config.width, config.heads, 4 * config.width, dropout=0.0, activation="gelu",
                                                   batch_first=True, norm_first=True)
        self.predictor = nn.Sequential(nn.Linear(width, config.width), *(block() for _ in range(config.depth)),
                                       nn.LayerNorm(config.width), nn.Linear(config.width, width))
        for p in (self.mask_token, *(p for p in self.predictor.parameters() if p.ndim == 2)):
            nn.init.trunc_normal_(p, std=0.02)                                 # as in I-JEPA

    def forward(self, x: Tensor, token_mask: Tensor) -> Tensor:
        """Maps (B, 1, D, H, W), token_mask (B, d, h, w) -> predictions (B, L, C); those of visible tokens mean nothing.

        Raises ValueError if x, mask and feature grid do not fit.
        """
        if self.config.mask_at == "input":
            x = hide(x, token_mask)
        s, visible = self.context(x), token_mask.flatten(1)                    # (1)
        if s.shape[:2] != visible.shape or len(self.positions) != s.shape[1]:
            raise ValueError(f"maps {tuple(x.shape)} give {s.shape[1]} tokens, the mask has {visible.shape[1]} and the predictor "
                             f"{len(self.positions)} places; give crops whose sides fill the encoder's grid")
        return self.predictor(torch.where(visible[..., None], s, self.mask_token) + self.positions)   # (2)


# ---- Pre-training ------------------------------------------------------------------------------------------------------

def jepa_loss(net, target_encoder: nn.Module, x: Tensor, token_mask: Tensor, beta: float = 1.0) -> Tensor:
    """(3), a scalar, float32. net: a JEPA, or what wraps it; x: maps (B, 1, D, H, W); token_mask: (B, d, h, w)."""
    with torch.no_grad():
        target = layer_norm(target_encoder(x))
    error = F.smooth_l1_loss(net(x, token_mask).float(), target, reduction="none", beta=beta).mean(-1)       # (B, L)
    return mean_hidden(error, token_mask.flatten(1))


def mae_loss(net, x: Tensor, token_mask: Tensor) -> Tensor:
    """(5), a scalar, float32. net: (B, 1, D, H, W) -> the same shape, encoder and decoder."""
    error = (net(hide(x, token_mask)).float() - x).square()
    return mean_hidden(error, hide(torch.ones_like(x), token_mask) > 0)


def mean_hidden(error: Tensor, visible: Tensor) -> Tensor:
    """Mean over what is hidden of each map, then over maps: how maps are shared out among batches changes nothing."""
    hidden = (~visible).flatten(1)
    return ((error.flatten(1) * hidden).sum(1) / hidden.sum(1)).mean()


def layer_norm(tokens: Tensor) -> Tensor:
    """LN of (3): every token to mean 0 and variance 1 over its channels, float32 at least."""
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return F.layer_norm(wide, wide.shape[-1:])


@torch.no_grad()
def update_target(target: nn.Module, context: nn.Module, momentum: float) -> None:
    """(4), after the optimiser's step; both have the same parameters in the same order."""
    torch._foreach_lerp_(list(target.parameters()), list(context.parameters()), 1 - momentum)
    for a, b in zip(target.buffers(), context.buffers(), strict=True):
        a.copy_(b)


# I-JEPA's schedules for the 0-based step. The release counts a step before it sets its learning rate and decay.

def momentum_at(step: int, steps: int, start: float = 0.996, end: float = 1.0) -> float:
    """mu of (4), to use after this step."""
    return start + (end - start) * step / steps


def lr_at(step: int, steps: int, warmup: int, peak: float, start: float, end: float = 1e-6) -> float:
    """Linear from start to peak over the warm-up, then a cosine to end."""
    if step + 1 < warmup:
        return start + (peak - start) * (step + 1) / warmup
    return cosine(peak, end, (step + 1 - warmup) / max(1, steps - warmup))  # 1: no step is left


def weight_decay_at(step: int, steps: int, start: float = 0.04, end: float = 0.4) -> float:
    """A cosine from start to end; no decay for biases and other 1-D parameters."""
    return cosine(start, end, (step + 1) / steps)


def cosine(a: float, b: float, u: float) -> float:
    """From a at u = 0 to b at u = 1."""
    return b + (a - b) * (1 + math.cos(math.pi * u)) / 2


@torch.no_grad()
def collapse(tokens: Tensor) -> dict[str, float]:
    """Numbers that fall when the encoder learns to say nothing, from target tokens (B, L, C) of B > 1 unlike maps.

    std   root mean square deviation of LN s' from its mean: 1 at most, 0 if every token is the same
    rank  exp(entropy) of the singular values of that deviation (Roy & Vetterli 2007): C at most, 1 if all vary along one line
    maps  share of the variance that remains between maps at one position: 1 if position says nothing, 0 if it says all
    constant  (3), beta 1, of whoever answers the mean token everywhere: a loss is low only beside this
    Raises ValueError if B < 2.
    """
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} map cannot show whether tokens differ between maps; give at least 2")
    z = layer_norm(tokens).double()
    B, L, C = z.shape
    between = z.var(0, correction=1).sum()                                     # over positions and channels
    z = (z - z.mean((0, 1))).flatten(0, 1)                                     # (B L, C)
    variance = z.square().sum()
    singular = torch.linalg.svdvals(z)
    p = singular / singular.sum().clamp(min=1e-30)
    return {"std": float((variance / z.numel()).sqrt()), "rank": float(torch.special.entr(p).sum().exp()),
            "maps": float(between / (variance / B).clamp(min=1e-30)),
            "constant": float(F.smooth_l1_loss(z, torch.zeros_like(z)))}


# ---- Fine-tuning -------------------------------------------------------------------------------------------------------

def bin_centres(bins: int, like: Tensor) -> Tensor:
    return (torch.arange(bins, device=like.device, dtype=like.dtype) + 0.5) / bins


def kernel(u: Tensor) -> Tensor:
    """exp(-u^2 / 2) of (6), not below e^-50: logarithms stay finite, and values under float32's normal range are slow."""
    return u.square().mul_(-0.5).clamp_(min=-50).exp_()


class SoftHistogram(torch.autograd.Function):
    """(6) of maps (B, n): (B, K) float64. In pieces, which the backward pass computes again: never (B, n, K) at once."""

    @staticmethod
    def forward(ctx, x: Tensor, bins: int, sigma: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bins, ctx.sigma = bins, sigma
        c, (B, n) = bin_centres(bins, x), x.shape
        h = x.new_zeros(B, bins, dtype=torch.float64)
        for part in x.split(max(1, PIECE[x.device.type] // (B * bins)), dim=1):
            h += kernel((part[..., None] - c) / sigma).sum(1)                  # (B, piece, K)
        return h / n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):                                           # grad (B, K): dL/dh
        x, = ctx.saved_tensors
        c, (B, n), grad = bin_centres(ctx.bins, x), x.shape, grad.to(x.dtype)[:, None]
        pieces = []
        for part in x.split(max(1, PIECE[x.device.type] // (B * ctx.bins)), dim=1):
            u = (part[..., None] - c) / ctx.sigma
            pieces.append(-(kernel(u).mul_(u) @ grad.mT)[..., 0])              # n sigma sum_j dL/dh_j dh_j/dx_i
        return torch.cat(pieces, dim=1) / (n * ctx.sigma), None, None


def soft_histogram(x: Tensor, bins: int = 64, sigma: float | None = None, *, normalise: bool = True) -> Tensor:
    """p of (7), or h of (6): maps (B, ...) -> (B, bins) float64. sigma: default 1 / bins, a bin's width.

    Values beyond [0, 1] count in the outermost bins as far as sigma reaches, further ones not at all.
    Raises ValueError if bins or sigma is not positive.
    """
    sigma = 1 / bins if sigma is None and bins > 0 else sigma
    if bins < 1 or not sigma > 0:
        raise ValueError(f"a histogram of {bins} bins and sigma {sigma}: both must be positive")
    wide = torch.promote_types(x.dtype, torch.float32)                         # bfloat16 holds 3 digits of a grey value
    h = SoftHistogram.apply(x.flatten(1).to(wide), bins, sigma)
    if not normalise:
        return h
    return (h + EPS) / (h + EPS).sum(1, keepdim=True)                          # (7)  Erratum 1


def hist_kl(x: Tensor, y: Tensor, bins: int = 64, sigma: float | None = None, *, normalise: bool = True) -> Tensor:
    """HistKL (8), the mean over maps x, y (B, ...) in [0, 1] of a divergence per map, in nats; a scalar, float32 at least.

    Symmetric, 0 for equal histograms. normalise=False: eq. 2 as printed, no longer at most log 2. The few numbers behind
    the sum over voxels are float64: p - q may be a millionth of p. Raises ValueError if the shapes differ, or see
    `soft_histogram`.
    """
    if x.shape != y.shape:
        raise ValueError(f"maps of shapes {tuple(x.shape)} and {tuple(y.shape)} have no common batch; want one shape")
    p, q = (soft_histogram(v, bins, sigma, normalise=normalise) for v in (x, y))
    m = (p + q) / 2
    js = 0.5 * (p * (p / m).log() + q * (q / m).log()).sum(1)                  # (8)
    return js.mean().to(torch.promote_types(x.dtype, torch.float32))


def composite_loss(x: Tensor, y: Tensor, alpha: float = 0.5, bins: int = 64, sigma: float | None = None) -> Tensor:
    """(9), a scalar: predictions x and targets y (B, 1, D, H, W) in [0, 1]. Raises ValueError if alpha is not in 0..1."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha:g}; it must lie in 0..1")
    loss = alpha * F.mse_loss(x.float(), y.float())
    return loss + (1 - alpha) * hist_kl(x, y, bins, sigma) if alpha < 1 else loss
