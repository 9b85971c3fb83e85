"""train_baselines.py: the ViT and the latent flow train, resume and keep what must not change."""

from dataclasses import fields, replace

import pytest
import torch
from small_runs import SCUNETS, SMALL, assert_same, atoms, maps, run, small_presets, stop_after

import checkpoint
import flow
import train
import train_objectives
import train_presets
import train_resume
from model_baselines import LatentFlowConfig, VAEConfig, ViTConfig, vae_loss
from train_baselines import BASELINES
from train_ranks import Ranks

SMALL_VIT = ViTConfig(width=8, depths=(1, 1), heads=2, d_head=4)
SMALL_VAE = VAEConfig(widths=(4, 8, 8), depths=(1, 1, 1), channels=2, groups=2)
SMALL_LFM = LatentFlowConfig(
    widths=(4, 8, 8), depths=(1, 1, 1), channels=2, groups=2, layers=3, width=24, heads=2
)
SMALLS = {
    "small-vit-jepa": replace(SCUNETS["small-jepa"], net=SMALL_VIT),
    "small-vit-sharpen": replace(SCUNETS["small-sharpen"], net=SMALL_VIT),
    "small-vae": replace(SMALL, net=SMALL_VAE, objective="vae", sample_every=0),
    "small-lfm": replace(SMALL, net=SMALL_LFM, objective="lfm", sample_every=0),
}


@pytest.fixture(autouse=True)
def baselines(small_presets, monkeypatch):
    for name, cfg in SMALLS.items():
        monkeypatch.setitem(train_presets.PRESETS, name, cfg)


@pytest.fixture(scope="module")
def vae(tmp_path_factory, maps):
    """The file of a VAE of two steps, which the flows here share."""
    folder = tmp_path_factory.mktemp("vae")
    cfg = replace(SMALLS["small-vae"], data=str(maps), out=str(folder), steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_presets.PRESETS, "small-vae", cfg)
        train.main(["--model", "small-vae"])
    return folder / "vae.pt"


@pytest.mark.parametrize("name", ["vit-jepa", "tiny-vit-jepa", "vit-sharpen", "tiny-vit-sharpen"])
def test_a_vit_has_the_hyperparameters_of_the_scunet(name):
    same = train.parse(["--model", name.replace("vit-", "")])
    assert replace(train.parse(["--model", name]), net=same.net) == same


def test_tables_and_steps_of_f4_are_those_of_the_paper():
    assert (BASELINES["vae-4"].steps, BASELINES["vae-8"].steps) == (588_480, 1_097_872)
    assert BASELINES["lfm-4"].steps == BASELINES["lfm-8"].steps == 300_000


@pytest.mark.parametrize("name", BASELINES)
def test_every_preset_builds_on_the_meta_device_and_its_crop_fits(name):
    cfg = BASELINES[name]
    with torch.device("meta"):
        net = train_objectives.build(cfg)
    assert sum(p.numel() for p in net.parameters()) > 1e5
    assert cfg.crop % cfg.net.multiple == 0
    train_objectives.split_batch(cfg, 1)


def test_a_vit_fine_tunes_from_its_own_pre_training_and_from_no_other(tmp_path, atoms, capsys):
    run(tmp_path / "a", model="small-vit-jepa", data=atoms)
    jepa = tmp_path / "a/jepa.pt"
    run(tmp_path / "b", model="small-vit-sharpen", data=atoms, init=jepa, steps=1)
    assert f"starting from the encoder of {jepa}" in capsys.readouterr().out
    priors = [checkpoint.load(file, kind="vit") for file in (jepa, tmp_path / "b/sharpen.pt")]
    before, after = (prior.net.encoder.patches.weight for prior in priors)
    assert 0 < (before - after).abs().max() < 0.05
    with pytest.raises(ValueError, match="holds a vit network, wanted is scunet"):
        run(tmp_path / "c", model="small-sharpen", data=atoms, init=jepa)


@pytest.mark.parametrize("model", ["small-vit-jepa", "small-vae", "small-lfm"])
def test_resuming_equals_never_stopping(tmp_path, atoms, maps, vae, monkeypatch, model):
    settings = {"data": atoms if "vit" in model else maps}
    if model == "small-lfm":
        settings["init"] = vae
    unbroken = run(tmp_path / "unbroken", model=model, **settings)
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        stopped = run(tmp_path / "parts", model=model, **settings)
    assert stopped["training"]["step"] == 2
    assert_same(run(tmp_path / "parts", "--resume", model=model, **settings), unbroken)


def test_a_latent_flow_carries_its_vae_unchanged(tmp_path, maps, vae):
    run(tmp_path, model="small-lfm", data=maps, init=vae)
    prior = checkpoint.load(tmp_path / "lfm.pt", kind="lfm")
    for name, value in checkpoint.load(vae).net.state_dict().items():
        assert torch.equal(prior.net.vae.state_dict()[name], value)
    assert prior.net.dit.out.weight.any()  # 0 before the first step


def test_the_loss_of_a_latent_flow_is_that_of_codes(vae, maps, tmp_path):
    cfg = replace(SMALLS["small-lfm"], init=str(vae), data=str(maps), out=str(tmp_path))
    state = train_resume.begin(cfg, None, Ranks())
    with torch.no_grad():
        state.net.dit.out.weight.normal_()
    x = torch.randn(3, 1, 16, 16, 16)
    codes = checkpoint.load(vae).net
    z = codes.encode(x)[0] / codes.code_std
    loss, bucket = train_objectives.losses(
        state.net, state.ema, x, cfg, torch.Generator().manual_seed(1)
    )
    generator = torch.Generator().manual_seed(1)
    t = flow.sample_t(3, generator=generator)
    expected = flow.loss(state.net.dit, z, t=t, generator=generator, per_sample=True)
    torch.testing.assert_close(loss, expected)
    assert bucket.tolist() == (5 * t).long().tolist()


def test_the_held_out_loss_of_a_vae_is_a_mean_over_crops(vae):
    cfg = SMALLS["small-vae"]
    net = checkpoint.load(vae).net
    x = torch.randn(5, 1, 16, 16, 16)  # parts of 4 and of 1
    total, l1 = train_objectives.held_out_losses(None, net, x, cfg)
    generator = torch.Generator().manual_seed(0)
    e = torch.cat([torch.randn(n, 2, 4, 4, 4, generator=generator) for n in (4, 1)])
    want = [float(values.mean()) for values in vae_loss(net, x, e, cfg.beta)]
    assert [total, l1] == pytest.approx(want, rel=1e-5)


def test_a_latent_flow_without_a_fitting_vae_is_refused(tmp_path, maps, vae, monkeypatch):
    with pytest.raises(ValueError, match="give its file: --init runs/vae/vae.pt"):
        run(tmp_path / "a", model="small-lfm", data=maps)
    wider = replace(SMALL_LFM, channels=4)
    cfg = replace(SMALLS["small-lfm"], net=wider)
    monkeypatch.setitem(train_presets.PRESETS, "small-lfm", cfg)
    with pytest.raises(ValueError, match="vae.pt: another VAE"):
        run(tmp_path / "b", model="small-lfm", data=maps, init=vae)


def test_a_vae_uses_its_own_flags_and_no_others():
    assert train.parse(["--model", "vae-4", "--beta", "0.1"]).beta == 0.1
    for flags in ("--beta 1", "--alpha 1"):
        with pytest.raises(ValueError, match="does not use it"):
            train.parse(["--model", "lfm-4", *flags.split()])
    assert {f.name for f in fields(SMALL_VAE)} < {f.name for f in fields(SMALL_LFM)}
