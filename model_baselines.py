"""The networks that the papers compare against: a ViT (CryoLVM), a VAE and a latent flow (CryoFM).

ViT. One token stands for p^3 voxels, every token sees every other, and the decoder is the SCUNet's
(model_scunet.py) with no skips to add, because a ViT has one grid only:

    s = P x + z,  s <- layers(s),  out = decoder(LN s)      P: a linear map of patches          (1)

VAE-d and LFM-d. A VAE learns to write d^3 voxels as c numbers, a flow learns how these are
distributed:

    mu, log sigma^2 = E(x),  z = mu + sigma e,  x^ = D(z)                e ~ N(0, I)            (2)
    L = <|x^ - x|> + beta / n sum_i (mu_i^2 + sigma_i^2 - 1 - log sigma_i^2) / 2                (3)
    E, D: x <- x + conv(silu GN conv(silu GN x)); attention on the coarsest grid                (4)
    the flow (3) of flow.py on z / s     s: standard deviation of all z, a running mean         (5)
    h = LN(x) (1 + scale) + shift;  x <- x + gate f(h)      f: attention, then an MLP           (6)

In (3) <> is over the n voxels of a map. In (6), DiT's, shift, scale and gate depend on t.

(1): CryoLVM, appendix G.1. It names "ViT" and nothing else, so Dosovitskiy et al. 2021, pre-norm.
(2)-(5): CryoFM (arXiv:2410.08631), appendix F.4: Stable Diffusion's autoencoder with 3-D layers
(Rombach et al. 2022, whose configurations kl-f4 and kl-f8 decide what F.4 leaves open).
(6): Peebles & Xie 2023, with 3-D patches.

Departure 1: Stable Diffusion adds a perceptual and an adversarial loss to (3). The former is made
    of a 2-D network for photographs. F.4 names neither.
Departure 2: the flow learns mu. Rombach et al. draw z, whose sigma is small because beta is.
Departure 3: s is a running mean over the VAE's training, not the value of the first batch.
Not stated: c. F.4 writes one number per cell, kl-f4 has 3 and kl-f8 has 4. We use 4 for both, so
    that VAE-8 compresses 8 times as much, as F.4.2 says.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa import positions
from model_scunet import Decoder, SCUNet

# Shape letters: B maps; D voxels, d cells of a coarse grid, along z, y and x; C channels; L = d^3
# tokens; c channels of a latent code.


def pre_norm_layer(width: int, heads: int) -> nn.Module:
    """A layer of a plain transformer, as in jepa.py's predictor."""
    return nn.TransformerEncoderLayer(
        width,
        heads,
        4 * width,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )


def refuse_unfit(x: Tensor, multiple: int) -> None:
    """Raise ValueError if x is no batch of maps whose sides are multiples of a number."""
    if x.ndim != 5 or x.shape[1] != 1 or any(n % multiple for n in x.shape[2:]):
        raise ValueError(
            f"map of shape {tuple(x.shape)}: want (B, 1, D, H, W) with sides that are "
            f"multiples of {multiple}"
        )


# ---- ViT


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of (1). The names are SCUNetConfig's, because both share the decoder."""

    width: int = 32  # channels of the decoder's outermost stage
    depths: tuple[int, ...] = (4, 2, 2, 2)  # layers of the ViT, then blocks of up_3, up_2, up_1
    heads: int = 4  # of the ViT
    d_head: int = 16  # of the decoder
    window_size: int = 3  # of the decoder

    def __post_init__(self):
        if self.feature_width % self.heads:
            raise ValueError(
                f"{self.feature_width} channels cannot be shared by {self.heads} heads"
            )

    @property
    def levels(self) -> int:
        """How often the decoder doubles the grid."""
        return len(self.depths) - 1

    @property
    def multiple(self) -> int:
        """Every side of a map must be a multiple of this."""
        return self.window_size * 2**self.levels

    @property
    def feature_width(self) -> int:
        """Channels of a token."""
        return self.width * 2**self.levels


class ViTEncoder(nn.Module):
    """(1): from a map to features on a grid of one cell per patch."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        # P is a convolution whose stride is its kernel.
        width = config.feature_width
        patch = 2**config.levels
        self.patches = nn.Conv3d(1, width, patch, stride=patch)
        layers = [pre_norm_layer(width, config.heads) for _ in range(config.depths[0])]
        self.layers = nn.Sequential(*layers, nn.LayerNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 1, D, D, D) -> features (B, config.feature_width, d, d, d).

        Raises ValueError if a side is no multiple of config.multiple.
        """
        refuse_unfit(x, self.config.multiple)
        # Patches become tokens that know their places.
        x = self.patches(x)
        grid = x.shape[2:]
        z = positions(tuple(grid), x.shape[1]).to(x)
        s = x.flatten(2).transpose(1, 2) + z  # (B, L, C)

        # Tokens look at each other, and go back to the grid.
        return self.layers(s).transpose(1, 2).unflatten(2, grid)

    def pyramid(self, x: Tensor) -> list:
        """What the SCUNet's decoder takes: no skips, that is zeros, and the features."""
        return [0.0] * (self.config.levels + 1) + [self(x)]


class ViT(SCUNet):
    """A SCUNet whose encoder is a ViT: called, pre-trained and fine-tuned as a SCUNet is."""

    def __init__(self, config: ViTConfig):
        nn.Module.__init__(self)  # not SCUNet's, which would build its own encoder
        self.config = config
        self.encoder = ViTEncoder(config)
        self.decoder = Decoder(config)


# ---- VAE


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder; the defaults are VAE-4."""

    widths: tuple[int, ...] = (128, 256, 512)  # channels per level: kl-f4
    depths: tuple[int, ...] = (2, 2, 2)  # residual blocks per level on the way down, one more up
    channels: int = 4  # c
    groups: int = 32  # of GN

    def __post_init__(self):
        if len(self.depths) != len(self.widths) or not self.depths:
            raise ValueError(
                f"depths {self.depths} and widths {self.widths} need one entry per level"
            )
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"widths {self.widths} must be multiples of {self.groups} groups")

    @property
    def factor(self) -> int:
        """d: voxels per side of a cell."""
        return 2 ** (len(self.widths) - 1)

    @property
    def multiple(self) -> int:
        """Every side of a map must be a multiple of this."""
        return self.factor


class ResidualBlock(nn.Module):
    """(4) on (B, C, D, D, D)."""

    def __init__(self, width_in: int, width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv3d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1)
        same = width_in == width
        self.shortcut = nn.Identity() if same else nn.Conv3d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class VoxelAttention(nn.Module):
    """Every voxel of a coarse grid looks at every other, with one head."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.qkv = nn.Conv3d(width, 3 * width, 1)
        self.out = nn.Conv3d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Attention wants tokens, the rest of the network a grid.
        tokens = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, L, 3 C)
        q, k, v = tokens.chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class Halve(nn.Module):
    """Half the grid. The zeros are at the far end only, as in Stable Diffusion."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1) * 3))


def middle(width: int, groups: int) -> list[nn.Module]:
    """The coarsest grid, the same on both ways."""
    return [
        ResidualBlock(width, width, groups),
        VoxelAttention(width, groups),
        ResidualBlock(width, width, groups),
    ]


def ending(width: int, width_out: int, groups: int) -> list[nn.Module]:
    return [
        nn.GroupNorm(groups, width, eps=1e-6),
        nn.SiLU(),
        nn.Conv3d(width, width_out, 3, padding=1),
    ]


def vae_encoder(config: VAEConfig) -> nn.Sequential:
    """E of (2): (B, 1, D, D, D) -> (B, 2 c, d, d, d)."""
    width = config.widths[0]
    layers = [nn.Conv3d(1, width, 3, padding=1)]
    # Blocks on each grid, of which the first sets the width. Every grid but the last is halved.
    for level, (depth, wider) in enumerate(zip(config.depths, config.widths)):
        for _ in range(depth):
            layers.append(ResidualBlock(width, wider, config.groups))
            width = wider
        if level < len(config.widths) - 1:
            layers.append(Halve(width))

    # The coarsest grid, then mu and log sigma^2.
    layers += middle(width, config.groups)
    layers += ending(width, 2 * config.channels, config.groups)
    layers.append(nn.Conv3d(2 * config.channels, 2 * config.channels, 1))
    return nn.Sequential(*layers)


def vae_decoder(config: VAEConfig) -> nn.Sequential:
    """D of (2): (B, c, d, d, d) -> (B, 1, D, D, D)."""
    # The coarsest grid first.
    width = config.widths[-1]
    layers = [nn.Conv3d(config.channels, config.channels, 1)]
    layers.append(nn.Conv3d(config.channels, width, 3, padding=1))
    layers += middle(width, config.groups)
    # Then the encoder's grids from the coarsest to the finest.
    for level in reversed(range(len(config.widths))):
        for _ in range(config.depths[level] + 1):
            layers.append(ResidualBlock(width, config.widths[level], config.groups))
            width = config.widths[level]
        if level > 0:
            layers += [nn.Upsample(scale_factor=2), nn.Conv3d(width, width, 3, padding=1)]
    layers += ending(width, 1, config.groups)
    return nn.Sequential(*layers)


class VAE(nn.Module):
    """(2): Stable Diffusion's autoencoder in 3-D. Maps in network scale."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = vae_encoder(config)
        self.decoder = vae_decoder(config)
        self.register_buffer("code_std", torch.ones(()))  # s of (5)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu and log sigma^2 of maps (B, 1, D, D, D), float32 (B, c, d, d, d) each.

        Raises ValueError if a side is no multiple of config.factor.
        """
        refuse_unfit(x, self.config.factor)
        mu, log_variance = self.encoder(x).float().chunk(2, dim=1)
        return mu, log_variance.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """Maps (B, 1, D, D, D), float32, of codes z (B, c, d, d, d)."""
        return self.decoder(z).float()

    def forward(self, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """x^ of (2), and the sum of (3), (B,). e: noise (B, c, d, d, d)."""
        # Draw a code.
        mu, log_variance = self.encode(x)
        variance = log_variance.exp()
        z = mu + variance.sqrt() * e  # (2)
        if self.training:
            self.code_std.lerp_(z.detach().std(), 0.02)  # (5)

        # How far its law is from N(0, I), and what the decoder makes of it.
        kl = (mu.square() + variance - 1 - log_variance).flatten(1).sum(1) / 2  # (3)
        return self.decode(z), kl


def vae_loss(net, x: Tensor, e: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(3) of maps x (B, 1, D, D, D), and its first term: (B,) each.

    net: a VAE, or its wrapper; e: as in VAE.forward.
    """
    restored, kl = net(x, e)
    l1 = (restored - x).abs().flatten(1).mean(1)
    return l1 + beta * kl / x[0].numel(), l1


# ---- Latent flow


@dataclass(frozen=True)
class LatentFlowConfig(VAEConfig):
    """Sizes of a VAE and of the DiT on its codes; the defaults are LFM-4."""

    patch_size: int = 2  # in cells
    layers: int = 12
    width: int = 1024
    heads: int = 16  # not stated; DiT's are 64 wide

    @property
    def multiple(self) -> int:
        return self.factor * self.patch_size


class DiTBlock(nn.Module):
    """(6) on tokens (B, L, C); c (B, C) stands for the time."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        expand = nn.Linear(width, 4 * width)
        contract = nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(expand, nn.GELU("tanh"), contract)
        self.modulation = nn.Linear(width, 6 * width)
        # At first all gates are 0, and the block changes nothing.
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        # One vector per map, for all its tokens.
        modulation = self.modulation(F.silu(c))[:, None]  # (B, 1, 6 C)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, dim=-1)

        # Tokens exchange information, then each one is processed by itself.
        h = modulated(x, shift_1, scale_1)
        x = x + gate_1 * self.attention(h, h, h, need_weights=False)[0]
        h = modulated(x, shift_2, scale_2)
        return x + gate_2 * self.mlp(h)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """h of (6)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class DiT(nn.Module):
    """The velocity of codes: (B, c, d, d, d) and t (B,) -> (B, c, d, d, d)."""

    def __init__(self, config: LatentFlowConfig):
        super().__init__()
        p = config.patch_size
        width = config.width
        self.patches = nn.Conv3d(config.channels, width, p, stride=p)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(DiTBlock(width, config.heads) for _ in range(config.layers))
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.ConvTranspose3d(width, config.channels, p, stride=p)
        # An untrained network predicts a velocity of 0.
        for layer in (self.modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        # The time on 0..1000, as sines and cosines.
        frequencies = 10000.0 ** (-torch.arange(128, device=t.device) / 128)
        angle = 1000 * t[:, None] * frequencies
        c = self.time(torch.cat((angle.cos(), angle.sin()), dim=-1))  # (B, C)

        # Patches to tokens, which know their places.
        x = self.patches(z)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)  # (B, L, C)
        x = x + positions(tuple(grid), x.shape[-1]).to(x)

        # Attention and MLP, conditioned on the time.
        for block in self.blocks:
            x = block(x, c)

        # Back to patches.
        shift, scale = self.modulation(F.silu(c))[:, None].chunk(2, dim=-1)
        x = modulated(x, shift, scale)
        return self.out(x.transpose(1, 2).unflatten(2, grid)).float()


class LatentFlow(nn.Module):
    """A flow on the codes of a VAE that stays as it is: `forward` is the velocity of codes.

    encode and decode lead from maps in network scale to codes z / s (5) and back.
    """

    def __init__(self, config: LatentFlowConfig):
        super().__init__()
        self.config = config
        self.vae = frozen(VAE(config))
        self.dit = DiT(config)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """z (B, c, d, d, d), t (B,) in [0, 1] -> velocity, shaped as z, float32."""
        return self.dit(z, t)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Maps (B, 1, D, D, D) -> codes (B, c, d, d, d), Departure 2. Errors: VAE.encode."""
        return self.vae.encode(x)[0] / self.vae.code_std

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Codes (B, c, d, d, d) -> maps (B, 1, D, D, D)."""
        return self.vae.decode(z * self.vae.code_std)


def frozen(net: nn.Module) -> nn.Module:
    """net with its parameters turned into buffers, which are saved with it but never trained."""
    # Parameters that get no gradient would stop DDP, and --resume, which wants their moments.
    for module in net.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, p.detach())
    return net


PRESETS = {
    # About as large as the SCUNet of the same name, whose encoder has 3.58 M or 0.19 M parameters.
    "vit": ViTConfig(),
    "tiny-vit": ViTConfig(width=16, depths=(4, 1, 1), heads=4, d_head=8),
    # Stable Diffusion's kl-f4 and kl-f8.
    "vae-4": VAEConfig(),
    "vae-8": VAEConfig(widths=(128, 256, 512, 512), depths=(2, 2, 2, 2)),
    "tiny-vae-4": VAEConfig(widths=(8, 16, 32), depths=(1, 1, 1), groups=4),
    "tiny-vae-8": VAEConfig(widths=(8, 16, 32, 32), depths=(1, 1, 1, 1), groups=4),
    # Appendix F.4.1: 12 layers of width 1024, patches of 2.
    "lfm-4": LatentFlowConfig(),
    "lfm-8": LatentFlowConfig(widths=(128, 256, 512, 512), depths=(2, 2, 2, 2)),
    "tiny-lfm-4": LatentFlowConfig(
        widths=(8, 16, 32), depths=(1, 1, 1), groups=4, layers=4, width=128, heads=4
    ),
    "tiny-lfm-8": LatentFlowConfig(
        widths=(8, 16, 32, 32), depths=(1, 1, 1, 1), groups=4, layers=4, width=128, heads=4
    ),
}
