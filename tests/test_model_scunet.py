"""What model_scunet.py promises: Table 5's sizes, EMReady's numbers, windows as defined, one network however it is run."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model_scunet
from model_scunet import FilterResponseNorm, SCUNet, SCUNetConfig, SwinConvBlock, WindowAttention

ORACLES = Path(__file__).parent / "oracles"
SMALL = SCUNetConfig(width=8, depths=(1, 2, 1), d_head=4)


def fixture():
    path = ORACLES / "scunet3d_block.npz"
    if not path.exists():
        pytest.skip(f"needs {path}, which is not part of the project")
    return np.load(path)


def randomise(net, seed=0):
    """Random values for every parameter, also those that start at zero or one."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net


def noise(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_paper_preset_has_the_public_networks_parameters_stage_by_stage():
    expected = dict(m_head=864, m_down1=55_258, m_down2=219_060, m_down3=872_296, m_body=2_432_720,
                    m_up3=872_296, m_up2=219_060, m_up1=55_258, m_tail=864)
    net = SCUNet(model_scunet.PRESETS["paper"])
    stages = [net.encoder.head, *net.encoder.down, net.encoder.body, *net.decoder.up, net.decoder.tail]
    assert [count(stage) for stage in stages] == list(expected.values())
    assert count(net) == 4_727_676 == count(net.encoder) + count(net.decoder)
    assert count(SCUNet(SCUNetConfig(window_size=4))) == 4_737_268


def test_tiny_preset_fits_16_megabytes_in_float16():
    assert count(SCUNet(model_scunet.PRESETS["tiny"])) == 245_062 < 16e6 / 2


@pytest.mark.parametrize("kind", ["W", "SW"])
def test_block_and_its_attention_equal_the_public_code(kind):
    z = fixture()
    config = SCUNetConfig(width=int(z["channels_conv"] + z["channels_trans"]), d_head=int(z["head_dim"]))
    block = SwinConvBlock(config, config.width, shifted=kind == "SW")
    state = {k.removeprefix(f"{kind}_state/"): torch.from_numpy(z[k]).float() for k in z if k.startswith(f"{kind}_state/")}
    for i in (1, 3):                                     # eps is a parameter there, a constant here
        assert (state.pop(f"conv_block.{i}.eps") == np.float32(model_scunet.EPS)).all()
        for name in ("gamma", "beta", "tau"):            # (1, C, 1, 1, 1) there, (C,) here
            state[f"conv_block.{i}.{name}"] = state[f"conv_block.{i}.{name}"].flatten()
    block.load_state_dict(state, strict=True)
    for module, name in ((block, ""), (block.trans_block.msa, "attn_")):
        out = module(torch.from_numpy(z[f"{kind}_{name}input"]))
        torch.testing.assert_close(out, torch.from_numpy(z[f"{kind}_{name}output"]), rtol=0, atol=4e-6)


def test_mask_and_relative_positions_equal_the_public_code():
    z = fixture()
    blocked = np.unpackbits(z["SW_mask_true_means_blocked"])[:np.prod(z["SW_mask_shape"])].reshape(z["SW_mask_shape"])
    assert (model_scunet.apart((6, 6, 6), (1, 1, 1), 3, "cpu").numpy() == blocked).all()
    assert (model_scunet.relative_positions(3).permute(1, 2, 0).numpy() == z["relation_index"]).all()


@pytest.mark.parametrize("grid, w, shift", [((6, 3, 9), 3, (1, 0, 1)), ((3, 3, 3), 3, (0, 0, 0)), ((4, 8, 4), 4, (0, 2, 0)),
                                            ((8, 4, 2), 2, (1, 1, 0))])
def test_shifted_windows_are_attention_between_boundaries_moved_and_cut_at_the_faces(grid, w, shift):
    config = SCUNetConfig(width=16, d_head=4, window_size=w)
    msa = randomise(WindowAttention(config, 8, shifted=True)).double()
    x = noise(2, *grid, 8, dtype=torch.float64)
    r = torch.cartesian_prod(*[torch.arange(n) for n in grid])                 # every voxel sees every other ...
    window = torch.div(r - torch.tensor(shift), w, rounding_mode="floor")
    visible = (window[:, None] == window[None]).all(-1)                        # ... in its window
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
            torch.nn.init.zeros_(block.conv_block[i].weight)                   # attention alone carries what is seen
    x = noise(1, 8, 9, 9, 9).requires_grad_()
    grad, = torch.autograd.grad(blocks(x)[0, :, 4, 4, 4].sum(), x)
    reached = torch.zeros(9, 9, 9, dtype=torch.bool)
    reached[3:, 3:, 3:] = True                           # voxel 4 is in 4..6 of the second, these in 3..8 of the first
    assert torch.equal(grad.abs().sum((0, 1)) > 0, reached)


def test_skips_are_added_where_figure_8_draws_them():
    net = randomise(SCUNet(SCUNetConfig(width=8, depths=(1, 2, 3, 1, 2, 1, 3), d_head=4)))
    assert [len(up) - 1 for up in net.decoder.up] == [2, 1, 3]                 # blocks of up_3, up_2, up_1
    for block in net.modules():
        if isinstance(block, SwinConvBlock):             # blocks that change nothing leave (6) and (7) linear
            torch.nn.init.zeros_(block.conv1_2.weight)
            torch.nn.init.zeros_(block.conv1_2.bias)
    w, x = net.state_dict(), noise(1, 1, 24, 24, 24)
    down = lambda x, i: F.conv3d(x, w[f"encoder.down.{i}.{i + 1}.weight"], stride=2)
    up = lambda x, i: F.conv_transpose3d(x, w[f"decoder.up.{i}.0.weight"], stride=2)
    x_1 = F.conv3d(x, w["encoder.head.weight"], padding=1)
    x_2 = down(x_1, 0)
    x_3 = down(x_2, 1)
    x_4 = y = down(x_3, 2)
    expected = F.conv3d(up(up(up(y + x_4, 0) + x_3, 1) + x_2, 2) + x_1, w["decoder.tail.weight"], padding=1)
    with torch.no_grad():
        torch.testing.assert_close(net.encoder(x), y, rtol=0, atol=1e-5 * y.abs().max().item())
        torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_any_size_is_the_map_continued_at_its_far_faces_with_its_last_voxels():
    net = randomise(SCUNet(SMALL)).eval()
    x = noise(1, 1, 12, 5, 13)
    whole = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (0, 0), (0, 1), (0, 5)), mode="edge"))
    with torch.no_grad():
        assert torch.equal(net(x), net(whole)[..., :12, :5, :13])
        assert torch.equal(net.encoder(x), net.encoder(whole)) and net.encoder(x).shape == (1, 16, 6, 3, 9)


def test_every_map_of_a_batch_is_treated_alone():
    net = randomise(SCUNet(SMALL)).eval()
    x = noise(3, 1, 12, 12, 12) * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1, 1, 1)
    with torch.no_grad():
        out = net(x)
        for i in range(3):
            torch.testing.assert_close(out[i:i + 1], net(x[i:i + 1]), rtol=0, atol=1e-5 * out[i].abs().max().item())


def test_every_parameter_reaches_the_output():
    net = randomise(SCUNet(SMALL))
    net(noise(2, 1, 12, 12, 12)).square().sum().backward()
    assert [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_filter_response_of_half_precision_maps_does_not_overflow():
    norm = randomise(FilterResponseNorm(4))
    x = noise(1, 4, 6, 6, 6).half()
    torch.testing.assert_close(norm(1024 * x), norm(x), rtol=0, atol=2e-3)     # (3) forgets the scale; 1024^2 is no float16


def test_autocast_keeps_the_softmax_in_float32():
    msa = WindowAttention(SMALL, 4, shifted=False)
    with torch.no_grad():
        msa.embedding_layer.weight[:8] = 0               # q = k = 0: R alone weighs the values
        msa.relative_position_params.copy_(100 + noise(*msa.relative_position_params.shape) / 4)   # bfloat16 steps by 0.5
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


@pytest.mark.parametrize("make, message", [
    (lambda: SCUNetConfig(depths=(2, 2)), "odd number of stages"),
    (lambda: SCUNetConfig(width=24), "multiple of 2 d_head = 32"),
    (lambda: SCUNet(SMALL)(torch.zeros(1, 2, 6, 6, 6)), r"want \(B, 1, D, H, W\)"),
    (lambda: SCUNet(SMALL)(torch.zeros(6, 6, 6)), r"want \(B, 1, D, H, W\)")])
def test_wrong_sizes_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
