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

    # No shape shows the kernel, so it is the release's.
    assert prior.net.config == replace(config, kernel_size=7, time_phase="bfloat16")
    assert (prior.box, prior.voxel_size) == (box, voxel_size)
    for key, value in net.state_dict().items():
        assert torch.equal(prior.net.state_dict()[key], value), key


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
    ],
)
def test_a_wrong_setting_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        replace(TINY, **{name: value})
