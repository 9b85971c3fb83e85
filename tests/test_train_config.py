"""train_config.py: presets carry the papers' numbers; flags are checked and never ignored."""

from dataclasses import replace

import pytest

import train
import train_objectives
import train_presets


def assert_fields(cfg, **wanted):
    assert {name: getattr(cfg, name) for name in wanted} == wanted


def test_cryofms_numbers_are_those_of_table_4_and_appendix_b1():
    s, l = train_presets.PRESETS["s"], train_presets.PRESETS["l"]
    for cfg in (s, l):
        assert_fields(cfg, batch=128, lr=1e-4, beta2=0.98, weight_decay=0.01, warmup=2000, clip=1.0)
        assert_fields(cfg, mean=0.04, std=0.09, bf16=True)
        assert_fields(cfg, optimizer="adam", decay=0.0, ema_decay=0.99)
    assert_fields(s, steps=150_000, crop=64, voxel_size=1.5, crops_per_map=2)
    assert_fields(s, center_crops=False, time_law="uniform")
    assert_fields(l, steps=300_000, crop=128, voxel_size=3.0, crops_per_map=1)
    assert_fields(l, center_crops=True, time_law="logit-normal")
    assert_fields(s.net, depths=(4, 8), widths=(768, 1536), patch_size=4)
    assert_fields(l.net, depths=(2, 2, 12), widths=(320, 640, 1280), patch_size=4)


def test_cryolvms_numbers_are_those_of_table_4():
    cfg = train_presets.PRESETS["sharpen"]
    assert_fields(cfg, optimizer="adamw", lr=3e-5, weight_decay=1e-3, patience=5, batch=32)
    assert_fields(cfg, crop=48, voxel_size=1.0, mean=0.0, std=1.0)
    parameters = sum(p.numel() for p in train_objectives.build(cfg).parameters())
    assert parameters == 4_727_676
    assert train_objectives.token_grid(cfg) == (6, 6, 6)  # 216 tokens


def test_flags_override_the_preset():
    flags = ["--model", "s", "--steps", "7", "--no-bf16", "--data", "maps", "--std", "0.2"]
    want = replace(train_presets.PRESETS["s"], steps=7, bf16=False, data="maps", std=0.2)
    cfg = train.parse(flags)
    assert cfg.typed == ("data", "steps", "std", "bf16")
    assert replace(cfg, typed=()) == want


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--steps 0", r"--steps 0: it must lie in \[1, inf\)"),
        ("--crops-per-map -1", r"--crops-per-map -1: it must lie in \[1, inf\)"),
        ("--lr nan", r"--lr nan: it must lie in \(0, inf\)"),
        ("--lr inf", "--lr inf"),
        ("--lr=-1e-3", "--lr -0.001"),
        ("--mean nan", "--mean nan"),
        ("--std 0", "--std 0"),
        ("--voxel-size inf", "--voxel-size inf"),
        ("--resolution-max nan", "--resolution-max nan"),
        ("--weight-decay -1", "--weight-decay -1"),
        ("--clip nan", "--clip nan"),
        ("--beta2 1", r"--beta2 1.0: it must lie in \[0, 1\)"),
        ("--ema-decay 1.5", "--ema-decay 1.5"),
        ("--decay 2", r"--decay 2.0: it must lie in \[0, 1\]"),
        ("--workers -1", "--workers -1"),
        ("--workers 99999999", r"--workers 99999999: it must lie in \[0, 512\]"),
        ("--seed -1", "--seed -1"),
        ("--crop 36", "multiple of 8"),
        ("--resolution-min 5", "--resolution-min 5 must be at most --resolution-max 4"),
        ("--optimizer sgd", "--optimizer sgd: choose adam or muon or adamw"),
        ("--time-law cosine", "uniform or logit-normal"),
        ("--model jepa --held-out-crops 1", "give at least 2"),
        ("--model jepa --momentum nan", "--momentum nan"),
    ],
)
def test_a_flag_out_of_range_is_refused(flags, says):
    with pytest.raises(ValueError, match=says):
        train.parse(flags.split())


def test_a_gradient_need_not_be_clipped():
    assert train.parse(["--clip", "inf"]).clip == float("inf")


@pytest.mark.parametrize(
    "model, flags",
    [
        ("s", "--alpha 0.5"),
        ("s", "--patience 3"),
        ("jepa", "--decay 0.5"),
        ("jepa", "--patience 3"),
        ("jepa", "--ema-decay 0.9"),
        ("mae", "--momentum 0.9"),
        ("sharpen", "--missing cone"),
        ("sharpen", "--std 0.2"),
        ("sharpen", "--no-cubic"),
        ("wedge3d", "--sample-every 100"),
    ],
)
def test_a_flag_that_the_model_does_not_use_is_refused(model, flags):
    name = flags.split()[0].replace("--no-", "--")
    with pytest.raises(ValueError, match=f"{name}: --model {model} does not use it, only "):
        train.parse(["--model", model, *flags.split()])


@pytest.mark.parametrize("flags", ["--warmup 10", "--decay 0.5", "--optimizer muon"])
def test_what_the_plateau_scheduler_would_overrule_is_refused(flags):
    with pytest.raises(
        ValueError, match="--patience 5: the held-out loss lowers the learning rate"
    ):
        train.parse(["--model", "sharpen", *flags.split()])
    train.parse(["--model", "sharpen", "--patience", "0", *flags.split()])
