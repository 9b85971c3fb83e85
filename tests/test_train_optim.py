"""train_optim.py: optimisers, learning rates and averages are those of the authors' release."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import flow
import jepa
import train_optim
import train_presets
from model_hdit import HDiT, HDiTConfig

ORACLES = Path(__file__).parent / "oracles"
TINY = HDiTConfig(depths=(1, 1), widths=(24, 48), d_head=12, kernel_size=3, mapping_width=16)
f64 = torch.float64


@pytest.fixture
def release():
    """Numbers that the optimiser of the authors' release computed."""
    arrays = np.load(ORACLES / "parity/fairseq_adam.npz")
    return {key: torch.from_numpy(np.asarray(value)) for key, value in arrays.items()}


# Ten steps in float32, each of which rounds twice by up to 6e-8.
@pytest.mark.parametrize("dtype, atol", [(f64, 1e-15), (torch.float32, 1.2e-6)])
def test_fairseq_adam_is_that_of_the_release(release, dtype, atol):
    target = release["target"].to(dtype)
    curvature = release["curvature"].to(dtype)
    p = torch.nn.Parameter(release["p0"].to(dtype).clone())
    optimizer = train_optim.FairseqAdam([p], 1e-4, (0.9, 0.98), weight_decay=0.01)
    want = release[f"fairseq_adam_{str(dtype).removeprefix('torch.')}"]
    for n in range(1, 11):
        p.grad = curvature * (p.detach() - target)
        optimizer.step()
        torch.testing.assert_close(p.detach(), want[n].to(dtype), rtol=0, atol=atol)
    # AdamW would have gone elsewhere.
    assert (want[10] - release["torch_adamw_float64"][10]).abs().max() > 1e-4


def test_a_fused_step_is_that_of_the_release(release, monkeypatch):
    # The kernel of a GPU exists on a CPU too, where it is not used.
    monkeypatch.setattr(train_optim, "has_fused", lambda params: True)
    monkeypatch.delattr(torch, "_foreach_addcdiv_")
    target, curvature = release["target"].to(f64), release["curvature"].to(f64)
    p = torch.nn.Parameter(release["p0"].to(f64).clone())
    optimizer = train_optim.FairseqAdam([p], 1e-4, (0.9, 0.98), weight_decay=0.01)
    for n in range(1, 11):
        p.grad = curvature * (p.detach() - target)
        optimizer.step()
        want = release["fairseq_adam_float64"][n]
        # The step's number is a float32, and so are the bias corrections: 6e-8 of a step of 1e-4.
        torch.testing.assert_close(p.detach(), want, rtol=0, atol=1e-10)


# PyTorch's Muon always multiplies in bfloat16, which has three digits.
@pytest.mark.parametrize("bf16, rtol", [(True, 1e-6), (False, 3e-2)])
def test_muon_is_pytorchs(monkeypatch, bf16, rtol):
    monkeypatch.setattr(flow, "has_bf16", lambda device: bf16)
    torch.manual_seed(0)
    for shape in ((24, 16), (16, 40)):
        ours = torch.nn.Parameter(torch.ones(shape))
        theirs = torch.nn.Parameter(torch.ones(shape))
        muon = train_optim.Muon([ours], 0.02, 0.1)
        pytorchs = torch.optim.Muon([theirs], 0.02, 0.1, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            ours.grad = theirs.grad = torch.randn(shape)
            muon.step()
            pytorchs.step()
        assert (ours - theirs).norm() <= rtol * (theirs - 1).norm()


def test_muon_takes_the_inner_matrices_and_fairseq_adam_all_else():
    net = HDiT(TINY)
    cfg = replace(train_presets.PRESETS["tiny"], optimizer="muon")
    name_of = {id(p): name for name, p in net.named_parameters()}
    adam, muon = (
        {name_of[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in train_optim.optimizers(net, cfg)
    )
    assert adam | muon == set(name_of.values()) and not adam & muon
    outer = {name.split(".", 2)[-1] for name in muon if "level" in name and "mid" not in name}
    assert outer == {
        "0.self_attn.qkv_proj.weight",
        "0.self_attn.out_proj.weight",
        "0.ff.up_proj.weight",
        "0.ff.down_proj.weight",
    }
    # Those that merge and split tokens as well.
    assert {"merges.0.proj.weight", "splits.0.proj.weight"} < muon
    assert {"patch_in.proj.weight", "patch_out.proj.weight", "time_in_proj.weight"} < adam
    assert "out_norm.scale" in adam
    assert len(train_optim.optimizers(net, train_presets.PRESETS["s"])) == 1


def test_warm_up_is_that_of_the_release(release):
    cfg = train_presets.PRESETS["s"]
    for step, lr in zip(release["warmup_step"].tolist(), release["warmup_lr"].tolist()):
        assert train_optim.lr_at(step, cfg) == pytest.approx(lr, rel=1e-12)


def test_learning_rate_falls_linearly_to_zero_over_the_last_part():
    cfg = replace(train_presets.PRESETS["s"], steps=1000, warmup=100, decay=0.4, lr=1.0)
    rates = {n: train_optim.lr_at(n, cfg) for n in (0, 50, 100, 599, 600, 700, 800, 999)}
    want = {0: 0.01, 50: 0.505, 100: 1, 599: 1, 600: 1, 700: 0.75, 800: 0.5, 999: 0.0025}
    assert rates == pytest.approx(want)


@pytest.mark.parametrize("steps", [10, 20, 21])
def test_pre_training_reaches_its_peak_even_if_the_run_is_no_longer_than_the_warm_up(steps):
    cfg = replace(train_presets.PRESETS["tiny-jepa"], steps=steps)  # 20 steps of warm-up
    rates = [train_optim.lr_at(n, cfg) for n in range(steps)]
    rising = [cfg.lr / 5 + (cfg.lr - cfg.lr / 5) * (n + 1) / 20 for n in range(min(steps, 20))]
    assert rates[:20] == pytest.approx(rising)
    assert rates[20:] == pytest.approx([1e-6] * (steps - 20))


def test_a_low_peak_of_pre_training_is_never_exceeded():
    # I-JEPA's cosine ends at 1e-6, which is above this peak.
    cfg = replace(train_presets.PRESETS["tiny-jepa"], lr=1e-7)
    rates = [train_optim.lr_at(n, cfg) for n in range(cfg.steps)]
    assert max(rates) == pytest.approx(1e-7)


def test_rates_reach_all_groups_but_a_group_without_decay_stays_without():
    cfg = replace(train_presets.PRESETS["tiny-jepa"], weight_decay=0.1)
    net = torch.nn.Linear(2, 2)
    opts = train_optim.optimizers(net, cfg)
    lr = train_optim.set_rates(opts, 3, cfg)
    weight, bias = opts[0].param_groups
    assert weight["lr"] == bias["lr"] == lr == train_optim.lr_at(3, cfg)
    decay = jepa.weight_decay_at(3, cfg.steps, 0.1)
    assert (weight["weight_decay"], bias["weight_decay"]) == (decay, 0)


def test_averaged_weights_are_those_of_the_release(release):
    ema = torch.nn.Linear(4, 1, bias=False, dtype=f64).requires_grad_(False)
    net = torch.nn.Linear(4, 1, bias=False, dtype=f64).requires_grad_(False)
    for module in (ema, net):
        module.register_buffer("freqs", torch.zeros(1))
    inputs = release["ema_inputs"]
    ema.weight.copy_(inputs[0])
    for n in range(1, len(inputs)):
        net.weight.copy_(inputs[n])
        net.freqs.fill_(n)
        train_optim.update_ema(ema, net, n, 0.99)
        want = release["ema_shadow"][n - 1]
        torch.testing.assert_close(ema.weight[0], want, rtol=0, atol=1e-13)
        assert ema.freqs == n  # buffers are copied
