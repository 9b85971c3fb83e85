"""The network of CryoLVM: a 3-D Swin-Conv U-Net, from a map to features or to a restored map.

A block splits its channels in half. Convolutions see the nearest voxels, attention in windows of
w^3 voxels sees further. Every second block moves its windows by w // 2, to mix between windows:

    a, b = split(W1 x);  x <- x + W2 [conv(a), trans(b)]                                        (1)
    conv(a) = a + FRN(K2 FRN(K1 a)),  K 3x3x3 convolutions                                      (2)
    FRN(x) = max(gamma x / sqrt(<x^2> + eps) + beta, tau),  <> over z, y, x of one channel      (3)
    b <- b + Attn(LN b);  trans(b) = b + MLP(LN b)                                              (4)
    Attn: softmax(q . k / sqrt(d) + R_h[r_q - r_k]) v  over the window's voxels r               (5)

The encoder halves the grid and doubles the channels after each stage. The decoder goes back:

    x_1 = head(x),  x_2 = down_1(x_1),  x_3 = down_2(x_2),  x_4 = down_3(x_3),  y = body(x_4)   (6)
    y <- up_3(y + x_4),  y <- up_2(y + x_3),  y <- up_1(y + x_2),  out = tail(y + x_1)          (7)

CryoLVM section 3.1, appendix C (Figs. 7, 8), Table 5; Zhang et al. 2023 (SCUNet, 2-D). (3): Singh &
Krishnan 2020. The authors published no code. Table 5 is that of EMReady's 3-D SCUNet (He et al.
2023), whose public code decides what the paper leaves open and gives the names within a block.

(3) averages over all voxels, so a map evaluated at once differs from its tiles put together. Use
tiles of the box it was trained on.
Departure 2: stochastic depth is absent, because its rate in Table 5 is zero.
Not stated: PyTorch's initial weights, and N(0, 0.02^2) for R, as in the 2-D SCUNet.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # in (3); a frozen parameter in EMReady's code


@dataclass(frozen=True)
class SCUNetConfig:
    """Sizes of the network; the defaults are Table 5's."""

    width: int = 32  # channels of the outermost stage
    depths: tuple[int, ...] = (2, 2, 2, 2, 2, 2, 2)  # blocks on the way down, of the body, up
    d_head: int = 16
    # Departure 1: section 3.1 says 4, Table 5 and appendix E say 3. The innermost grid of a 48^3
    # map is 6^3, which 4 does not divide.
    window_size: int = 3

    def __post_init__(self):
        if len(self.depths) % 2 == 0:
            raise ValueError(
                f"depths {self.depths}: want an odd number of stages, as many up as down and the "
                "body between"
            )
        if self.width % (2 * self.d_head):
            raise ValueError(
                f"width {self.width} must be a multiple of 2 d_head = {2 * self.d_head}: half of "
                "it goes to heads"
            )

    @property
    def levels(self) -> int:
        """How often the grid is halved."""
        return len(self.depths) // 2

    @property
    def multiple(self) -> int:
        """Sides are padded to multiples of this, so that windows fill the innermost grid."""
        return self.window_size * 2**self.levels

    @property
    def feature_width(self) -> int:
        """Channels of the encoder's features."""
        return self.width * 2**self.levels


PRESETS = {
    # Half as wide, halved twice: 0.25 M parameters.
    "tiny": SCUNetConfig(width=16, depths=(1, 1, 2, 1, 1), d_head=8),
    # Table 5: 4.73 M parameters, of which the encoder has 3.58 M.
    "paper": SCUNetConfig(),
}

# Shape letters: B maps; C channels; D, H, W voxels along z, y, x; N windows; T = w^3 voxels of a
# window; n heads; d channels of a head. Convolutions want (B, C, D, H, W), attention
# (B, D, H, W, C).


# ---- Windows


def cut_windows(x: Tensor, w: int) -> Tensor:
    """(B, D, H, W, C) -> (B, N, T, C)."""
    B, D, H, W, C = x.shape
    x = x.reshape(B, D // w, w, H // w, w, W // w, w, C)
    x = x.permute(0, 1, 3, 5, 2, 4, 6, 7)  # (B, D/w, H/w, W/w, w, w, w, C)
    return x.reshape(B, -1, w**3, C)


def join_windows(x: Tensor, w: int, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of cut_windows; shape is (D, H, W)."""
    D, H, W = shape
    x = x.view(len(x), D // w, H // w, W // w, w, w, w, -1)
    x = x.permute(0, 1, 4, 2, 5, 3, 6, 7)  # (B, D/w, w, H/w, w, W/w, w, C)
    return x.reshape(len(x), D, H, W, -1)


def relative_positions(w: int) -> Tensor:
    """(3, T, T): r_q - r_k of a window's voxels along z, y, x, plus w - 1 so that all are >= 0."""
    # On the CPU, because torch imports its compiler, for 2 s, to do this on the meta device.
    r = torch.cartesian_prod(*[torch.arange(w, device="cpu")] * 3).T  # (3, T)
    return r[:, :, None] - r[:, None] + w - 1


def apart(shape: tuple[int, int, int], shift: tuple[int, int, int], w: int, device) -> Tensor:
    """(N, T, T): True where two voxels of a window are no neighbours.

    After the roll by `shift`, the last windows also hold voxels from the opposite face.
    """
    # Number the 8 parts of the rolled map by whether a voxel came round from the other end of z, y
    # and x. Voxels of one part were neighbours before the roll.
    moved = []
    for n, s in zip(shape, shift):
        moved.append((torch.arange(n, device=device) >= n - s).long())
    z, y, x = moved
    part = 4 * z[:, None, None] + 2 * y[:, None] + x  # (D, H, W)
    part = cut_windows(part[None, ..., None], w)[0]  # (N, T, 1)
    return part != part.transpose(1, 2)


# ---- Blocks


class WindowAttention(nn.Module):
    """(5) on (B, D, H, W, C): attention within windows."""

    def __init__(self, config: SCUNetConfig, width: int, shifted: bool):
        super().__init__()
        self.d_head = config.d_head
        self.window = config.window_size
        self.shifted = shifted
        heads = width // config.d_head
        offsets = 2 * config.window_size - 1
        R = torch.empty(heads, offsets, offsets, offsets)
        self.relative_position_params = nn.Parameter(R)
        relation = relative_positions(config.window_size)
        self.register_buffer("relation", relation, persistent=False)
        self.embedding_layer = nn.Linear(width, 3 * width)
        self.linear = nn.Linear(width, width)
        nn.init.trunc_normal_(self.relative_position_params, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        # Move the windows. An axis that is one window long stays in place, because a shift would
        # only cut its window in two.
        w = self.window
        shape = x.shape[1:4]
        shift = [w // 2 if self.shifted and n > w else 0 for n in shape]
        x = cut_windows(x.roll([-s for s in shift], (1, 2, 3)), w)

        # Attention within each window. The bias keeps the logits float32 under autocast.    (5)
        qkv = self.embedding_layer(x).unflatten(-1, (3, -1, self.d_head))  # (B, N, T, 3, n, d)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # each (B, N, n, T, d)
        dz, dy, dx = self.relation
        bias = self.relative_position_params[:, dz, dy, dx]  # (n, T, T)
        logits = (q * self.d_head**-0.5) @ k.transpose(-2, -1) + bias
        if any(shift):
            blocked = apart(shape, shift, w, x.device)[:, None]
            logits = logits.masked_fill(blocked, -torch.inf)
        x = logits.softmax(-1).to(v.dtype) @ v
        x = x.transpose(2, 3).flatten(-2)  # (B, N, T, C)

        # Back to the grid, and the windows back in place.
        return join_windows(self.linear(x), w, shape).roll(shift, (1, 2, 3))


class Transformer(nn.Module):
    """(4) on (B, D, H, W, C): attention, then an MLP."""

    def __init__(self, config: SCUNetConfig, width: int, shifted: bool):
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.msa = WindowAttention(config, width, shifted)
        self.ln2 = nn.LayerNorm(width)
        expand = nn.Linear(width, 4 * width)
        contract = nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(expand, nn.GELU(), contract)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.msa(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class FilterResponseNorm(nn.Module):
    """(3) on (B, C, D, H, W), in float32. Its parameters are 1-D, so that they do not decay."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))
        self.tau = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        # float32, because the square of a float16 overflows.
        gamma, beta, tau = (p.view(-1, 1, 1, 1) for p in (self.gamma, self.beta, self.tau))
        square = x.float().square().mean((2, 3, 4), keepdim=True)
        normalised = gamma * torch.rsqrt(square + EPS) * x + beta
        return torch.maximum(normalised, tau).to(x.dtype)


class SwinConvBlock(nn.Module):
    """(1) on (B, C, D, H, W): convolutions beside attention."""

    def __init__(self, config: SCUNetConfig, width: int, shifted: bool):
        super().__init__()
        half = width // 2
        self.conv1_1 = nn.Conv3d(width, width, 1)
        self.conv1_2 = nn.Conv3d(width, width, 1)
        self.conv_block = nn.Sequential(
            nn.Conv3d(half, half, 3, padding=1, bias=False),
            FilterResponseNorm(half),
            nn.Conv3d(half, half, 3, padding=1, bias=False),
            FilterResponseNorm(half),
        )
        self.trans_block = Transformer(config, half, shifted)

    def forward(self, x: Tensor) -> Tensor:
        # Convolutions for one half of the channels, attention for the other.
        a, b = self.conv1_1(x).chunk(2, dim=1)
        a = a + self.conv_block(a)  # (2)
        b = self.trans_block(b.movedim(1, -1)).movedim(-1, 1)
        return x + self.conv1_2(torch.cat((a, b), dim=1))  # (1)


def stage(config: SCUNetConfig, depth: int, level: int) -> list[SwinConvBlock]:
    """Blocks of one stage, on the grid halved `level` times; every second one is shifted."""
    width = config.width * 2**level
    return [SwinConvBlock(config, width, shifted=i % 2 == 1) for i in range(depth)]


# ---- Network


class Encoder(nn.Module):
    """(6): from a map to features on a coarse grid."""

    def __init__(self, config: SCUNetConfig):
        super().__init__()
        self.multiple = config.multiple
        self.head = nn.Conv3d(1, config.width, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        for level in range(config.levels):
            width = config.width * 2**level
            halve = nn.Conv3d(width, 2 * width, 2, stride=2, bias=False)
            blocks = stage(config, config.depths[level], level)
            self.down.append(nn.Sequential(*blocks, halve))
        self.body = nn.Sequential(*stage(config, config.depths[config.levels], config.levels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 1, D, H, W) -> features y (B, config.feature_width, D', H', W').

        D' = D / 2^levels after padding. Raises ValueError if x has another shape.
        """
        return self.pyramid(x)[-1]

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """[x_1, x_2, x_3, x_4, y] of (6): what the decoder needs."""
        if x.ndim != 5 or x.shape[1] != 1:
            raise ValueError(f"map of shape {tuple(x.shape)}: want (B, 1, D, H, W)")

        # Not stated: how sides grow to multiples of 8 w. We repeat the last voxels, as the 2-D
        # SCUNet does. Zeros lower <x^2> in (3) everywhere: what is left of a real map cut to 40^3
        # or 30^3 was then 1.2 to 7 times as far from its uncut output (four maps, untrained).
        pad_z, pad_y, pad_x = (-n % self.multiple for n in x.shape[2:])
        if pad_z or pad_y or pad_x:
            x = F.pad(x, (0, pad_x, 0, pad_y, 0, pad_z), mode="replicate")

        # Keep the input of every stage for the decoder.
        levels = [self.head(x)]
        for down in self.down:
            levels.append(down(levels[-1]))
        return [*levels, self.body(levels[-1])]


class Decoder(nn.Module):
    """(7): from the features of all grids back to a map."""

    def __init__(self, config: SCUNetConfig):
        super().__init__()
        self.up = nn.ModuleList()  # from the innermost grid outwards
        for level in reversed(range(config.levels)):
            width = config.width * 2**level
            double = nn.ConvTranspose3d(2 * width, width, 2, stride=2, bias=False)
            blocks = stage(config, config.depths[-1 - level], level)
            self.up.append(nn.Sequential(double, *blocks))
        self.tail = nn.Conv3d(config.width, 1, 3, padding=1, bias=False)

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        """[x_1, x_2, x_3, x_4, y] -> map (B, 1, D, H, W), sides as padded."""
        # Add what the encoder had on each grid, from the innermost outwards.
        *skips, y = pyramid
        for up in self.up:
            y = up(y + skips.pop())
        return self.tail(y + skips.pop())


class SCUNet(nn.Module):
    """The network: `encoder` is pre-trained (jepa.py), `decoder` learns with the task."""

    def __init__(self, config: SCUNetConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 1, D, H, W) in network scale, any size -> the same shape, float32.

        Raises ValueError if x has another shape.
        """
        # Cut off the padding.
        y = self.decoder(self.encoder.pyramid(x))
        D, H, W = x.shape[2:]
        return y[..., :D, :H, :W].float()
