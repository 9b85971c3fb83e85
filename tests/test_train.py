"""What train.py promises: the paper's optimiser and numbers, and that no interruption or sharing out changes a run."""

import csv
import os
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
import flow
import train
from model_hdit import HDiT, HDiTConfig

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
f64 = torch.float64


def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"needs {SHARED / name}, which is not part of the project")
    return {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(SHARED / name).items()}


# ---- Optimiser -------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, atol", [(f64, 1e-15), (torch.float32, 1.2e-6)])      # ten steps, each rounds p by up to 6e-8 twice
def test_fairseq_adam_is_that_of_the_release(dtype, atol):
    fixture = shared("parity/fairseq_adam.npz")
    p0, target, curvature = (fixture[key].to(dtype) for key in ("p0", "target", "curvature"))
    p = torch.nn.Parameter(p0.clone())
    optimizer = train.FairseqAdam([p], 1e-4, (0.9, 0.98), weight_decay=0.01)
    want = fixture[f"fairseq_adam_{str(dtype).removeprefix('torch.')}"]
    for n in range(1, 11):
        p.grad = curvature * (p.detach() - target)
        optimizer.step()
        torch.testing.assert_close(p.detach(), want[n].to(dtype), rtol=0, atol=atol)
    assert (want[10] - fixture["torch_adamw_float64"][10]).abs().max() > 1e-4           # where AdamW differs


def test_warm_up_is_that_of_the_release():
    fixture = shared("parity/fairseq_adam.npz")
    for step, lr in zip(fixture["warmup_step"].tolist(), fixture["warmup_lr"].tolist()):
        assert train.lr_at(step, train.PRESETS["s"]) == pytest.approx(lr, rel=1e-12)


def test_learning_rate_falls_linearly_to_zero_over_the_last_part():
    cfg = replace(train.PRESETS["s"], steps=1000, warmup=100, decay=0.4, lr=1.0)
    assert [train.lr_at(n, cfg) for n in (0, 50, 100, 599)] == pytest.approx([0.01, 0.505, 1, 1])
    assert [train.lr_at(n, cfg) for n in (600, 700, 800, 999)] == pytest.approx([1, 0.75, 0.5, 0.0025])


def test_averaged_weights_are_those_of_the_release():
    fixture = shared("parity/fairseq_adam.npz")
    ema, net = (torch.nn.Linear(4, 1, bias=False, dtype=f64).requires_grad_(False) for _ in range(2))
    for module in (ema, net):
        module.register_buffer("freqs", torch.zeros(1))
    ema.weight.copy_(fixture["ema_inputs"][0])
    for n in range(1, len(fixture["ema_inputs"])):
        net.weight.copy_(fixture["ema_inputs"][n])
        net.freqs.fill_(n)
        train.update_ema(ema, net, n, 0.99)
        torch.testing.assert_close(ema.weight[0], fixture["ema_shadow"][n - 1], rtol=0, atol=1e-13)
        assert ema.freqs == n                            # buffers are copied


def test_muon_takes_the_matrices_of_the_blocks_and_fairseq_adam_all_else():
    net = HDiT(TINY)
    adam, muon = train.optimizers(net, replace(train.PRESETS["tiny"], optimizer="muon"))
    name_of = {id(p): name for name, p in net.named_parameters()}
    names = [{name_of[id(p)] for group in o.param_groups for p in group["params"]} for o in (adam, muon)]
    assert names[0] | names[1] == set(name_of.values()) and not names[0] & names[1]
    assert {name.split(".", 2)[-1] for name in names[1] if "level" in name and "mid" not in name} == {
        f"0.{part}.weight" for part in ("self_attn.qkv_proj", "self_attn.out_proj", "ff.up_proj", "ff.down_proj")}
    assert {"patch_in.proj.weight", "patch_out.proj.weight", "time_in_proj.weight", "out_norm.scale"} < names[0]
    assert len(train.optimizers(net, train.PRESETS["s"])) == 1


def test_presets_carry_the_papers_numbers():                            # Table 4, appendix B.1, section 4
    s, l = train.PRESETS["s"], train.PRESETS["l"]
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
    assert cfg == replace(train.PRESETS["s"], steps=7, bf16=False, data="maps", std=0.2)
    for flags, match in (("--crop 36", "multiple of 8"), ("--steps 0", "--steps 0: it must be positive"),
                         ("--optimizer sgd", "choose adam or muon"), ("--time-law cosine", "uniform or logit-normal"),
                         ("--resolution-min 5", "at most"), ("--decay 2", "--decay"), ("--crops-per-map -1", "positive")):
        with pytest.raises(ValueError, match=match):
            train.parse(flags.split())


def test_a_batch_is_shared_out_to_any_number_of_ranks_that_divides_it():
    s = train.PRESETS["s"]                               # 128 crops, 2 from each map, at most 16 at once
    assert [train.split_batch(s, world) for world in (1, 2, 8, 16, 64)] == [(8, 16), (4, 16), (1, 16), (1, 8), (1, 2)]
    assert train.split_batch(replace(s, micro_batch=13), 1) == (16, 8)
    for world in (3, 128):
        with pytest.raises(ValueError, match=f"--batch 128 must be a multiple of {world} rank"):
            train.split_batch(s, world)


# ---- Data ------------------------------------------------------------------------------------------

def test_a_label_is_held_out_or_trained_on_and_never_both():
    entries = [data.Volume(f"emd_{i % 600}", torch.zeros(1)) for i in range(1000)]      # some labels twice
    parts = [{entry.label for entry in part} for part in train.split(entries)]
    assert parts[0] | parts[1] == {entry.label for entry in entries} and not parts[0] & parts[1]
    assert len(parts[1]) == pytest.approx(600 / 20, rel=0.3)
    assert sum(map(len, train.split(entries))) == 1000
    for count in (2, 3, 5):                              # few: one is held out, and all others trained on
        few = [data.Volume(f"emd_{i}", torch.zeros(1)) for i in range(count)]
        assert [len(part) for part in train.split(few)] == [count - 1, 1]
    assert train.split(entries[:1]) == (entries[:1], entries[:1])


def blob(*centre, box=18, sigma=2.5):
    grid = torch.meshgrid(*[torch.arange(box) - box / 2] * 3, indexing="ij")
    return torch.exp(-sum((a - c) ** 2 for a, c in zip(grid, centre)) / (2 * sigma ** 2))


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """A folder of three small maps, each of two blobs, and one file that is none."""
    folder = tmp_path_factory.mktemp("maps")
    for i in range(3):
        data.write_map(folder / f"emd_{i}.mrc", data.Map(blob(0, 0, 0) + blob(i, 3, -3, sigma=1.5), 1.5))
    (folder / "emd_9.mrc").write_bytes(b"junk")
    return folder


PDB = "".join(f"ATOM  {i + 1:5d}  C   ALA A{i + 1:4d}    {3.8 * i:8.3f}{i % 3:8.3f}{0:8.3f}  1.00 20.00           C\n"
              for i in range(5))


def test_data_are_told_apart_by_what_the_path_holds(tmp_path, maps, capsys):
    small = replace(train.PRESETS["tiny"], crop=16, crops_per_map=2)

    def datasets(path, **changes):
        return train.datasets(replace(small, data=str(path), **changes))

    first, second = datasets("procedural")
    assert isinstance(first.structures, data.ProceduralChains) and first.structures.seed != second.structures.seed
    assert not torch.equal(*first[0])                    # two crops of one map
    first, second = datasets(maps)
    assert isinstance(first, data.MapCrops) and sorted(v.label for v in first.volumes + second.volumes) == ["emd_0", "emd_1", "emd_2"]
    assert "skipped" in (out := capsys.readouterr().out) and "emd_9.mrc" in out and "1 maps skipped, 3 read" in out
    assert not first.center and datasets(maps, center_crops=True)[0].center
    assert datasets("procedural", center_crops=True)[0].box == 16

    (tmp_path / "models").mkdir()
    for name in "abc":
        (tmp_path / "models" / f"{name}.pdb").write_text(PDB)
    first, second = datasets(tmp_path / "models")
    assert isinstance(first, data.SimulatedCrops) and (len(first.structures), len(second.structures)) == (2, 1)
    capsys.readouterr()
    first, second = datasets(tmp_path / "models/a.pdb")          # one structure: other orientations of it are held out
    assert first.structures == second.structures and not torch.equal(first[0], second[0])
    assert "1 to train on, 1 held out, the same one in other orientations" in capsys.readouterr().out


def test_nothing_to_train_on_is_one_clear_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.mrc").write_bytes(b"junk")
    (tmp_path / "notes.txt").write_text("hello")
    for path in ("empty", "bad", "notes.txt"):
        with pytest.raises(ValueError, match=f"{path}: nothing to train on; give a folder of maps"):
            train.datasets(replace(train.PRESETS["tiny"], data=str(tmp_path / path)))
    with pytest.raises(OSError, match="none: no such file or folder"):
        train.datasets(replace(train.PRESETS["tiny"], data=str(tmp_path / "none")))


# ---- Runs ------------------------------------------------------------------------------------------

TINY = HDiTConfig(depths=(1, 1), widths=(24, 48), d_head=12, kernel_size=3, mapping_width=16)
SMALL = train.TrainConfig(net=TINY, steps=4, batch=4, micro_batch=4, crop=16, crops_per_map=2, mean=0.05, std=0.13, lr=1e-2,
                          warmup=2, decay=0.5, bf16=False, workers=0, log_every=1, eval_every=2, save_every=100)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """`--model small` in every test; signal handlers that a run sets are put back."""
    monkeypatch.setitem(train.PRESETS, "small", SMALL)
    monkeypatch.setattr(train, "HELD_OUT_CROPS", 4)
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
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


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_resuming_equals_never_stopping(tmp_path, maps, monkeypatch, capsys, optimizer):
    def kill_at(step):
        def lr_at(now, cfg, lr_at=train.lr_at):
            if now == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return lr_at(now, cfg)
        return lr_at

    whole = run(tmp_path / "whole", data=maps, optimizer=optimizer)
    with monkeypatch.context() as patch:                 # as `kill` would, in the middle of the second step
        patch.setattr(train, "lr_at", kill_at(1))
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
    assert len(rows[2]) == len(rows[4]) == 10

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
        crops.append(train.datasets(cfg, lambda _: None)[0][m])
        times.append(torch.rand(2, generator=g))
        noise.append(torch.randn(crops[-1].shape, generator=g))
    x_0, t, x_1 = (torch.cat(parts) for parts in (crops, times, noise))
    x_t = (1 - t[:, None, None, None, None]) * x_0 + t[:, None, None, None, None] * x_1
    (net(x_t, t) - (x_1 - x_0)).square().mean().backward()
    norm = sum(float(p.grad.square().sum()) for p in net.parameters()) ** 0.5
    assert float(log_rows(tmp_path / "run")[1][2]) == pytest.approx(norm, abs=1e-3)
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


TWO_RANKS = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_train, train
train.PRESETS["small"], train.HELD_OUT_CROPS = test_train.SMALL, 4
lr_at = train.lr_at
def stop_rank_1(step, cfg):                              # a signal to one rank stops both
    if step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return lr_at(step, cfg)
train.lr_at = stop_rank_1
train.main(["--model", "small", "--data", {maps!r}, "--out", {out!r}, "--steps", "500", "--decay", "0",
            "--batch", "8", "--micro-batch", "2"])
"""


def test_two_ranks_take_the_steps_one_rank_takes_and_stop_together(tmp_path, maps):
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"), maps=str(maps), out=str(tmp_path / "two")))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    # gloo sometimes aborts at the exit of the interpreter, after the work: what counts is what was saved.
    assert (tmp_path / "two/checkpoint.pt").exists(), done.stdout + done.stderr
    two = checkpoint.read(tmp_path / "two/checkpoint.pt")
    assert "stopped by a signal after step 3" in done.stdout
    assert done.stdout.count("M parameters, cpu, 2 rank(s) x 2 x 2 crops") == 1
    one = run(tmp_path / "one", data=maps, steps=3, decay=0, batch=8, micro_batch=2)
    assert two["training"]["step"] == one["training"]["step"] == 3
    for key, value in one["training"]["net"].items():    # three steps of 0.01; the order of a sum differs
        torch.testing.assert_close(two["training"]["net"][key], value, rtol=0, atol=1e-3)
    rows, want = log_rows(tmp_path / "two"), log_rows(tmp_path / "one")
    for row, other in zip(rows[1:], want[1:], strict=True):
        np.testing.assert_allclose(np.float64(row[1:3]), np.float64(other[1:3]), rtol=1e-3)


def test_a_run_is_neither_overwritten_nor_resumed_by_mistake(tmp_path, maps):
    with pytest.raises(OSError, match="checkpoint.pt: no checkpoint to resume from; leave out --resume"):
        run(tmp_path / "a", "--resume", data=maps)
    assert not (tmp_path / "a").exists()
    run(tmp_path / "a", data=maps, steps=1)
    before = (tmp_path / "a/checkpoint.pt").read_bytes()
    with pytest.raises(FileExistsError, match="checkpoint.pt: a run is there; --resume it, or give another --out"):
        run(tmp_path / "a", data=maps)
    with pytest.raises(ValueError, match="another network or optimiser"):
        run(tmp_path / "a", "--resume", data=maps, optimizer="muon")
    with pytest.raises(ValueError, match="another network or optimiser"):
        run(tmp_path / "a", "--resume", "--crop=32", data=maps, model="tiny", optimizer="adam")
    assert (tmp_path / "a/checkpoint.pt").read_bytes() == before
    os.replace(tmp_path / "a/prior.pt", tmp_path / "a/checkpoint.pt")
    with pytest.raises(ValueError, match="holds no training state"):
        run(tmp_path / "a", "--resume", data=maps)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path, maps):
    run(tmp_path / "a", data=maps, steps=2)
    before = (tmp_path / "a/checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="in the steps up to 3; --resume from the last checkpoint"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.flow, "loss", lambda net, x, **_: net(x, torch.ones(len(x))).sum() * torch.inf)
            run(tmp_path / "a", "--resume", data=maps, save_every=1, log_every=50)
    assert (tmp_path / "a/checkpoint.pt").read_bytes() == before


def test_errors_of_the_program_are_one_line_without_a_traceback(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--data", str(tmp_path / "none"), "--out", str(tmp_path / "a")],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and not (tmp_path / "a").exists()
    assert done.stderr.strip() == f"train.py: {tmp_path / 'none'}: no such file or folder"


@pytest.mark.parametrize("name", [name for name in train.PRESETS])
def test_every_preset_family_takes_one_step_and_samples(tmp_path, monkeypatch, name):
    # Each preset as it is, but narrow and on the smallest crops its levels allow, from procedural structures.
    cfg = train.PRESETS[name]
    net = replace(cfg.net, depths=(1,) * len(cfg.net.depths), widths=(24, 48, 96)[:len(cfg.net.widths)], d_head=12)
    monkeypatch.setitem(train.PRESETS, name, replace(
        cfg, net=net, crop=net.multiple, batch=2 * cfg.crops_per_map, micro_batch=2 * cfg.crops_per_map, steps=1, workers=0))
    run(tmp_path, model=name)
    prior = checkpoint.load(tmp_path / "prior.pt", kind="hdit")
    assert (prior.net.config, prior.box, prior.voxel_size) == (net, net.multiple, cfg.voxel_size)
    assert (prior.mean, prior.std) == (cfg.mean, cfg.std)
    x_1 = torch.randn(1, 1, *[prior.box] * 3, generator=torch.Generator().manual_seed(0))
    x_0 = flow.sample(prior.net, x_1, steps=2)
    assert x_0.isfinite().all() and not torch.equal(x_0, x_1)           # the step has moved the network off 0
