"""Small training runs, which the tests of train.py share: presets, data, how to run and compare."""

import csv
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train_objectives import write_maps

import checkpoint
import train
import train_config
import train_presets
import train_ranks
from jepa import JEPAConfig
from model_hdit import HDiTConfig
from model_scunet import SCUNetConfig

TINY = HDiTConfig(depths=(1, 1), widths=(24, 48), d_head=12, kernel_size=3, mapping_width=16)

# In float32, because the tests compute steps a second time, and bfloat16 has three digits.
SMALL = train_config.TrainConfig(
    net=TINY,
    steps=4,
    batch=4,
    micro_batch=4,
    crop=16,
    crops_per_map=2,
    mean=0.05,
    std=0.13,
    lr=1e-2,
    warmup=2,
    decay=0.5,
    bf16=False,
    workers=0,
    log_every=1,
    eval_every=2,
    held_out_crops=4,
    save_every=100,
)

# CryoLVM's: crops of 12^3 voxels are 6^3 tokens, as many as in the paper.
SCUNET = replace(
    SMALL,
    net=SCUNetConfig(width=8, depths=(1, 1, 1), d_head=4),
    predictor=JEPAConfig(width=24, depth=1, heads=2),
    crop=12,
    voxel_size=1.0,
    mean=0.0,
    std=1.0,
    optimizer="adamw",
    warmup=0,
    decay=0.0,
    weight_decay=0.1,
    sample_every=0,
)
SCUNETS = {
    "small-jepa": replace(SCUNET, objective="jepa"),
    "small-mae": replace(SCUNET, objective="mae"),
    "small-sharpen": replace(SCUNET, objective="sharpen", patience=1, eval_every=1),
}
PRESETS = {"small": SMALL, **SCUNETS}


@pytest.fixture(autouse=True)
def small_presets(monkeypatch):
    """`--model small` and so on; afterwards the signal handlers are what they were."""
    for name, cfg in PRESETS.items():
        monkeypatch.setitem(train_presets.PRESETS, name, cfg)
    before = {name: signal.getsignal(name) for name in train_ranks.STOP_SIGNALS}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    return write_maps(tmp_path_factory.mktemp("maps"))


@pytest.fixture
def atoms(tmp_path):
    """Three structures of 200 carbon atoms in a ball."""
    xyz = torch.randn(600, 3, generator=torch.Generator().manual_seed(0)) * 5
    np.savez(
        tmp_path / "atoms.npz",
        label=["a", "b", "c"],
        atom_start=[0, 200, 400, 600],
        xyz=(100 * xyz).short().numpy(),
        element=np.full(600, 6, "u1"),
        bfactor=np.full(600, 20, "u1"),
    )
    return tmp_path / "atoms.npz"


def run(out, *flags, model="small", **settings):
    """Run train.py; returns the checkpoint it wrote, all but the flags."""
    typed = [f"{train_config.flag(name)}={value}" for name, value in settings.items()]
    train.main(["--model", model, "--out", str(out), *flags, *typed])
    content = checkpoint.read(Path(out) / "checkpoint.pt")
    content["training"].pop("flags")
    return content


def leaves(tree):
    if isinstance(tree, dict):
        tree = [tree[key] for key in sorted(tree, key=str)]
    if not isinstance(tree, (list, tuple)):
        return [tree]
    return [leaf for part in tree for leaf in leaves(part)]


def assert_same(a, b):
    """Bit by bit, in every tensor and number of two checkpoints."""
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    assert sum(torch.is_tensor(x) for x, _ in pairs) > 100
    for x, y in pairs:
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y


def log_rows(out):
    with open(Path(out) / "log.csv", newline="") as file:
        return list(csv.reader(file))


def stop_after(step, monkeypatch, signum=signal.SIGTERM):
    """Send a signal at the end of the step before: it is seen in this one, the last."""
    update_average = train.update_average

    def update_and_kill(ema, net, n, cfg):
        if n == step - 1:
            os.kill(os.getpid(), signum)
        update_average(ema, net, n, cfg)

    monkeypatch.setattr(train, "update_average", update_and_kill)
