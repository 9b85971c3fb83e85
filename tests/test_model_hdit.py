"""What model_hdit.py promises: the sizes of the paper, the numbers of the release."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import model_hdit
from model_hdit import HDiT, HDiTConfig

ORACLES = Path(__file__).parent / "oracles"
TINY = HDiTConfig(depths=(1, 1), widths=(24, 48), d_head=12, kernel_size=3, mapping_width=16)


def make_net(config=TINY, seed=0, **flags):
    """A network whose every parameter is random, also those that start at zero."""
    torch.manual_seed(seed)
    net = HDiT(config, **flags)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net


def inputs(shape=(2, 1, 16, 16, 16), seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng), torch.rand(shape[0], generator=rng)


# Tables 4 and 7; the exact numbers are those of the release.
@pytest.mark.parametrize(
    "name, count",
    [
        ("s", 335_184_929),
        ("l", 308_535_918),
        ("p2-d1", 335_098_913),
        ("p8-d1", 335_873_057),
        ("p4-d0", 377_751_328),
        ("p4-d2", 316_064_394),
        ("tiny", 5_652_633),
    ],
)
def test_presets_have_the_papers_number_of_parameters(name, count):
    with torch.device("meta"):
        net = HDiT(model_hdit.PRESETS[name])
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize("name", ["hdit_two_level", "hdit_three_level"])
def test_output_and_gradient_are_those_of_the_release(name):
    fixture = torch.load(ORACLES / f"parity/{name}.pt", weights_only=True)
    config = HDiTConfig(**fixture["config"])
    config = replace(config, depths=tuple(config.depths), widths=tuple(config.widths))
    net = HDiT(config)
    net.load_state_dict(fixture["state_dict"], strict=True)
    x = fixture["x"].clone().requires_grad_()
    t = fixture["timesteps"] / 1000

    cond = net.time_in_proj(net.time_features(t))
    torch.testing.assert_close(cond, fixture["cond"], rtol=0, atol=1e-5)
    out = net(x, t)
    torch.testing.assert_close(out, fixture["output"], rtol=0, atol=1e-4)
    (grad,) = torch.autograd.grad((out * fixture["x"]).sum(), x)
    torch.testing.assert_close(grad, fixture["grad_x"], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "phase, key",
    [
        ("float32", "float32"),
        ("float16", "float16_autocast"),
        ("bfloat16", "bfloat16_autocast"),
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_time_features_are_those_of_the_release_in_each_precision(phase, key, autocast):
    fixture = np.load(ORACLES / "parity/time_features.npz")
    net = HDiT(HDiTConfig(depths=(1,), widths=(24,), d_head=12, time_phase=phase))
    net.time_emb.weight.copy_(torch.from_numpy(fixture["weight"]))
    # Ours do not depend on autocast, only on the phase asked for.
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        features = net.time_features(torch.from_numpy(fixture["t"]) / 1000)
    np.testing.assert_allclose(features, fixture[f"features_{key}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "config, box, voxel_size",
    [
        (TINY, 64, 1.5),
        (HDiTConfig(2, (1, 2, 1), (24, 48, 96), d_head=24, ff_mult=2), 128, 3.0),
        (HDiTConfig(depths=(2,), widths=(48,), d_head=12), 64, 1.5),
    ],
)
def test_public_weights_load_by_path_with_their_config_inferred(config, box, voxel_size, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    net = make_net(config)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    prior = checkpoint.load(tmp_path / "model.safetensors", kind="hdit", time_phase="bfloat16")

    # No shape shows the kernel or the times, so they are the release's.
    assert prior.net.config == replace(
        config,
        kernel_size=7,
        time_phase="bfloat16",
        rotary_phase="bfloat16",
        whole_thousandths=True,
    )
    assert (prior.box, prior.voxel_size) == (box, voxel_size)
    for key, value in net.state_dict().items():
        assert torch.equal(prior.net.state_dict()[key], value), key


# cryofm-s and cryofm-l as they are published: (a level's prefix, its width, its layers).
@pytest.mark.parametrize(
    "name, tensors, levels",
    [
        ("s", 136, [("down_levels.0", 768, 4), ("up_levels.0", 768, 4), ("mid_level", 1536, 8)]),
        (
            "l",
            171,
            [
                ("down_levels.0", 320, 2),
                ("up_levels.0", 320, 2),
                ("down_levels.1", 640, 2),
                ("up_levels.1", 640, 2),
                ("mid_level", 1280, 12),
            ],
        ),
    ],
)
def test_the_names_and_shapes_of_the_published_weights_are_ours(name, tensors, levels):
    widths = model_hdit.PRESETS[name].widths
    published = {
        "patch_in.proj.weight": (widths[0], 64),
        "time_emb.weight": (128, 1),
        "time_in_proj.weight": (256, 256),
        "out_norm.scale": (widths[0],),
        "patch_out.proj.weight": (64, widths[0]),
    }
    for i, (narrow, wide) in enumerate(zip(widths, widths[1:])):
        published[f"merges.{i}.proj.weight"] = (wide, 8 * narrow)
        published[f"splits.{i}.proj.weight"] = (8 * narrow, wide)
        published[f"splits.{i}.fac"] = (1,)
    for prefix, W, depth in levels:
        for j in range(depth):
            layer = {
                "self_attn.scale": (W // 64,),
                "self_attn.norm.linear.weight": (W, 256),
                "self_attn.qkv_proj.weight": (3 * W, W),
                "self_attn.pos_emb.freqs": (W // 64, 5),
                "self_attn.out_proj.weight": (W, W),
                "ff.norm.linear.weight": (W, 256),
                "ff.up_proj.weight": (6 * W, W),
                "ff.down_proj.weight": (W, 3 * W),
            }
            published |= {f"{prefix}.{j}.{key}": shape for key, shape in layer.items()}
    assert len(published) == tensors
    with torch.device("meta"):
        ours = HDiT(model_hdit.PRESETS[name]).state_dict()
    assert {key: tuple(value.shape) for key, value in ours.items()} == published


def release_like(folder, config=""):
    """A model.safetensors with the frequencies of the time features' oracle, and a config.yaml."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    fixture = np.load(ORACLES / "parity/time_features.npz")
    net = make_net(replace(TINY, mapping_width=256))
    net.time_emb.weight.copy_(torch.from_numpy(fixture["weight"]))
    save_file(net.state_dict(), folder / "model.safetensors")
    if config:
        (folder / "config.yaml").write_text(config)
    return folder / "model.safetensors"


S_CONFIG = "hdit_model:\n  type: image_transformer_v2\npl_trainer:\n  precision: 16-mixed\n"
L_CONFIG = "pl_trainer:\n  precision: bf16\n  max_steps: 300000\n"


# cryofm_facts.md: cosine similarity to the exact time features at t = 0.2, 0.5, 1.
@pytest.mark.parametrize(
    "config, asked, similarity, words",
    [
        (S_CONFIG, None, [0.90, 0.61, 0.37], "float16 (config.yaml: precision 16-mixed)"),
        (L_CONFIG, None, [0.26, 0.08, 0.02], "bfloat16 (config.yaml: precision bf16)"),
        (S_CONFIG, "bfloat16", [0.26, 0.08, 0.02], "bfloat16 (as asked)"),
        (S_CONFIG, "float32", [1, 1, 1], "float32 (as asked)"),
        ("", None, [1, 1, 1], "no config.yaml beside it; --time-phase takes another"),
    ],
)
def test_public_weights_get_the_time_phases_of_their_training(
    config, asked, similarity, words, tmp_path
):
    path = release_like(tmp_path, config)
    said = []
    net = checkpoint.load(path, time_phase=asked, say=said.append).net
    t = torch.tensor([0.2, 0.5, 1.0])
    exact = HDiT(replace(net.config, time_phase="float32"))
    exact.load_state_dict(net.state_dict())
    found = torch.cosine_similarity(net.time_features(t), exact.time_features(t))
    np.testing.assert_allclose(found, similarity, rtol=0, atol=0.006)
    (line,) = said
    assert words in line and "whole thousandths" in line


def test_exact_time_phases_leave_the_rotary_angles_in_the_precision_of_training(tmp_path):
    config = S_CONFIG + "  use_fp32_time_emb: true\n"
    net = checkpoint.load(release_like(tmp_path, config), say=lambda line: None).net
    assert (net.config.time_phase, net.config.rotary_phase) == ("float32", "float16")


@pytest.mark.parametrize("config", ["seed: 42\n", "precision: 8\n", S_CONFIG + L_CONFIG])
def test_a_config_without_one_known_precision_is_refused_until_asked(config, tmp_path):
    path = release_like(tmp_path, config)
    with pytest.raises(ValueError, match="config.yaml: says no precision .* give --time-phase"):
        checkpoint.load(path)
    checkpoint.load(path, time_phase="float16", say=lambda line: None)


def test_a_time_phase_for_a_checkpoint_of_ours_is_refused(tmp_path):
    meta = dict(voxel_size=1.5, box=16, mean=0.05, std=0.13)
    checkpoint.save(tmp_path / "a.pt", make_net(), **meta)
    with pytest.raises(ValueError, match="drop --time-phase"):
        checkpoint.load(tmp_path / "a.pt", time_phase="float16")


@pytest.mark.parametrize("dtype, spacing", [("float16", 2**-6), ("bfloat16", 2**-3)])
def test_rotary_angles_of_the_innermost_level_alone_are_rounded(dtype, spacing):
    # Angles reach 10 pi = 31, and so far out neighbouring numbers of the dtype lie `spacing` apart.
    # The position, the frequency and their product are rounded, to half a spacing each.
    config = replace(model_hdit.PRESETS["s"], rotary_phase=dtype)
    with torch.device("meta"):
        outer = model_hdit.SelfAttention(config, 768, 7)
    assert outer.phase == torch.float32
    inner = model_hdit.SelfAttention(replace(config, widths=(64,), depths=(1,)), 64, None)
    pos = model_hdit.positions((8, 8, 8), torch.device("cpu"))
    cos, sin = inner.pos_emb(pos)
    rounded_cos, rounded_sin = inner.pos_emb(pos.to(inner.phase))
    turned = torch.atan2(
        rounded_sin * cos - rounded_cos * sin, rounded_cos * cos + rounded_sin * sin
    )
    assert spacing / 8 < turned.abs().max() < 1.5 * spacing


def test_a_network_of_whole_thousandths_is_asked_at_the_nearest_one():
    net = make_net(replace(TINY, whole_thousandths=True))
    x, _ = inputs()
    between = net(x, torch.tensor([0.2996, 0.3004]))
    assert torch.equal(between, net(x, torch.tensor([0.3, 0.3])))
    # Between two thousandths the phases turn by w full circles, which is far for a network.
    other = make_net()
    other.load_state_dict(net.state_dict())
    assert not torch.allclose(other(x, torch.tensor([0.2996, 0.3004])), between, atol=1e-3)


def test_files_that_are_not_the_weights_of_an_hdit_are_refused(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0junk")
    for name in ("other", "junk"):
        with pytest.raises(ValueError, match=f"{name}.safetensors: not the weights of an HDiT"):
            checkpoint.load(tmp_path / f"{name}.safetensors")


def test_public_weights_without_safetensors_say_what_to_install(tmp_path):
    if importlib.util.find_spec("safetensors") is not None:
        pytest.skip("safetensors is installed")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="pip install safetensors"):
        checkpoint.load(tmp_path / "model.safetensors")


def test_the_compiled_network_is_the_eager_one():
    # This traces forward and backward but generates no C++, which takes 25 s (it was within 3e-6).
    net = make_net()
    x, t = inputs()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    expected = net(x, t)
    found = compiled(x, t)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    parameters = list(net.parameters())
    expected = torch.autograd.grad(expected.square().sum(), parameters)
    found = torch.autograd.grad(found.square().sum(), parameters)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_saves_memory_and_changes_no_gradient():
    x, t = inputs()
    plain = make_net()
    saving = make_net(activation_checkpointing=True)
    totals = []
    for net in (plain, saving):
        # Count the numbers that autograd keeps for the backward pass.
        counts = []

        def count(tensor, counts=counts):
            counts.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = net(x, t).square().mean()
        loss.backward()
        totals.append(sum(counts))
    assert totals[1] < totals[0] / 2
    for a, b in zip(plain.parameters(), saving.parameters()):
        assert torch.equal(a.grad, b.grad)


def test_an_untrained_network_predicts_exactly_zero():
    assert torch.equal(HDiT(TINY)(*inputs()), torch.zeros(2, 1, 16, 16, 16))


def test_a_map_in_a_batch_gets_the_velocity_it_gets_alone():
    net = make_net()
    x, t = inputs((2, 1, 8, 16, 8))
    together = net(x, t)
    for i in range(2):
        alone = net(x[i : i + 1], t[i : i + 1])[0]
        torch.testing.assert_close(alone, together[i], rtol=1e-4, atol=1e-5)
        one_time_for_all = net(x, t[i])[i]
        torch.testing.assert_close(one_time_for_all, together[i], rtol=1e-4, atol=1e-5)


def test_a_box_that_does_not_divide_into_tokens_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 1, 16, 16, 12\).*multiples of 8"):
        HDiT(TINY)(torch.zeros(1, 1, 16, 16, 12), torch.zeros(1))


@pytest.mark.parametrize(
    "name, value",
    [
        ("depths", (1,)),
        ("widths", (24, 50)),
        ("d_head", 8),
        ("mapping_width", 15),
        ("time_phase", "float8"),
        ("rotary_phase", "float8"),
    ],
)
def test_a_wrong_setting_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        replace(TINY, **{name: value})
