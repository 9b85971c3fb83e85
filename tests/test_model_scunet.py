"""Claims of model_scunet.py: Table 5's sizes, EMReady's numbers, windows, skips, any size."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model_scunet
from model_scunet import FilterResponseNorm, SCUNet, SCUNetConfig, SwinConvBlock, WindowAttention

ORACLES = Path(__file__).parent / "oracles"
SMALL = SCUNetConfig(width=8, depths=(1, 2, 1), d_head=4)


def oracle():
    return np.load(ORACLES / "scunet3d_block.npz")


def randomise(net, seed=0):
    """Random values for every parameter, also those that start at zero or one."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net


def noise(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_near(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_paper_preset_has_the_public_networks_parameters_stage_by_stage():
    sides = [864, 55_258, 219_060, 872_296]  # head and down, or tail and up
    net = SCUNet(model_scunet.PRESETS["paper"])
    assert [count(part) for part in (net.encoder.head, *net.encoder.down)] == sides
    assert count(net.encoder.body) == 2_432_720
    assert [count(part) for part in (*net.decoder.up, net.decoder.tail)] == sides[::-1]
    assert count(net) == 4_727_676 == count(net.encoder) + count(net.decoder)
    assert count(SCUNet(SCUNetConfig(window_size=4))) == 4_737_268


def test_tiny_preset_fits_16_megabytes_in_float16():
    assert count(SCUNet(model_scunet.PRESETS["tiny"])) == 245_062 < 16e6 / 2


@pytest.mark.parametrize("kind", ["W", "SW"])
def test_block_and_its_attention_equal_the_public_code(kind):
    z = oracle()
    config = SCUNetConfig(
        width=int(z["channels_conv"] + z["channels_trans"]), d_head=int(z["head_dim"])
    )
    block = SwinConvBlock(config, config.width, shifted=kind == "SW")
    prefix = f"{kind}_state/"
    state = {}
    for key in z:
        if key.startswith(prefix):
            state[key.removeprefix(prefix)] = torch.from_numpy(z[key]).float()
    for i in (1, 3):
        # In the public code, eps is a parameter and the others are (1, C, 1, 1, 1).
        assert (state.pop(f"conv_block.{i}.eps") == np.float32(model_scunet.EPS)).all()
        for name in ("gamma", "beta", "tau"):
            state[f"conv_block.{i}.{name}"] = state[f"conv_block.{i}.{name}"].flatten()
    block.load_state_dict(state, strict=True)
    for module, name in ((block, ""), (block.trans_block.msa, "attn_")):
        out = module(torch.from_numpy(z[f"{kind}_{name}input"]))
        expected = torch.from_numpy(z[f"{kind}_{name}output"])
        torch.testing.assert_close(out, expected, rtol=0, atol=4e-6)


def test_mask_and_relative_positions_equal_the_public_code():
    z = oracle()
    shape = z["SW_mask_shape"]
    bits = np.unpackbits(z["SW_mask_true_means_blocked"])
    blocked = bits[: np.prod(shape)].reshape(shape)
    assert (model_scunet.apart((6, 6, 6), (1, 1, 1), 3, "cpu").numpy() == blocked).all()
    assert (
        model_scunet.relative_positions(3).permute(1, 2, 0).numpy() == z["relation_index"]
    ).all()


@pytest.mark.parametrize(
    "grid, w, shift",
    [
        ((6, 3, 9), 3, (1, 0, 1)),
        ((3, 3, 3), 3, (0, 0, 0)),
        ((4, 8, 4), 4, (0, 2, 0)),
        ((8, 4, 2), 2, (1, 1, 0)),
    ],
)
def test_shifted_windows_are_cut_at_the_faces_of_the_map(grid, w, shift):
    config = SCUNetConfig(width=16, d_head=4, window_size=w)
    msa = randomise(WindowAttention(config, 8, shifted=True)).double()
    x = noise(2, *grid, 8, dtype=torch.float64)

    # Every voxel attends to every other in its window, where windows are cut at the faces.
    r = torch.cartesian_prod(*[torch.arange(n) for n in grid])
    window = torch.div(r - torch.tensor(shift), w, rounding_mode="floor")
    visible = (window[:, None] == window[None]).all(-1)
    offset = (r[:, None] - r[None] + w - 1).clamp(0, 2 * w - 2)
    R = msa.relative_position_params[:, offset[..., 0], offset[..., 1], offset[..., 2]]
    q, k, v = msa.embedding_layer(x.flatten(1, 3)).chunk(3, dim=-1)
    heads = []
    for h in range(2):
        c = slice(4 * h, 4 * h + 4)
        logits = (q[..., c] @ k[..., c].mT / 2 + R[h]).masked_fill(~visible, -torch.inf)
        heads.append(logits.softmax(-1) @ v[..., c])
    expected = msa.linear(torch.cat(heads, -1)).view_as(x)
    torch.testing.assert_close(msa(x), expected, rtol=0, atol=1e-12)


def test_two_blocks_of_a_stage_reach_across_the_windows_of_the_first():
    blocks = randomise(torch.nn.Sequential(*model_scunet.stage(SMALL, 2, 0)))
    for block in blocks:
        for i in (0, 2):
            # Attention alone carries what is seen.
            torch.nn.init.zeros_(block.conv_block[i].weight)
    x = noise(1, 8, 9, 9, 9).requires_grad_()
    (grad,) = torch.autograd.grad(blocks(x)[0, :, 4, 4, 4].sum(), x)
    reached = torch.zeros(9, 9, 9, dtype=torch.bool)
    # Voxel 4 is in window 4..6 of the second block, and those are in 3..8 of the first.
    reached[3:, 3:, 3:] = True
    assert torch.equal(grad.abs().sum((0, 1)) > 0, reached)


def test_skips_are_added_where_figure_8_draws_them():
    net = randomise(SCUNet(SCUNetConfig(width=8, depths=(1, 2, 3, 1, 2, 1, 3), d_head=4)))
    assert [len(up) - 1 for up in net.decoder.up] == [2, 1, 3]  # blocks of up_3, up_2, up_1
    # Blocks that change nothing leave (6) and (7) linear.
    for block in net.modules():
        if isinstance(block, SwinConvBlock):
            torch.nn.init.zeros_(block.conv1_2.weight)
            torch.nn.init.zeros_(block.conv1_2.bias)
    w = net.state_dict()
    x = noise(1, 1, 24, 24, 24)

    def down(x, i):
        return F.conv3d(x, w[f"encoder.down.{i}.{i + 1}.weight"], stride=2)

    def up(x, i):
        return F.conv_transpose3d(x, w[f"decoder.up.{i}.0.weight"], stride=2)

    x_1 = F.conv3d(x, w["encoder.head.weight"], padding=1)
    x_2 = down(x_1, 0)
    x_3 = down(x_2, 1)
    features = down(x_3, 2)
    y = up(features + features, 0)  # x_4 = y where the body changes nothing
    y = up(y + x_3, 1)
    y = up(y + x_2, 2)
    expected = F.conv3d(y + x_1, w["decoder.tail.weight"], padding=1)
    with torch.no_grad():
        assert_near(net.encoder(x), features)
        assert_near(net(x), expected)


def test_a_map_of_any_size_is_padded_at_its_far_faces_with_its_last_voxels():
    net = randomise(SCUNet(SMALL)).eval()
    x = noise(1, 1, 12, 5, 13)
    far = ((0, 0), (0, 0), (0, 0), (0, 1), (0, 5))
    padded = torch.from_numpy(np.pad(x.numpy(), far, mode="edge"))
    with torch.no_grad():
        assert torch.equal(net(x), net(padded)[..., :12, :5, :13])
        features = net.encoder(x)
        assert torch.equal(features, net.encoder(padded))
    assert features.shape == (1, 16, 6, 3, 9)


def test_every_map_of_a_batch_is_treated_alone():
    net = randomise(SCUNet(SMALL)).eval()
    x = noise(3, 1, 12, 12, 12) * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1, 1, 1)
    with torch.no_grad():
        out = net(x)
        for i in range(3):
            assert_near(out[i : i + 1], net(x[i : i + 1]))


def test_every_parameter_reaches_the_output():
    net = randomise(SCUNet(SMALL))
    net(noise(2, 1, 12, 12, 12)).square().sum().backward()
    assert [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_filter_response_of_half_precision_maps_does_not_overflow():
    norm = randomise(FilterResponseNorm(4))
    x = noise(1, 4, 6, 6, 6).half()
    # (3) forgets the scale, and 1024^2 is more than float16 can hold.
    torch.testing.assert_close(norm(1024 * x), norm(x), rtol=0, atol=2e-3)


def test_autocast_keeps_the_softmax_in_float32():
    msa = WindowAttention(SMALL, 4, shifted=False)
    with torch.no_grad():
        msa.embedding_layer.weight[:8] = 0  # q = k = 0: R alone weighs the values
        R = msa.relative_position_params
        R.copy_(100 + noise(*R.shape) / 4)  # in steps of 0.5 if these were bfloat16
        x = noise(1, 3, 3, 3, 4)
        expected = msa(x)
        with torch.autocast("cpu", torch.bfloat16):
            out = msa(x)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.01)


def test_bfloat16_autocast_stays_near_float32():
    net = SCUNet(SMALL).eval()
    x = noise(1, 1, 12, 12, 12)
    with torch.no_grad():
        expected = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x)
    assert out.dtype == torch.float32
    assert (out - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SCUNetConfig(depths=(2, 2)), "odd number of stages"),
        (lambda: SCUNetConfig(width=24), "multiple of 2 d_head = 32"),
        (lambda: SCUNet(SMALL)(torch.zeros(1, 2, 6, 6, 6)), r"want \(B, 1, D, H, W\)"),
        (lambda: SCUNet(SMALL)(torch.zeros(6, 6, 6)), r"want \(B, 1, D, H, W\)"),
    ],
)
def test_wrong_sizes_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
