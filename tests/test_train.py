"""What train.py promises: the paper's optimiser and numbers, and that no interruption or sharing out changes a run."""

import csv
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import data
import data_chains
import flow
import jepa
import mrc
import train
import train_config
import train_dry_run
import train_objectives
import train_optim
from jepa import JEPAConfig
from model_hdit import HDiT, HDiTConfig
from model_scunet import SCUNet, SCUNetConfig

ROOT = Path(__file__).parent.parent
ORACLES = Path(__file__).parent / "oracles"
f64 = torch.float64


def oracle(name):
    return {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(ORACLES / name).items()}


# ---- Optimiser -------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, atol", [(f64, 1e-15), (torch.float32, 1.2e-6)])   # ten steps, each rounds twice by up to 6e-8
def test_fairseq_adam_is_that_of_the_release(dtype, atol):
    fixture = oracle("parity/fairseq_adam.npz")
    p0, target, curvature = (fixture[key].to(dtype) for key in ("p0", "target", "curvature"))
    p = torch.nn.Parameter(p0.clone())
    optimizer = train_optim.FairseqAdam([p], 1e-4, (0.9, 0.98), weight_decay=0.01)
    want = fixture[f"fairseq_adam_{str(dtype).removeprefix('torch.')}"]
    for n in range(1, 11):
        p.grad = curvature * (p.detach() - target)
        optimizer.step()
        torch.testing.assert_close(p.detach(), want[n].to(dtype), rtol=0, atol=atol)
    assert (want[10] - fixture["torch_adamw_float64"][10]).abs().max() > 1e-4           # where AdamW differs


@pytest.mark.parametrize("bf16, rtol", [(True, 1e-6), (False, 3e-2)])           # in float32: but for bfloat16's three digits
def test_muon_is_pytorchs(monkeypatch, bf16, rtol):
    monkeypatch.setattr(train.flow, "has_bf16", lambda device: bf16)
    torch.manual_seed(0)
    for shape in ((24, 16), (16, 40)):
        ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
        optimizers = train_optim.Muon([ours], 0.02, 0.1), torch.optim.Muon([theirs], 0.02, 0.1, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            ours.grad = theirs.grad = torch.randn(shape)
            for optimizer in optimizers:
                optimizer.step()
        assert (ours - theirs).norm() <= rtol * (theirs - 1).norm()


def test_warm_up_is_that_of_the_release():
    fixture = oracle("parity/fairseq_adam.npz")
    for step, lr in zip(fixture["warmup_step"].tolist(), fixture["warmup_lr"].tolist()):
        assert train_optim.lr_at(step, train_config.PRESETS["s"]) == pytest.approx(lr, rel=1e-12)


def test_learning_rate_falls_linearly_to_zero_over_the_last_part():
    cfg = replace(train_config.PRESETS["s"], steps=1000, warmup=100, decay=0.4, lr=1.0)
    assert [train_optim.lr_at(n, cfg) for n in (0, 50, 100, 599)] == pytest.approx([0.01, 0.505, 1, 1])
    assert [train_optim.lr_at(n, cfg) for n in (600, 700, 800, 999)] == pytest.approx([1, 0.75, 0.5, 0.0025])


def test_averaged_weights_are_those_of_the_release():
    fixture = oracle("parity/fairseq_adam.npz")
    ema, net = (torch.nn.Linear(4, 1, bias=False, dtype=f64).requires_grad_(False) for _ in range(2))
    for module in (ema, net):
        module.register_buffer("freqs", torch.zeros(1))
    ema.weight.copy_(fixture["ema_inputs"][0])
    for n in range(1, len(fixture["ema_inputs"])):
        net.weight.copy_(fixture["ema_inputs"][n])
        net.freqs.fill_(n)
        train_optim.update_ema(ema, net, n, 0.99)
        torch.testing.assert_close(ema.weight[0], fixture["ema_shadow"][n - 1], rtol=0, atol=1e-13)
        assert ema.freqs == n                            # buffers are copied


def test_muon_takes_the_matrices_of_the_blocks_and_fairseq_adam_all_else():
    net = HDiT(TINY)
    adam, muon = train_optim.optimizers(net, replace(train_config.PRESETS["tiny"], optimizer="muon"))
    name_of = {id(p): name for name, p in net.named_parameters()}
    names = [{name_of[id(p)] for group in o.param_groups for p in group["params"]} for o in (adam, muon)]
    assert names[0] | names[1] == set(name_of.values()) and not names[0] & names[1]
    assert {name.split(".", 2)[-1] for name in names[1] if "level" in name and "mid" not in name} == {
        f"0.{part}.weight" for part in ("self_attn.qkv_proj", "self_attn.out_proj", "ff.up_proj", "ff.down_proj")}
    assert {"patch_in.proj.weight", "patch_out.proj.weight", "time_in_proj.weight", "out_norm.scale"} < names[0]
    assert len(train_optim.optimizers(net, train_config.PRESETS["s"])) == 1


def test_presets_carry_the_papers_numbers():                            # Table 4, appendix B.1, section 4
    s, l = train_config.PRESETS["s"], train_config.PRESETS["l"]
    for cfg in (s, l):
        assert (cfg.batch, cfg.lr, cfg.beta2, cfg.weight_decay, cfg.warmup, cfg.clip) == (128, 1e-4, 0.98, 0.01, 2000, 1.0)
        assert (cfg.mean, cfg.std, cfg.bf16, cfg.optimizer, cfg.decay, cfg.ema_decay) == (0.04, 0.09, True, "adam", 0.0, 0.99)
    assert (s.steps, s.crop, s.voxel_size, s.crops_per_map, s.center_crops, s.time_law) == (150_000, 64, 1.5, 2, False, "uniform")
    assert (l.steps, l.crop, l.voxel_size, l.crops_per_map, l.center_crops, l.time_law) == (
        300_000, 128, 3.0, 1, True, "logit-normal")
    assert (s.net.depths, s.net.widths, s.net.patch_size) == ((4, 8), (768, 1536), 4)
    assert (l.net.depths, l.net.widths, l.net.patch_size) == ((2, 2, 12), (320, 640, 1280), 4)


def test_flags_override_the_preset_and_meet_its_checks():
    cfg = train.parse(["--model", "s", "--steps", "7", "--no-bf16", "--data", "maps", "--std", "0.2"])
    assert cfg == replace(train_config.PRESETS["s"], steps=7, bf16=False, data="maps", std=0.2)
    for flags, match in (("--crop 36", "multiple of 8"), ("--steps 0", "--steps 0: it must be positive"),
                         ("--optimizer sgd", "choose adam or muon"), ("--time-law cosine", "uniform or logit-normal"),
                         ("--resolution-min 5", "at most"), ("--decay 2", "--decay"), ("--crops-per-map -1", "positive")):
        with pytest.raises(ValueError, match=match):
            train.parse(flags.split())


def test_a_batch_is_shared_out_to_any_number_of_ranks_that_divides_it():
    s = train_config.PRESETS["s"]                               # 128 crops, 2 from each map, at most 16 at once
    assert [train_objectives.split_batch(s, world) for world in (1, 2, 8, 16, 64)] == [(8, 16), (4, 16), (1, 16), (1, 8), (1, 2)]
    assert train_objectives.split_batch(replace(s, micro_batch=13), 1) == (16, 8)
    for world in (3, 128):
        with pytest.raises(ValueError, match=f"--batch 128 must be a multiple of {world} rank"):
            train_objectives.split_batch(s, world)


# ---- Data ------------------------------------------------------------------------------------------

def test_a_label_is_held_out_or_trained_on_and_never_both():
    entries = [data.Volume(f"emd_{i % 600}", torch.zeros(1)) for i in range(1000)]      # some labels twice
    parts = [{entry.label for entry in part} for part in train_objectives.split(entries)]
    assert parts[0] | parts[1] == {entry.label for entry in entries} and not parts[0] & parts[1]
    assert len(parts[1]) == pytest.approx(600 / 20, rel=0.3)
    assert sum(map(len, train_objectives.split(entries))) == 1000
    for count in (2, 3, 5):                              # few: one is held out, and all others trained on
        few = [data.Volume(f"emd_{i}", torch.zeros(1)) for i in range(count)]
        assert [len(part) for part in train_objectives.split(few)] == [count - 1, 1]
    assert train_objectives.split(entries[:1]) == (entries[:1], entries[:1])


def blob(*centre, box=18, sigma=2.5):
    grid = torch.meshgrid(*[torch.arange(box) - box / 2] * 3, indexing="ij")
    return torch.exp(-sum((a - c) ** 2 for a, c in zip(grid, centre)) / (2 * sigma ** 2))


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """A folder of three small maps, each of two blobs."""
    folder = tmp_path_factory.mktemp("maps")
    for i in range(3):
        mrc.write_map(folder / f"emd_{i}.mrc", mrc.Map(blob(0, 0, 0) + blob(i, 3, -3, sigma=1.5), 1.5))
    return folder


PDB = "".join(f"ATOM  {i + 1:5d}  C   ALA A{i + 1:4d}    {3.8 * i:8.3f}{i % 3:8.3f}{0:8.3f}  1.00 20.00           C\n"
              for i in range(5))


def test_data_are_told_apart_by_what_the_path_holds(tmp_path, maps, capsys):
    small = replace(train_config.PRESETS["tiny"], crop=16, crops_per_map=2)

    def datasets(path, **changes):
        return train_objectives.datasets(replace(small, data=str(path), **changes))

    first, second = datasets("procedural")
    assert isinstance(first.entries, data_chains.ProceduralChains) and first.entries.seed != second.entries.seed
    assert not torch.equal(*first[0])                    # two crops of one map
    first, second = datasets(maps)
    assert isinstance(first, data.MapCrops) and "0 maps skipped, 3 read" in capsys.readouterr().out
    assert sorted(v.label for v in first.entries + second.entries) == ["emd_0", "emd_1", "emd_2"]
    assert not first.center and datasets(maps, center_crops=True)[0].center
    assert datasets("procedural", center_crops=True)[0].box == 16

    (tmp_path / "models").mkdir()
    for name in "abc":
        (tmp_path / "models" / f"{name}.pdb").write_text(PDB)
    first, second = datasets(tmp_path / "models")
    assert isinstance(first, data.SimulatedCrops) and (len(first.entries), len(second.entries)) == (2, 1)
    capsys.readouterr()
    first, second = datasets(tmp_path / "models/a.pdb")          # one structure: other orientations of it are held out
    assert first.entries == second.entries and not torch.equal(first[0], second[0])
    assert "1 to train on, 1 held out, the same one in other orientations" in capsys.readouterr().out


def test_an_unreadable_map_is_skipped_and_counted_and_more_than_one_in_a_hundred_stop_the_run(tmp_path, maps, capsys):
    content = (maps / "emd_0.mrc").read_bytes()
    for i in range(199):
        (tmp_path / f"emd_{i}.mrc").write_bytes(content)
    for name in ("bad_1.mrc", "bad_2.mrc"):
        (tmp_path / name).write_bytes(content[:5000])
        cfg = replace(train_config.PRESETS["tiny"], data=str(tmp_path))
        if name == "bad_1.mrc":                          # 1 of 200
            train_objectives.datasets(cfg)
            out = capsys.readouterr().out
            assert "1 maps skipped, 199 read" in out and out.count("skipped ") == 1 and "bad_1.mrc: truncated" in out
    (tmp_path / "emd_0.mrc").write_bytes(b"")            # 3 of 201
    with pytest.raises(ValueError, match="3 of 201 maps cannot be used, more than 1 %; .*bad_1.mrc: truncated"):
        train_objectives.datasets(cfg)


def test_nothing_to_train_on_is_one_clear_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.mrc").write_bytes(b"junk")
    (tmp_path / "notes.txt").write_text("hello")
    for path in ("empty", "bad", "notes.txt"):
        with pytest.raises(ValueError, match=f"{path}: nothing to train on; give a folder of maps"):
            train_objectives.datasets(replace(train_config.PRESETS["tiny"], data=str(tmp_path / path)))
    with pytest.raises(OSError, match="none: no such file or folder"):
        train_objectives.datasets(replace(train_config.PRESETS["tiny"], data=str(tmp_path / "none")))


# ---- Runs ------------------------------------------------------------------------------------------

TINY = HDiTConfig(depths=(1, 1), widths=(24, 48), d_head=12, kernel_size=3, mapping_width=16)
SMALL = train_config.TrainConfig(net=TINY, steps=4, batch=4, micro_batch=4, crop=16, crops_per_map=2, mean=0.05, std=0.13, lr=1e-2,
                          warmup=2, decay=0.5, bf16=False, workers=0, log_every=1, eval_every=2, save_every=100,
                          held_out_crops=4)


# CryoLVM's: crops of 12^3 are 6^3 tokens, as in the paper.
SCUNET = replace(SMALL, net=SCUNetConfig(width=8, depths=(1, 1, 1), d_head=4), predictor=JEPAConfig(width=24, depth=1, heads=2),
                 optimizer="adamw", crop=12, mean=0.0, std=1.0, voxel_size=1.0, warmup=0, decay=0.0, weight_decay=0.1,
                 sample_every=0)
SCUNETS = {"small-jepa": replace(SCUNET, objective="jepa"), "small-mae": replace(SCUNET, objective="mae"),
           "small-sharpen": replace(SCUNET, objective="sharpen", patience=1, eval_every=1)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """`--model small` and so on in every test; signal handlers that a run sets are put back."""
    for name, cfg in {"small": SMALL, **SCUNETS}.items():
        monkeypatch.setitem(train_config.PRESETS, name, cfg)
    before = {name: signal.getsignal(name) for name in train.STOP_SIGNALS}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


def run(out, *flags, model="small", **settings):
    """train.py's main; returns the checkpoint it wrote, all but the flags."""
    flags = [*flags, *(f"--{name.replace('_', '-')}={value}" for name, value in settings.items())]
    train.main(["--model", model, "--out", str(out), *flags])
    content = checkpoint.read(Path(out) / "checkpoint.pt")
    content["training"].pop("flags")
    return content


def leaves(tree):
    if isinstance(tree, dict):
        tree = [tree[key] for key in sorted(tree, key=str)]
    return [leaf for part in tree for leaf in leaves(part)] if isinstance(tree, (list, tuple)) else [tree]


def assert_same(a, b):
    """Bit by bit, in every tensor and number of two checkpoints."""
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    assert sum(torch.is_tensor(x) for x, _ in pairs) > 100
    assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in pairs)


def log_rows(out):
    with open(Path(out) / "log.csv", newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("optimizer, signum", [("adam", signal.SIGTERM), ("muon", signal.SIGUSR1), ("adam", signal.SIGINT)])
def test_resuming_equals_never_stopping(tmp_path, maps, monkeypatch, capsys, optimizer, signum):
    def kill_at(step):
        def lr_at(now, cfg, lr_at=train_optim.lr_at):
            if now == step:
                os.kill(os.getpid(), signum)
            return lr_at(now, cfg)
        return lr_at

    whole = run(tmp_path / "whole", data=maps, optimizer=optimizer)
    with monkeypatch.context() as patch:                 # as `kill` would, in the middle of the second step
        patch.setattr(train_optim, "lr_at", kill_at(1))
        stopped = run(tmp_path / "parts", data=maps, optimizer=optimizer)
    assert stopped["training"]["step"] == 2 and "stopped by a signal after step 2" in capsys.readouterr().out
    with open(tmp_path / "parts/log.csv", "a") as log:   # rows of steps that were lost
        print(3, 9.9, sep=",", file=log)
    resumed = run(tmp_path / "parts", "--resume", data=maps, optimizer=optimizer, workers=2)     # nor do workers matter
    assert f"resuming {tmp_path / 'parts/checkpoint.pt'} after step 2" in (out := capsys.readouterr().out)
    assert "changed: --workers 0 -> 2" in out
    assert_same(resumed, whole)
    assert not torch.equal(stopped["weights"]["out_norm.scale"], whole["weights"]["out_norm.scale"])
    rows, want = log_rows(tmp_path / "parts"), log_rows(tmp_path / "whole")
    assert [row[0] for row in rows] == ["step", "1", "2", "3", "4"]
    for row, other in zip(rows, want, strict=True):      # all but the rate; held out was measured when it stopped, too
        assert row[:4] == other[:4] and row[5:] == other[5:]
    assert all(len(row) == 15 and all(row[:5]) for row in rows)
    assert [all(row[5:10]) for row in rows[1:]] == [False, True, False, True]           # held out: every second step

    run(tmp_path / "parts", "--resume", data=maps, optimizer=optimizer)
    assert "nothing to do: step 4 of 4" in capsys.readouterr().out


def test_the_first_step_is_the_one_the_equations_say(tmp_path, maps):
    # Accumulation: two micro-batches of 2 crops. One big batch by hand, with the same noise and times.
    taken = run(tmp_path / "run", data=maps, batch=4, micro_batch=2, steps=1, warmup=0, decay=0, seed=5)
    cfg = replace(SMALL, data=str(maps), seed=5)
    torch.manual_seed(5)
    net = HDiT(TINY)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    crops, times, noise = [], [], []
    for m in (0, 1):
        g = torch.Generator().manual_seed((5 * 1_000_003 + m) * 268_636_163 % 2 ** 63)
        crops.append(train_objectives.datasets(cfg, lambda _: None)[0][m])
        times.append(torch.rand(2, generator=g))
        noise.append(torch.randn(crops[-1].shape, generator=g))
    x_0, t, x_1 = (torch.cat(parts) for parts in (crops, times, noise))
    x_t = (1 - t[:, None, None, None, None]) * x_0 + t[:, None, None, None, None] * x_1
    (net(x_t, t) - (x_1 - x_0)).square().mean().backward()
    norm = sum(float(p.grad.square().sum()) for p in net.parameters()) ** 0.5
    log = dict(zip(*log_rows(tmp_path / "run")))
    assert float(log["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    with torch.no_grad():                                # the loss of each fifth of the times
        net_0 = HDiT(TINY)
        net_0.load_state_dict({**net.state_dict(), **before})
        losses = (net_0(x_t, t) - (x_1 - x_0)).square().flatten(1).mean(1)
    for i in range(5):
        these = losses[(t >= i / 5) & (t < (i + 1) / 5)]
        got = log[f"loss_t{i / 5:g}-{(i + 1) / 5:g}"]
        assert (not len(these) and got == "") or float(got) == pytest.approx(float(these.mean()), rel=1e-4)
    assert float(log["loss"]) == pytest.approx(float(losses.mean()), rel=1e-4)
    for name, p in net.named_parameters():
        g = (p.grad / max(norm, 1)).double()             # clipped
        step = g / (g.abs() + 1e-8 / 0.02 ** 0.5)        # of Adam, the first: m = 0.1 g, v = 0.02 g^2
        want = before[name] * (1 - 1e-2 * 0.01) - 1e-2 * step
        got = taken["training"]["net"][name].double()
        sure = (g == 0) | (g.abs() > 1e-4)               # where rounding does not decide the sign
        assert sure.float().mean() > 0.5
        torch.testing.assert_close(got[sure], want[sure], rtol=0, atol=1e-4)
        ema = torch.lerp(before[name].double(), got, 1 - 2 / 11)
        torch.testing.assert_close(taken["weights"][name].double(), ema, rtol=0, atol=1e-6)


@pytest.fixture
def atoms(tmp_path):
    """Three structures of 200 atoms in a ball."""
    xyz = torch.randn(600, 3, generator=torch.Generator().manual_seed(0)) * 5
    np.savez(tmp_path / "atoms.npz", label=["a", "b", "c"], atom_start=[0, 200, 400, 600], xyz=(100 * xyz).short().numpy(),
             element=np.full(600, 6, "u1"), bfactor=np.full(600, 20, "u1"))
    return tmp_path / "atoms.npz"


def stop_after(step, patch):
    """A signal at the end of the step before: it is seen in this one, the last."""
    def update(ema, net, n, cfg, update=train_optim.update_average):
        if n == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        update(ema, net, n, cfg)
    patch.setattr(train_optim, "update_average", update)


@pytest.mark.parametrize("model", SCUNETS)
def test_resuming_cryolvms_runs_equals_never_stopping(tmp_path, atoms, monkeypatch, model):
    whole = run(tmp_path / "whole", model=model, data=atoms)
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        stopped = run(tmp_path / "parts", model=model, data=atoms)
    assert stopped["training"]["step"] == 2
    assert_same(run(tmp_path / "parts", "--resume", model=model, data=atoms), whole)
    if model == "small-sharpen":
        assert whole["training"]["plateau"]["last_epoch"] == 4
    assert log_rows(tmp_path / "parts")[-1][:4] == log_rows(tmp_path / "whole")[-1][:4]
    name = model.removeprefix("small-")
    shipped = checkpoint.load(tmp_path / f"whole/{name}.pt", kind="scunet")
    assert (shipped.task, shipped.box, shipped.voxel_size, shipped.mean, shipped.std) == (name, 12, 1.0, 0.0, 1.0)


def test_the_first_step_of_jepa_is_the_one_the_equations_say(tmp_path, atoms):
    cfg = replace(SCUNETS["small-jepa"], steps=2, batch=4, data=str(atoms))
    taken = run(tmp_path / "run", model="small-jepa", data=atoms, steps=2, batch=4, save_every=1)["training"]
    torch.manual_seed(0)
    encoder = SCUNet(cfg.net).encoder
    net = jepa.JEPA(encoder, 16, (6, 6, 6), cfg.predictor)
    target = train_optim.averaged(net, cfg)
    decayed = [p for p in net.parameters() if p.ndim > 1 and p.ndim != 4]    # 4: tables of relative positions
    others = [p for p in net.parameters() if p.ndim in (1, 4)]
    items = train_objectives.datasets(cfg, lambda _: None)[0]
    for step in range(2):
        g = torch.Generator().manual_seed(step * 268_636_163)
        x = torch.cat([items[2 * step], items[2 * step + 1]])[:, :1]
        hidden = jepa.block_masks(4, (6, 6, 6), g)
        loss = jepa.jepa_loss(net, target, x, hidden)
        grads = torch.autograd.grad(loss, [*decayed, *others])
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        if step == 0:
            first = dict(zip(log_rows(tmp_path / "run")[0], log_rows(tmp_path / "run")[1]))
            assert float(first["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
            assert float(first["grad_norm"]) == pytest.approx(float(norm), rel=1e-4)
            adam = {id(p): (torch.zeros_like(p), torch.zeros_like(p)) for p in (*decayed, *others)}
        lr, decay = jepa.lr_at(step, 2, 0, 1e-2, 2e-3), jepa.weight_decay_at(step, 2)
        with torch.no_grad():
            for p, grad in zip((*decayed, *others), grads):
                m, v = adam[id(p)]
                grad = grad / max(float(norm), 1)
                m.lerp_(grad, 0.1)
                v.lerp_(grad ** 2, 1 - cfg.beta2)
                p.mul_(1 - lr * (decay if any(p is q for q in decayed) else 0))
                p.sub_(lr * m / (1 - 0.9 ** (step + 1)) / ((v / (1 - cfg.beta2 ** (step + 1))).sqrt() + 1e-8))
            for a, b in zip(target.parameters(), net.context.parameters()):
                a.lerp_(b, 1 - (0.996 + 0.004 * step / 2))                   # (4) of jepa.py
    for name, value in net.state_dict().items():         # Adam divides small gradients by themselves
        assert ((taken["net"][name] - value).abs() < 1e-4).float().mean() > 0.85, name
    for name, value in target.state_dict().items():
        torch.testing.assert_close(taken["target"][name], value, rtol=0, atol=1e-4)


def test_fine_tuning_starts_from_the_encoder_of_pre_training_and_a_decoder_of_its_own(tmp_path, atoms):
    run(tmp_path / "jepa", model="small-jepa", data=atoms, steps=1)
    pretrained = checkpoint.load(tmp_path / "jepa/jepa.pt").net
    cfg = replace(SCUNETS["small-sharpen"], init=str(tmp_path / "jepa/jepa.pt"))
    torch.manual_seed(0)
    net, fresh = train_objectives.build(cfg), SCUNet(cfg.net)
    train.start_from(net, cfg, lambda _: None)
    for name, value in net.encoder.state_dict().items():
        assert torch.equal(value, pretrained.encoder.state_dict()[name])
    torch.manual_seed(0)
    for name, value in SCUNet(cfg.net).decoder.state_dict().items():
        assert torch.equal(net.decoder.state_dict()[name], value)
    assert not torch.equal(fresh.encoder.head.weight, net.encoder.head.weight)

    run(tmp_path / "sharpen", model="small-sharpen", data=atoms, steps=1, init=tmp_path / "jepa/jepa.pt")
    for init, model, says in (("sharpen/sharpen.pt", "superres", "fine-tuned for sharpen, not for superres"),
                              ("sharpen/sharpen.pt", "jepa", "fine-tuned for sharpen, not for jepa")):
        with pytest.raises(ValueError, match=says):
            train.start_from(net, replace(SCUNETS["small-sharpen"], objective=model, patience=0, init=str(tmp_path / init)))
    with pytest.raises(ValueError, match="another network"):
        train.start_from(net, replace(cfg, net=SCUNetConfig(width=16, depths=(1, 1, 1), d_head=4)))


def test_the_learning_rate_of_fine_tuning_falls_by_a_tenth_where_the_held_out_loss_does_not(tmp_path, atoms, monkeypatch):
    monkeypatch.setattr(train_objectives, "held_out_losses", lambda *_: [1.0, 1.0, 1.0])
    run(tmp_path / "run", model="small-sharpen", data=atoms, steps=6)
    rates = [float(row[3]) for row in log_rows(tmp_path / "run")[1:]]
    # Patience 1: the first evaluation is the best one, the second is borne, the third is one too many; so is the fifth.
    assert rates == pytest.approx([1e-2] * 3 + [9e-3] * 2 + [8.1e-3], rel=1e-5)


def test_cryolvms_numbers_are_table_4s():
    cfg = train_config.PRESETS["sharpen"]
    assert (cfg.optimizer, cfg.lr, cfg.weight_decay, cfg.patience, cfg.batch, cfg.crop, cfg.voxel_size, cfg.mean, cfg.std) == \
        ("adamw", 3e-5, 1e-3, 5, 32, 48, 1.0, 0.0, 1.0)
    assert sum(p.numel() for p in train_objectives.build(cfg).parameters()) == 4_727_676
    assert train_objectives.token_grid(cfg) == (6, 6, 6)            # 216 tokens


TWO_RANKS = """
import os, signal, sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
import test_train, train
train.PRESETS.update(small=test_train.SMALL, **test_train.SCUNETS)
losses, calls = train.losses, []
def of_rank(*args):                                      # what befalls rank 1 in step 3: two micro-batches a step
    calls.append(0)
    if len(calls) == 5 and os.environ["RANK"] == "1" and {signum}:
        os.kill(os.getpid(), {signum})
    loss, bucket = losses(*args)
    return loss * (torch.nan if {nan} and len(calls) == 6 and os.environ["RANK"] == "1" else 1), bucket
train.losses = of_rank
try:
    train.main(["--model", {model!r}, "--data", {maps!r}, "--out", {out!r}, "--steps", "500", "--decay", "0",
                "--batch", "8", "--micro-batch", "2", "--save-every", "2"])
except ValueError as error:
    sys.exit(f"train.py: {{error}}")
"""


def two_ranks(out, maps, signum=0, nan=False, model="small"):
    script = out.with_suffix(".py")
    script.write_text(TWO_RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"), maps=str(maps), out=str(out),
                                       signum=int(signum), nan=nan, model=model))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)


def test_two_ranks_take_the_steps_one_rank_takes_stop_together_and_are_resumed_by_one(tmp_path, maps):
    done = two_ranks(tmp_path / "two", maps, signal.SIGTERM)                 # to one of them
    # gloo sometimes aborts at the exit of the interpreter, after the work: what counts is what was saved.
    assert (tmp_path / "two/checkpoint.pt").exists(), done.stdout + done.stderr
    two = checkpoint.read(tmp_path / "two/checkpoint.pt")
    assert "stopped by a signal after step 3" in done.stdout
    assert done.stdout.count("M parameters, cpu, 2 rank(s) x 2 x 2 crops") == 1
    settings = dict(data=maps, decay=0, batch=8, micro_batch=2)
    one = run(tmp_path / "one", steps=3, **settings)
    assert two["training"]["step"] == one["training"]["step"] == 3

    def compare(two, one):                               # steps of 0.01; the order of a sum differs
        for key, value in one["training"]["net"].items():
            torch.testing.assert_close(two["training"]["net"][key], value, rtol=0, atol=1e-3)
        rows, want = log_rows(tmp_path / "two"), log_rows(tmp_path / "one")
        for row, other in zip(rows[1:], want[1:], strict=True):
            np.testing.assert_allclose(np.float64(row[1:3]), np.float64(other[1:3]), rtol=1e-3)

    compare(two, one)
    compare(*(run(tmp_path / name, "--resume", steps=5, **settings) for name in ("two", "one")))


@pytest.mark.parametrize("model", ["small-jepa", "small-sharpen"])
def test_two_ranks_train_cryolvm_as_one_does(tmp_path, atoms, monkeypatch, model):
    done = two_ranks(tmp_path / "two", atoms, signal.SIGTERM, model=model)
    assert (tmp_path / "two/checkpoint.pt").exists(), done.stdout + done.stderr
    two = checkpoint.read(tmp_path / "two/checkpoint.pt")["training"]
    stop_after(3, monkeypatch)
    one = run(tmp_path / "one", model=model, data=atoms, decay=0, batch=8, micro_batch=2, steps=500)["training"]
    assert two["step"] == one["step"] == 3
    if model == "small-sharpen":                         # the order of a sum differs, and Adam's first steps are of size lr
        assert two["plateau"]["last_epoch"] == 3 and two["plateau"]["best"] == pytest.approx(one["plateau"]["best"], rel=2e-3)
    for part in ("net", "target") if "jepa" in model else ("net",):      # Adam's first steps: small gradients may change sides
        for key, value in one[part].items():
            assert ((two[part][key] - value).abs() < 2e-3).float().mean() > 0.95, key


def test_a_rank_that_dies_ends_the_others_and_leaves_the_last_checkpoint(tmp_path, maps):
    done = two_ranks(tmp_path / "dead", maps, signal.SIGKILL)                # kill -9: no farewell
    assert done.returncode and "SIGKILL" in done.stderr.upper()             # and it did not wait for its time to be up
    assert checkpoint.read(tmp_path / "dead/checkpoint.pt")["training"]["step"] == 2
    assert [row[0] for row in log_rows(tmp_path / "dead")] == ["step", "1", "2"]


def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_step_rank_and_batch_after_saving(tmp_path, maps):
    done = two_ranks(tmp_path / "nan", maps, nan=True)
    assert done.returncode
    # Step 3, the second of two micro-batches of rank 1 of 2: number (2 * 2 + 1) * 2 + 1, one map in each.
    line = ("train.py: step 3: the loss is not finite in micro-batch 11, items 11 to 11 of the data, on rank 1; "
            "saved as it was after step 2, --resume it with a lower --lr")
    assert line in done.stderr and "Traceback" not in done.stderr.split(line)[0]
    saved = checkpoint.read(tmp_path / "nan/checkpoint.pt")
    assert saved["training"]["step"] == 2 and all(v.isfinite().all() for v in saved["training"]["net"].values())
    one = run(tmp_path / "one", data=maps, decay=0, batch=8, micro_batch=2, steps=2)
    for key, value in one["training"]["net"].items():
        torch.testing.assert_close(saved["training"]["net"][key], value, rtol=0, atol=1e-3)


def test_a_run_is_neither_overwritten_nor_resumed_by_mistake(tmp_path, maps):
    with pytest.raises(OSError, match="checkpoint.pt: no checkpoint to resume from; leave out --resume"):
        run(tmp_path / "a", "--resume", data=maps)
    assert not (tmp_path / "a").exists()
    run(tmp_path / "a", data=maps, steps=1)
    before = (tmp_path / "a/checkpoint.pt").read_bytes()
    with pytest.raises(FileExistsError, match="checkpoint.pt: a run is there; --resume it, or give another --out"):
        run(tmp_path / "a", data=maps)
    with pytest.raises(ValueError, match="another network, objective or optimiser"):
        run(tmp_path / "a", "--resume", data=maps, optimizer="muon")
    with pytest.raises(ValueError, match="another network, objective or optimiser"):
        run(tmp_path / "a", "--resume", "--crop=32", data=maps, model="tiny", optimizer="adam")
    assert (tmp_path / "a/checkpoint.pt").read_bytes() == before
    os.replace(tmp_path / "a/prior.pt", tmp_path / "a/checkpoint.pt")
    with pytest.raises(ValueError, match="holds no training state"):
        run(tmp_path / "a", "--resume", data=maps)


def test_a_gradient_that_is_not_finite_saves_the_weights_of_the_step_before(tmp_path, maps, monkeypatch):
    whole = run(tmp_path / "whole", data=maps)
    with monkeypatch.context() as patch:
        def lr_at(step, cfg, lr_at=train_optim.lr_at):         # overflows in the backward pass alone, in the last step
            patch.setattr(train.flow, "loss", overflow if step == 3 else loss)
            return lr_at(step, cfg)

        def overflow(net, x, **settings):
            value = loss(net, x, **settings)
            return value + (0 * value).sqrt()            # the slope of a root at 0, times 0

        loss = flow.loss
        patch.setattr(train_optim, "lr_at", lr_at)
        with pytest.raises(ValueError, match="step 4: each loss is finite, the gradient is not; saved as it was after step 3"):
            run(tmp_path / "parts", data=maps, save_every=2)
    assert checkpoint.read(tmp_path / "parts/checkpoint_before.pt")["training"]["step"] == 2        # should step 3 have been astray
    assert_same(run(tmp_path / "parts", "--resume", data=maps), whole)


def test_init_starts_from_averaged_weights_with_a_fresh_optimiser(tmp_path, maps, capsys):
    first = run(tmp_path / "a", data=maps)
    source = tmp_path / "a/checkpoint.pt"
    second = run(tmp_path / "b", data=maps, init=source, steps=1, warmup=0, lr=1e-9, std=0.2)
    for key, value in first["weights"].items():
        torch.testing.assert_close(second["training"]["net"][key], value, rtol=0, atol=1e-8)
    assert second["training"]["optimizers"][0]["param_groups"][0]["step"] == 1 == second["training"]["step"]
    out = capsys.readouterr().out
    assert f"starting from {source}" in out and "changed: --std 0.13 -> 0.2" in out and "--mean" not in out
    resumed = run(tmp_path / "b", "--resume", data=maps, init=source, steps=2)              # --resume comes first
    assert resumed["training"]["optimizers"][0]["param_groups"][0]["step"] == 2
    with pytest.raises(ValueError, match="another network, HDiTConfig.*give the --model it was trained as"):
        run(tmp_path / "c", "--crop=32", data=maps, init=source, model="tiny")
    with pytest.raises(OSError, match="none.pt"):
        run(tmp_path / "c", data=maps, init=tmp_path / "none.pt")


def test_samples_are_what_flow_draws_from_the_averaged_weights(tmp_path, maps, monkeypatch):
    monkeypatch.setattr(train, "SAMPLE_STEPS", 3)
    run(tmp_path, data=maps, sample_every=2)
    folder = tmp_path / "samples"
    assert {file.name for file in folder.glob("*.mrc")} == {f"step_00000{n}_{i}.mrc" for n in (2, 4) for i in (0, 1)}
    prior = checkpoint.load(tmp_path / "checkpoint.pt")
    x_1 = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    for i, x in enumerate(flow.sample(prior.net, x_1, 3)):
        map = mrc.read_map(folder / f"step_000004_{i}.mrc")
        torch.testing.assert_close(map.density, x[0] * 0.13 + 0.05, rtol=0, atol=1e-4)
        assert map.voxel_size == (1.5, 1.5, 1.5)
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    assert (folder / "step_000004.png").read_bytes()[1:4] == b"PNG"


def test_tensorboard_gets_what_log_csv_holds_or_says_what_to_install(tmp_path, maps):
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install tensorboard"):
            run(tmp_path, "--tensorboard", data=maps, steps=1)
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run(tmp_path, "--tensorboard", data=maps)
    events = EventAccumulator(str(tmp_path)).Reload()
    columns = dict(zip(log_rows(tmp_path)[0], zip(*log_rows(tmp_path)[1:])))
    got = [(e.step, e.value) for e in events.Scalars("loss")]
    assert got == [(int(n), pytest.approx(float(v), rel=1e-4)) for n, v in zip(columns["step"], columns["loss"])]


@pytest.mark.parametrize("name, box, want", [("s", 64, 410.67), ("l", 128, 458.09)])        # the release's, in 1e9
def test_multiply_adds_are_those_counted_on_the_release(name, box, want):
    assert train_dry_run.multiply_adds(train_config.PRESETS[name].net, box) / 1e9 == pytest.approx(want, rel=1e-4)


def test_a_dry_run_says_what_a_run_costs_takes_one_step_and_writes_nothing(tmp_path, maps, capsys):
    train.main(["--model", "small", "--data", str(maps), "--out", str(tmp_path / "a"), "--dry-run"])
    out = capsys.readouterr().out
    count = sum(p.numel() for p in HDiT(TINY).parameters())
    assert f"{count:,} parameters" in out and "micro-batch of 1 stands for all" in out and not (tmp_path / "a").exists()
    assert f"{20 * count / 2 ** 30:.1f} GiB for weights" in out
    assert re.search(r"loss \d\.\d{4}, \d+\.\d\d s, peak", out) and re.search(r" 1 x H200 +\d", out)


def test_days_on_gpus_are_the_arithmetic_of_compute_and_all_reduce():
    s, flop, parameters = train_config.PRESETS["s"], 2.5e12, 335e6
    seconds = lambda n: train.step_seconds(n, 1e15, 400e9, s, flop, parameters)
    assert seconds(1) == pytest.approx(128 * 2.5e12 / (0.4 * 1e15))                         # 0.8 s
    assert seconds(8) == pytest.approx(0.1)                                 # one micro-batch; 6 ms hide in its backward pass
    # 64 GPUs: 12.5 ms, of which 8.3 hide 2 * 7/8 * 1.34 GB / 400 GB/s + 2 * 7/8 * 0.1675 GB / 50 GB/s = 11.7 ms.
    assert seconds(64) == pytest.approx(0.0125 / 3 + 0.01173, rel=1e-3)


def test_errors_of_the_program_are_one_line_without_a_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--data", str(tmp_path / "none"), "--out", str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and not (tmp_path / "a").exists()
    assert done.stderr.strip() == f"train.py: {tmp_path / 'none'}: no such file or folder"


WORKER = """
import os, runpy, signal, sys, torch
sys.path.insert(0, {root!r})
import data
def failing(self, i, get=data.MapCrops.__getitem__):
    if i == 6 and torch.utils.data.get_worker_info():
        {fails}
    return get(self, i)
data.MapCrops.__getitem__ = failing
sys.argv = ["train.py", "--model", "tiny", "--data", {maps!r}, "--out", {out!r}, "--crop", "16", "--batch", "4", "--steps", "50",
            "--workers", "1", "--held-out-crops", "4"]
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


@pytest.mark.parametrize("fails, says", [
    ("open('/gone.npy')", "train.py: FileNotFoundError: [Errno 2] No such file or directory: '/gone.npy'\n"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "killed by signal: Killed")])
def test_a_run_ends_where_a_data_worker_does(tmp_path, maps, fails, says):
    script = WORKER.format(root=str(ROOT), maps=str(maps), out=str(tmp_path / "a"), fails=fails)
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=200)                   # it used to wait for its workers for ever
    assert done.returncode == 1 and says in done.stderr and (fails[:2] == "os" or done.stderr.count("\n") == 1), done.stderr


@pytest.mark.parametrize("name", [name for name, cfg in train_config.PRESETS.items() if cfg.objective != "flow"])
def test_every_preset_of_cryolvm_takes_one_step(tmp_path, atoms, monkeypatch, name):
    cfg = train_config.PRESETS[name]
    net = SCUNetConfig(width=8, depths=(1,) * len(cfg.net.depths), d_head=4)
    crop = 6 * 2 ** net.levels if cfg.objective in train_config.PRETRAINING else net.multiple              # blocks to hide want 6^3 cells
    monkeypatch.setitem(train_config.PRESETS, name, replace(
        cfg, net=net, predictor=SCUNET.predictor, crop=crop, crops_per_map=2, batch=2, micro_batch=2, held_out_crops=2, steps=1,
        warmup=0, lr=1e-3, workers=0))
    run(tmp_path, model=name, data=atoms)
    made = checkpoint.load(tmp_path / f"{cfg.objective}.pt", kind="scunet")
    assert (made.net.config, made.box, made.voxel_size, made.task) == (net, crop, cfg.voxel_size, cfg.objective)
    torch.manual_seed(cfg.seed)
    fresh = SCUNet(net)
    moved = (fresh.encoder.head.weight - made.net.encoder.head.weight).abs().max()
    assert moved > 1e-6                                  # averaged, and in half precision


@pytest.mark.parametrize("name", [name for name, cfg in train_config.PRESETS.items() if cfg.objective == "flow"])
def test_every_preset_family_takes_one_step_and_samples(tmp_path, monkeypatch, name):
    # Each preset as it is, but narrow and on the smallest crops its levels allow, from procedural structures.
    cfg = train_config.PRESETS[name]
    net = replace(cfg.net, depths=(1,) * len(cfg.net.depths), widths=(24, 48, 96)[:len(cfg.net.widths)], d_head=12)
    count = 2 * cfg.crops_per_map
    monkeypatch.setitem(train_config.PRESETS, name, replace(
        cfg, net=net, crop=net.multiple, batch=count, micro_batch=count, steps=1, workers=0))
    run(tmp_path, model=name)
    prior = checkpoint.load(tmp_path / "prior.pt", kind="hdit")
    assert (prior.net.config, prior.box, prior.voxel_size) == (net, net.multiple, cfg.voxel_size)
    assert (prior.mean, prior.std) == (cfg.mean, cfg.std)
    x_1 = torch.randn(1, 1, *[prior.box] * 3, generator=torch.Generator().manual_seed(0))
    x_0 = flow.sample(prior.net, x_1, steps=2)
    assert x_0.isfinite().all() and not torch.equal(x_0, x_1)           # the step has moved the network off 0
