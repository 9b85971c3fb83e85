"""CryoLVM's objectives: pre-training on what is hidden (JEPA, MAE), and the loss of fine-tuning.

Some cells of a map are hidden. A predictor g guesses, from the tokens of the visible cells,
the tokens that a slow copy of the encoder f (the target encoder) makes of the hidden ones:

    s = W f_theta(m x),  s' = W' f_theta'(x)      m = 0 in hidden cells; the copy sees all      (1)
    s^_i = g_phi({s_j + z_j : j visible}, {e + z_k : k hidden})_i   z: positions; e is learned  (2)
    L = E_x <SmoothL1_beta(s^_i - LN s'_i)>       <> over the hidden i and all channels         (3)
    theta' <- mu theta' + (1 - mu) theta          mu rises to 1 with the step; W likewise       (4)
    MAE: L = E_x <(net(m x) - x)^2>               <> over the hidden voxels                     (5)

Fine-tuning adds to the squared error a divergence of smooth grey-value histograms:

    h_j(x) = 1/n sum_i exp(-((x_i - c_j) / sigma)^2 / 2)      c_j: centres of bins on [0, 1]    (6)
    p = h(x) / sum_j h_j(x),  q likewise of y,  m = (p + q) / 2                                 (7)
    JS(p | q) = 1/2 sum_j p_j log(p_j / m_j) + 1/2 sum_j q_j log(q_j / m_j)       in nats       (8)
    L = alpha <(x - y)^2> + (1 - alpha) JS                                                      (9)

(1)-(3): CryoLVM section 3.1, eq. 1. (6), (8), (9): section 3.2, eq. 2-5. The authors published no
code. What the paper leaves open is as in I-JEPA (Assran et al. 2023): LN without parameters, beta,
blocks, mu, schedules; or as in V-JEPA (Bardes et al. 2024): z, one pass of g for all blocks.
(5): He et al. 2022, the comparator of Table 11. Not stated: the size of the predictor, bins (64),
sigma (a bin's width) and alpha (0.5). Departures 1 to 3 and erratum 1 stand beside their lines.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

# Shape letters: B maps; D, H, W voxels; d, h, w cells of the feature grid along z, y, x; L = d h w
# tokens, x fastest; C channels of a token; n voxels and K bins of a histogram.
# token_mask (B, d, h, w): True = visible.


@dataclass(frozen=True)
class JEPAConfig:
    """Sizes of the predictor."""

    width: int = 192
    depth: int = 6
    heads: int = 6
    # Departure 1: the text masks tokens, after the encoder. Then visible tokens have seen what is
    # to be predicted. Fig. 1 masks the input, as "input" does, with zeros. "embedding" is the text.
    mask_at: str = "input"

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be shared by {self.heads} heads")
        if self.mask_at not in ("input", "embedding"):
            raise ValueError(f"mask_at {self.mask_at!r}: choose 'input' or 'embedding'")


PRESETS = {
    "tiny": JEPAConfig(width=96, depth=3, heads=3),
    "paper": JEPAConfig(),
}


# ---- Masks and positions


def block_sides(grid: tuple[int, int, int], scale: tuple[float, float], aspect: float) -> Tensor:
    """Sides (k, 3) of every block of whole cells that may be hidden.

    It holds a share of the grid within `scale`, and no side is longer than aspect * another.
    """
    # All blocks that fit the grid, of which some have the right size and shape.
    sides = torch.cartesian_prod(*[torch.arange(1, n + 1) for n in grid]).view(-1, 3)
    share = sides.prod(1) / math.prod(grid)
    in_scale = (share >= scale[0]) & (share <= scale[1])
    compact = sides.amax(1) <= aspect * sides.amin(1)
    return sides[in_scale & compact]


def fitting_sides(
    grid: tuple[int, int, int],
    blocks: int = 4,
    scale: tuple[float, float] = (0.15, 0.2),
    aspect: float = 1.5,
    least: int = 8,
) -> Tensor:
    """`block_sides` of masks that leave enough of a grid. Arguments: see `block_masks`.

    Raises ValueError if no block fits, or if fewer than `least` tokens could stay visible.
    """
    sides = block_sides(grid, scale, aspect)
    cells = math.prod(grid)
    if len(sides) == 0:
        raise ValueError(
            f"no block of whole cells holds {scale[0]:g} to {scale[1]:g} of {tuple(grid)} cells; "
            "give larger crops"
        )
    visible = cells - blocks * int(sides.prod(1).max())
    if visible < least:
        raise ValueError(
            f"{blocks} blocks can leave {max(visible, 0)} of {cells} tokens visible, want {least}; "
            "give larger crops"
        )
    return sides


def block_masks(
    maps: int,
    grid: tuple[int, int, int],
    generator: Generator | None = None,
    *,
    blocks: int = 4,
    scale: tuple[float, float] = (0.15, 0.2),
    aspect: float = 1.5,
    least: int = 8,
) -> Tensor:
    """token_mask (maps, d, h, w): False in `blocks` random blocks, anywhere, free to overlap.

    scale, aspect: see `block_sides`. least: tokens that stay visible at least. On 6^3 cells only
    blocks of 3 x 3 x 4 cells, in any order, fit. On average 54 % stay visible. I-JEPA draws one
    size of block per batch, we draw one per block.
    Raises ValueError as `fitting_sides` does.
    """
    sides = fitting_sides(grid, blocks, scale, aspect, least)

    # Draw the sides of each block, and then its corner, so that it lies inside the grid.
    device = "cpu" if generator is None else generator.device
    choice = torch.rand(maps, blocks, generator=generator, device=device)
    place = torch.rand(maps, blocks, 3, generator=generator, device=device)
    side = sides.to(device)[(choice * len(sides)).long()]  # (B, blocks, 3)
    room = torch.tensor(grid, device=device) - side + 1
    corner = (place * room).long()

    # A cell is in a block if each of its coordinates is.
    inside = []
    for axis, n in enumerate(grid):
        r = torch.arange(n, device=device)
        start = corner[..., axis, None]
        stop = start + side[..., axis, None]
        inside.append((r >= start) & (r < stop))  # (B, blocks, n)
    z, y, x = inside
    hidden = z[..., :, None, None] & y[..., None, :, None] & x[..., None, None, :]
    return ~hidden.any(1)


def hide(x: Tensor, token_mask: Tensor) -> Tensor:
    """m x of (1): maps (B, 1, D, H, W) with zeros, no density, in the hidden cells.

    Raises ValueError if a side is no multiple of the grid's.
    """
    # Every cell must have the same number of voxels.
    cells = token_mask.shape[1:]
    remainders = [side % n for side, n in zip(x.shape[2:], cells, strict=True)]
    if len(x) != len(token_mask) or any(remainders):
        raise ValueError(
            f"maps {tuple(x.shape)} do not divide into cells of a mask {tuple(token_mask.shape)}"
        )
    m = F.interpolate(token_mask[:, None].to(x.dtype), x.shape[2:], mode="nearest")
    return x * m


def positions(grid: tuple[int, int, int], width: int) -> Tensor:
    """z of (2), as V-JEPA's table: (L, width) float64.

    Equal parts for z, y, x, cut at `width`. Half of a part is sines, half cosines.
    """
    # Frequencies fall from 1 to almost 1/10000.
    half = math.ceil(width / 6)
    omega = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)

    # One row for each cell: angles of its z, then y, then x.
    axes = [torch.arange(n, dtype=torch.float64) for n in grid]
    r = torch.cartesian_prod(*axes).view(-1, 3)
    angle = r[..., None] * omega  # (L, 3, half)
    return torch.cat((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :width]


# ---- Networks


class TokenEncoder(nn.Module):
    """W f_theta of (1): maps (B, 1, D, H, W) -> tokens (B, L, C).

    encoder: maps -> features (B, C, d, h, w).
    """

    def __init__(self, encoder: nn.Module, width: int):
        super().__init__()
        self.encoder = encoder
        self.embed = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        features = self.encoder(x)
        return self.embed(features.flatten(2).transpose(1, 2))


class JEPA(nn.Module):
    """Context encoder and predictor in one module: all that the optimiser trains, in one DDP.

    The target encoder is a deep copy of `.context`. It is kept outside, see `update_target`.
    encoder, width: as in TokenEncoder; grid: cells of its features (6^3 for crops of 48^3).
    """

    def __init__(
        self,
        encoder: nn.Module,
        width: int,
        grid: tuple[int, int, int],
        config: JEPAConfig = JEPAConfig(),
    ):
        super().__init__()
        self.config = config
        self.context = TokenEncoder(encoder, width)
        self.register_buffer("positions", positions(grid, width).float(), persistent=False)
        self.mask_token = nn.Parameter(torch.empty(width))  # e; 1-D, so that it does not decay

        # g of (2): a plain transformer over all tokens.
        layers = [nn.Linear(width, config.width)]
        for _ in range(config.depth):
            block = nn.TransformerEncoderLayer(
                config.width,
                config.heads,
                4 * config.width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            layers.append(block)
        layers += [nn.LayerNorm(config.width), nn.Linear(config.width, width)]
        self.predictor = nn.Sequential(*layers)

        # Initial weights as in I-JEPA.
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for p in self.predictor.parameters():
            if p.ndim == 2:
                nn.init.trunc_normal_(p, std=0.02)

    def forward(self, x: Tensor, token_mask: Tensor) -> Tensor:
        """Maps (B, 1, D, H, W) and token_mask (B, d, h, w) -> predictions (B, L, C).

        Those of visible tokens have no meaning. Raises ValueError if x, mask and grid do not fit.
        """
        # Encode what is visible, see Departure 1.
        if self.config.mask_at == "input":
            x = hide(x, token_mask)
        s = self.context(x)  # (1)
        visible = token_mask.flatten(1)
        if s.shape[:2] != visible.shape or len(self.positions) != s.shape[1]:
            raise ValueError(
                f"maps {tuple(x.shape)} give {s.shape[1]} tokens, the mask has {visible.shape[1]} "
                f"and the predictor {len(self.positions)} places; give crops whose sides fill the "
                "encoder's grid"
            )

        # Put e in place of the hidden tokens, say where each token is, and predict.
        s = torch.where(visible[..., None], s, self.mask_token)
        return self.predictor(s + self.positions)  # (2)


# ---- Pre-training


def jepa_loss(
    net, target_encoder: nn.Module, x: Tensor, token_mask: Tensor, beta: float = 1.0
) -> Tensor:
    """(3), a scalar, float32. net: a JEPA, or its wrapper; x: maps (B, 1, D, H, W)."""
    # Departure 2: the text adds z to the targets too. Then they differ between places even if the
    # encoder is constant, and a collapse looks like progress. Ours have no z.
    with torch.no_grad():
        target = layer_norm(target_encoder(x))

    # Compare the predictions with the targets, over the hidden tokens only.
    prediction = net(x, token_mask).float()
    error = F.smooth_l1_loss(prediction, target, reduction="none", beta=beta).mean(-1)  # (B, L)
    return mean_hidden(error, token_mask.flatten(1))


def mae_loss(net, x: Tensor, token_mask: Tensor) -> Tensor:
    """(5), a scalar, float32. net: encoder and decoder, (B, 1, D, H, W) -> the same shape."""
    # The network sees only the visible voxels. Its error counts only in the hidden ones.
    error = (net(hide(x, token_mask)).float() - x).square()
    visible = hide(torch.ones_like(x), token_mask) > 0
    return mean_hidden(error, visible)


def mean_hidden(error: Tensor, visible: Tensor) -> Tensor:
    """The mean over the hidden part of each map, then over maps.

    Departure 3: eq. 1 has a sum. A mean compares between masks, maps and batches.
    """
    hidden = (~visible).flatten(1)
    per_map = (error.flatten(1) * hidden).sum(1) / hidden.sum(1)
    return per_map.mean()


def layer_norm(tokens: Tensor) -> Tensor:
    """LN of (3): every token to mean 0 and variance 1 over its channels, float32 or float64."""
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return F.layer_norm(wide, wide.shape[-1:])


@torch.no_grad()
def update_target(target: nn.Module, context: nn.Module, momentum: float) -> None:
    """(4), after the optimiser's step; both have the same parameters in the same order."""
    torch._foreach_lerp_(list(target.parameters()), list(context.parameters()), 1 - momentum)
    for a, b in zip(target.buffers(), context.buffers(), strict=True):
        a.copy_(b)


# I-JEPA's schedules for the 0-based step. The release counts a step before it sets its learning
# rate and its decay, so these are those of step + 1.


def momentum_at(step: int, steps: int, start: float = 0.996, end: float = 1.0) -> float:
    """mu of (4), to use after this step."""
    return start + (end - start) * step / steps


def lr_at(
    step: int, steps: int, warmup: int, peak: float, start: float, end: float = 1e-6
) -> float:
    """Linear from start to peak over the warm-up, then a cosine to end."""
    if step + 1 < warmup:
        return start + (peak - start) * (step + 1) / warmup
    # max: the warm-up may take all steps.
    return cosine(peak, end, (step + 1 - warmup) / max(1, steps - warmup))


def weight_decay_at(step: int, steps: int, start: float = 0.04, end: float = 0.4) -> float:
    """A cosine from start to end; no decay for biases and other 1-D parameters."""
    return cosine(start, end, (step + 1) / steps)


def cosine(a: float, b: float, u: float) -> float:
    """From a at u = 0 to b at u = 1."""
    return b + (a - b) * (1 + math.cos(math.pi * u)) / 2


@torch.no_grad()
def collapse(tokens: Tensor) -> dict[str, float]:
    """Metrics that detect representation collapse, from target tokens (B, L, C) of unlike maps.

    std       root mean square deviation of LN s' from its mean: at most 1, 0 for equal tokens
    rank      exp(entropy) of the singular values of that deviation (Roy & Vetterli 2007): at most
              C, 1 if all tokens vary along one line
    maps      share of the variance that is between maps at one position: 1 if position says
              nothing, 0 if it says all
    constant  (3) with beta 1 if the mean token is predicted everywhere: compare a loss with it
    Raises ValueError if B < 2.
    """
    if len(tokens) < 2:
        raise ValueError(
            f"{len(tokens)} map cannot show whether tokens differ between maps; give at least 2"
        )
    # How much tokens vary, between maps and altogether.
    z = layer_norm(tokens).double()
    between = z.var(0, correction=1).sum()  # over positions and channels
    deviation = (z - z.mean((0, 1))).flatten(0, 1)  # (B L, C)
    variance = deviation.square().sum()

    # The number of directions in which they vary.
    singular = torch.linalg.svdvals(deviation)
    p = singular / singular.sum().clamp(min=1e-30)
    constant = F.smooth_l1_loss(deviation, torch.zeros_like(deviation))
    return {
        "std": float((variance / z.numel()).sqrt()),
        "rank": float(torch.special.entr(p).sum().exp()),
        "maps": float(between / (variance / len(z)).clamp(min=1e-30)),
        "constant": float(constant),
    }


# ---- Fine-tuning

# Added to h in (7). A map without values near [0, 1] then has a uniform histogram and no gradient.
EPS = 1e-8

# Numbers held at once in (6). They fit the cache of a CPU, or take 256 MB of a GPU's memory.
PIECE = {"cpu": 2**18, "cuda": 2**26}


class SoftHistogram(torch.autograd.Function):
    """(6) of maps (B, n): (B, K) float64.

    Works piece by piece, because (B, n, K) does not fit memory. The backward pass does so again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, bins: int, sigma: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bins = bins
        ctx.sigma = sigma
        h = x.new_zeros(len(x), bins, dtype=torch.float64)
        for u in distances(x, bins, sigma):
            h += kernel(u).sum(1)
        return h / x.shape[1]  # (6)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        # grad is dL/dh (B, K). Each piece is n sigma sum_j dL/dh_j dh_j/dx_i for its voxels i.
        (x,) = ctx.saved_tensors
        grad = grad.to(x.dtype)[:, None]
        pieces = []
        for u in distances(x, ctx.bins, ctx.sigma):
            slope = kernel(u).mul_(u)  # in place: the memory counts
            pieces.append(-(slope @ grad.mT)[..., 0])
        return torch.cat(pieces, dim=1) / (x.shape[1] * ctx.sigma), None, None


def distances(x: Tensor, bins: int, sigma: float):
    """Yields (x_i - c_j) / sigma of (6) for pieces of x (B, n): (B, piece, K)."""
    centres = (torch.arange(bins, device=x.device, dtype=x.dtype) + 0.5) / bins
    piece = max(1, PIECE[x.device.type] // (len(x) * bins))
    for part in x.split(piece, dim=1):
        yield (part[..., None] - centres) / sigma


def kernel(u: Tensor) -> Tensor:
    """exp(-u^2 / 2) of (6), but at least e^-50.

    Logarithms then stay finite. Values below float32's normal range would be slow.
    """
    return u.square().mul_(-0.5).clamp_(min=-50).exp_()


def soft_histogram(x: Tensor, bins: int = 64, sigma: float | None = None) -> Tensor:
    """p of (7) for maps x (B, ...): (B, bins) float64.

    sigma: default 1 / bins, the width of a bin. Values beyond [0, 1] count in the outermost bins
    as far as sigma reaches. Raises ValueError if bins or sigma is not positive.
    """
    if sigma is None and bins > 0:
        sigma = 1 / bins
    if bins < 1 or not sigma > 0:
        raise ValueError(f"a histogram of {bins} bins and sigma {sigma}: both must be positive")
    # bfloat16 holds 3 digits of a grey value.
    wide = torch.promote_types(x.dtype, torch.float32)
    h = SoftHistogram.apply(x.flatten(1).to(wide), bins, sigma) + EPS
    # Erratum 1: eq. 2 is not normalised, yet eq. 3 takes h for a distribution.
    return h / h.sum(1, keepdim=True)  # (7)


def hist_kl(x: Tensor, y: Tensor, bins: int = 64, sigma: float | None = None) -> Tensor:
    """HistKL (8) in nats, the mean over maps x, y (B, ...) in [0, 1]; a scalar.

    Symmetric, at most log 2, 0 for equal histograms.
    Raises ValueError if the shapes differ; see also `soft_histogram`.
    """
    if x.shape != y.shape:
        raise ValueError(
            f"maps of shapes {tuple(x.shape)} and {tuple(y.shape)} have no common batch; "
            "want one shape"
        )
    # Histograms are float64, because p - q may be a millionth of p. These are few numbers.
    p = soft_histogram(x, bins, sigma)
    q = soft_histogram(y, bins, sigma)
    m = (p + q) / 2
    js = 0.5 * (p * (p / m).log() + q * (q / m).log()).sum(1)  # (8)
    return js.mean().to(torch.promote_types(x.dtype, torch.float32))


def composite_loss(
    x: Tensor, y: Tensor, alpha: float = 0.5, bins: int = 64, sigma: float | None = None
) -> Tensor:
    """(9), a scalar, of predictions x and targets y (B, 1, D, H, W) in [0, 1].

    Raises ValueError if alpha is not in 0..1.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha:g}; it must lie in 0..1")
    loss = alpha * F.mse_loss(x.float(), y.float())
    if alpha < 1:
        loss = loss + (1 - alpha) * hist_kl(x, y, bins, sigma)
    return loss  # (9)
