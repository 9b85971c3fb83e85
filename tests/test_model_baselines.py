"""Claims of model_baselines.py: published sizes, closed forms, what is trained and what is not."""

from dataclasses import fields

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import model_baselines
import model_scunet
from model_baselines import VAE, DiT, LatentFlow, LatentFlowConfig, VAEConfig, ViT, ViTConfig
from model_scunet import SCUNet, SCUNetConfig

SMALL_VIT = ViTConfig(width=8, depths=(2, 1, 1), heads=2, d_head=4, window_size=2)
SMALL_VAE = VAEConfig(widths=(4, 8, 8), depths=(1, 1, 1), channels=2, groups=2)
SMALL_LFM = LatentFlowConfig(
    widths=(4, 8, 8), depths=(1, 1, 1), channels=2, groups=2, layers=2, width=24, heads=2
)


def count(net):
    return sum(p.numel() for p in net.parameters())


def randomised(net):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- Published sizes


def test_vae_8_has_stable_diffusions_layers():
    with torch.device("meta"):
        net = VAE(model_baselines.PRESETS["vae-8"])
    # In 2-D a kernel of 3 has 9 weights, not 27. Photographs have two channels more than maps, and
    # the last layer one bias more for each.
    in_2d = 2 * 2 * 128 * 9 + 2
    for module in net.modules():
        if isinstance(module, nn.Conv3d):
            thinner = 3 if module.kernel_size == (3, 3, 3) else 1
            in_2d += module.weight.numel() // thinner + module.bias.numel()
        elif isinstance(module, nn.GroupNorm):
            in_2d += 2 * module.num_channels
    assert in_2d == 83_653_863  # kl-f8


def test_dit_has_the_layers_of_the_published_dit_xl_2():
    config = LatentFlowConfig(channels=2, layers=28, width=1152, heads=16)
    with torch.device("meta"):
        ours = count(DiT(config))
    # The published one has tables of 1001 classes and 256 positions. It predicts twice as many
    # numbers for each place of a patch, and has a bias for each. Ours has a bias per channel.
    tables = 1001 * 1152 + 256 * 1152
    output = 16 * 1152 + 32 - 2
    assert ours + tables + output == 675_129_632


def test_f41s_dit_has_12_layers_of_width_1024_and_patches_of_2():
    for name in ("lfm-4", "lfm-8"):
        config = model_baselines.PRESETS[name]
        assert (config.layers, config.width, config.patch_size) == (12, 1024, 2)
        vae = model_baselines.PRESETS[name.replace("lfm", "vae")]
        assert all(getattr(config, f.name) == getattr(vae, f.name) for f in fields(vae))
    assert [model_baselines.PRESETS[f"vae-{d}"].factor for d in (4, 8)] == [4, 8]


@pytest.mark.parametrize("vit, scunet", [("vit", "paper"), ("tiny-vit", "tiny")])
def test_the_vit_is_as_large_as_the_scunet_and_has_its_decoder(vit, scunet):
    with torch.device("meta"):
        ours = ViT(model_baselines.PRESETS[vit])
        theirs = SCUNet(model_scunet.PRESETS[scunet])
    assert ours.config.feature_width == theirs.config.feature_width
    assert ours.config.levels == theirs.config.levels
    assert count(ours.decoder) == count(theirs.decoder)
    assert count(ours) == pytest.approx(count(theirs), rel=0.1)


# ---- ViT


def swap_patches(x, side):
    """Exchange the first and the last cube of `side` voxels."""
    first, last = (slice(side),) * 3, (slice(-side, None),) * 3
    swapped = x.clone()
    swapped[..., *first], swapped[..., *last] = x[..., *last], x[..., *first]
    return swapped


def test_a_vit_knows_the_place_of_a_patch_by_the_positions_alone(monkeypatch):
    net = randomised(ViT(SMALL_VIT)).eval()
    x = noise(1, 1, 8, 8, 8)
    there, and_back = net.encoder(swap_patches(x, 4)), swap_patches(net.encoder(x), 1)
    assert not torch.allclose(there, and_back, atol=0.1)
    monkeypatch.setattr(model_baselines, "positions", lambda grid, width: torch.zeros(8, width))
    there, and_back = net.encoder(swap_patches(x, 4)), swap_patches(net.encoder(x), 1)
    torch.testing.assert_close(there, and_back, rtol=0, atol=1e-5)


def test_a_vits_decoder_is_the_scunets_without_skips():
    net = randomised(ViT(SMALL_VIT)).eval()
    x = noise(2, 1, 8, 8, 16)
    config = SCUNetConfig(width=8, depths=(1, 1, 1, 1, 1), d_head=4, window_size=2)
    decoder = model_scunet.Decoder(config)
    decoder.load_state_dict(net.decoder.state_dict())
    skips = [torch.zeros_like(s) for s in model_scunet.Encoder(config).pyramid(x)[:-1]]
    expected = decoder([*skips, net.encoder(x)])
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)


# ---- VAE


def test_the_divergence_of_a_vae_is_that_of_two_normal_laws():
    net = randomised(VAE(SMALL_VAE))
    x, e = noise(3, 1, 8, 8, 8), noise(3, 2, 2, 2, 2)
    mu, log_variance = net.encode(x)
    law = Normal(mu, (log_variance / 2).exp())
    expected = kl_divergence(law, Normal(0.0, 1.0)).sum((1, 2, 3, 4))
    restored, kl = net(x, e)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(restored, net.decode(law.mean + law.stddev * e))

    # Per voxel, so that the weight of Stable Diffusion's sums is that of our means.
    loss, l1 = model_baselines.vae_loss(net, x, e, beta=0.5)
    torch.testing.assert_close(loss * 512, (restored - x).abs().sum((1, 2, 3, 4)) + 0.5 * expected)
    torch.testing.assert_close(l1, (restored - x).abs().mean((1, 2, 3, 4)))


def test_a_cell_of_d_voxels_becomes_a_code_at_its_place():
    # Each layer of a level sees few voxels, so a far change leaves a code as it was. The attention
    # and the norms see all. Without them:
    encoder = randomised(VAE(SMALL_VAE)).encoder
    local = [m for m in encoder if not isinstance(m, model_baselines.VoxelAttention)]
    for module in encoder.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    net = nn.Sequential(*[nn.Identity() if isinstance(m, nn.GroupNorm) else m for m in local])
    x = torch.zeros(1, 1, 96, 8, 8)
    changed = x.clone()
    changed[:, :, 49] = 1.0
    with torch.no_grad():
        change = (net(changed) - net(x)).abs().amax((0, 1, 3, 4))
    reached = change.nonzero()
    assert len(change) == 24 and 0 < reached.min() < 12 < reached.max() < 23  # voxel 49: cell 12
    assert abs(float((change * torch.arange(24)).sum() / change.sum()) - 12) < 1


def test_codes_are_divided_by_their_running_standard_deviation():
    vae = randomised(VAE(SMALL_VAE)).train()
    x, e = noise(2, 1, 8, 8, 8), noise(2, 2, 2, 2, 2)
    mu, log_variance = vae.encode(x)
    std = (mu + (log_variance / 2).exp() * e).std()
    for _ in range(3):
        vae(x, e)
    want = std + 0.98**3 * (1 - std)  # from 1 on, a fiftieth of the way in each step
    torch.testing.assert_close(vae.code_std, want)
    vae.eval()(2 * x, e)
    torch.testing.assert_close(vae.code_std, want)

    net = LatentFlow(SMALL_LFM)
    net.vae.load_state_dict(vae.state_dict())
    torch.testing.assert_close(net.encode(x) * vae.code_std, mu)
    torch.testing.assert_close(net.decode(net.encode(x)), vae.decode(mu))


# ---- Latent flow


def test_the_vae_of_a_latent_flow_is_saved_and_not_trained():
    net = LatentFlow(SMALL_LFM)
    trained = {name.split(".")[0] for name, _ in net.named_parameters()}
    assert trained == {"dit"}
    assert {f"vae.{name}" for name in VAE(SMALL_VAE).state_dict()} <= set(net.state_dict())


def test_an_untrained_dit_has_velocity_zero_and_blocks_that_change_nothing():
    dit = DiT(SMALL_LFM)
    z, t = noise(2, 2, 4, 4, 4), torch.tensor([0.2, 0.9])
    assert not dit(z, t).any()
    x = noise(2, 8, 24)
    torch.testing.assert_close(dit.blocks[0](x, noise(2, 24)), x, rtol=0, atol=0)


def test_a_dit_tells_times_apart_and_treats_each_map_alone():
    dit = randomised(DiT(SMALL_LFM)).eval()
    z, t = noise(2, 2, 4, 4, 4), torch.tensor([0.2, 0.9])
    both = dit(z, t)
    for i in (0, 1):
        alone = dit(z[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(both, dit(z, t.flip(0)), atol=1e-2)


@pytest.mark.parametrize(
    "net, side",
    [(ViT(SMALL_VIT), 12), (VAE(SMALL_VAE), 6), (LatentFlow(SMALL_LFM).vae, 6)],
)
def test_a_side_that_does_not_divide_is_refused(net, side):
    encode = net.encode if isinstance(net, VAE) else net
    with pytest.raises(ValueError, match="sides that are multiples of"):
        encode(torch.zeros(1, 1, side, side, side))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="cannot be shared by 3 heads"):
        ViTConfig(heads=3)
    with pytest.raises(ValueError, match="one entry per level"):
        VAEConfig(depths=(1, 1))
    with pytest.raises(ValueError, match="multiples of 32 groups"):
        VAEConfig(widths=(16, 32, 64))
