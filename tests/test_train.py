"""train.py: the first step is that of the equations; every preset runs; the outputs are right."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import SCUNET, SCUNETS, SMALL, TINY, atoms, log_rows, maps, run, small_presets

import checkpoint
import flow
import jepa
import mrc
import train
import train_config
import train_log
import train_objectives
import train_optim
import train_presets
import train_ranks
from model_hdit import HDiT
from model_scunet import SCUNet, SCUNetConfig

ROOT = Path(__file__).parent.parent


def first_row(out):
    header, row = log_rows(out)[:2]
    return dict(zip(header, row))


def test_the_first_step_is_the_one_the_equations_say(tmp_path, maps):
    # Two micro-batches of 2 crops, accumulated.
    settings = dict(batch=4, micro_batch=2, steps=1, warmup=0, decay=0, seed=5)
    taken = run(tmp_path, data=maps, **settings)

    # One batch by hand, with the same crops, noise and times.
    train_set, _ = train_objectives.datasets(replace(SMALL, data=str(maps), seed=5))
    crops, times, noise = [], [], []
    for m in (0, 1):
        g = torch.Generator().manual_seed((5 * 1_000_003 + m) * 268_636_163 % 2**63)
        crops.append(train_set[m])
        times.append(torch.rand(2, generator=g))
        noise.append(torch.randn(crops[-1].shape, generator=g))
    x_0, t, x_1 = torch.cat(crops), torch.cat(times), torch.cat(noise)
    t_of_map = t[:, None, None, None, None]
    x_t = (1 - t_of_map) * x_0 + t_of_map * x_1
    torch.manual_seed(5)
    net = HDiT(TINY)
    losses = (net(x_t, t) - (x_1 - x_0)).square().flatten(1).mean(1)
    losses.mean().backward()
    losses = losses.detach()

    # The log.
    log = first_row(tmp_path)
    norm = sum(float(p.grad.square().sum()) for p in net.parameters()) ** 0.5
    assert float(log["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    assert float(log["loss"]) == pytest.approx(float(losses.mean()), rel=1e-4)
    for i in range(5):
        inside = losses[(t >= i / 5) & (t < (i + 1) / 5)]
        got = log[f"loss_t{i / 5:g}-{(i + 1) / 5:g}"]
        if len(inside):
            assert float(got) == pytest.approx(float(inside.mean()), rel=1e-4)
        else:
            assert got == ""

    # The weights and their average. Adam's first step: m = 0.1 g, v = 0.02 g^2.
    for name, p in net.named_parameters():
        g = (p.grad / max(norm, 1)).double()  # clipped
        step = g / (g.abs() + 1e-8 / 0.02**0.5)
        before = p.detach()
        want = before * (1 - 1e-2 * 0.01) - 1e-2 * step
        got = taken["training"]["net"][name].double()
        sure = (g == 0) | (g.abs() > 1e-4)  # where rounding does not decide the sign
        assert sure.float().mean() > 0.5
        torch.testing.assert_close(got[sure], want[sure], rtol=0, atol=1e-4)
        ema = torch.lerp(before.double(), got, 1 - 2 / 11)
        torch.testing.assert_close(taken["weights"][name].double(), ema, rtol=0, atol=1e-6)


def test_the_first_steps_of_jepa_are_those_the_equations_say(tmp_path, atoms):
    settings = dict(steps=2, batch=4, weight_decay=0.04)
    taken = run(tmp_path, model="small-jepa", data=atoms, save_every=1, **settings)["training"]

    cfg = replace(SCUNETS["small-jepa"], data=str(atoms), **settings)
    torch.manual_seed(0)
    encoder = SCUNet(cfg.net).encoder
    net = jepa.JEPA(encoder, 16, (6, 6, 6), cfg.predictor)
    target = train_optim.averaged(net, cfg)
    params = list(net.parameters())
    spared = [p.ndim in (1, 4) for p in params]  # 4: tables of relative positions
    m = [torch.zeros_like(p) for p in params]
    v = [torch.zeros_like(p) for p in params]
    items = train_objectives.datasets(cfg)[0]
    for step in range(2):
        g = torch.Generator().manual_seed(step * 268_636_163)
        x = torch.cat([items[2 * step], items[2 * step + 1]])[:, :1]
        visible = jepa.block_masks(4, (6, 6, 6), g)
        loss = jepa.jepa_loss(net, target, x, visible)
        grads = torch.autograd.grad(loss, params)
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        if step == 0:
            first = first_row(tmp_path)
            assert float(first["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
            assert float(first["grad_norm"]) == pytest.approx(float(norm), rel=1e-4)

        # AdamW with I-JEPA's schedules.
        lr = jepa.lr_at(step, 2, 0, 1e-2, 2e-3)
        decay = jepa.weight_decay_at(step, 2)
        n = step + 1
        with torch.no_grad():
            for i, p in enumerate(params):
                grad = grads[i] / max(float(norm), 1)
                m[i].lerp_(grad, 0.1)
                v[i].lerp_(grad**2, 1 - cfg.beta2)
                p.mul_(1 - lr * (0 if spared[i] else decay))
                denominator = (v[i] / (1 - cfg.beta2**n)).sqrt() + 1e-8
                p.sub_(lr * m[i] / (1 - 0.9**n) / denominator)
            for a, b in zip(target.parameters(), net.context.parameters()):
                a.lerp_(b, 1 - (0.996 + 0.004 * step / 2))  # (4) of jepa.py

    # Adam divides small gradients by themselves, so some steps differ.
    for name, value in net.state_dict().items():
        close = (taken["net"][name] - value).abs() < 1e-4
        assert close.float().mean() > 0.85, name
    for name, value in target.state_dict().items():
        torch.testing.assert_close(taken["target"][name], value, rtol=0, atol=1e-4)


def test_the_learning_rate_falls_by_a_tenth_if_the_held_out_loss_does_not(
    tmp_path, atoms, monkeypatch
):
    monkeypatch.setattr(train, "held_out_losses", lambda *_: [1.0, 1.0, 1.0])
    run(tmp_path, model="small-sharpen", data=atoms, steps=6)
    rates = [float(row[3]) for row in log_rows(tmp_path)[1:]]
    # Patience 1: the first evaluation is the best one, the second is tolerated, the third is one
    # too many, and so is the fifth.
    assert rates == pytest.approx([1e-2] * 3 + [9e-3] * 2 + [8.1e-3], rel=1e-5)


def test_samples_are_what_flow_draws_from_the_averaged_weights(tmp_path, maps, monkeypatch):
    monkeypatch.setattr(train_log, "SAMPLE_STEPS", 3)
    run(tmp_path, data=maps, sample_every=2)
    folder = tmp_path / "samples"
    names = {f"step_00000{n}_{i}.mrc" for n in (2, 4) for i in (0, 1)}
    assert {file.name for file in folder.glob("*.mrc")} == names
    prior = checkpoint.load(tmp_path / "checkpoint.pt")
    x_1 = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    for i, x in enumerate(flow.sample(prior.net, x_1, 3)):
        written = mrc.read_map(folder / f"step_000004_{i}.mrc")
        torch.testing.assert_close(written.density, x[0] * 0.13 + 0.05, rtol=0, atol=1e-4)
        assert written.voxel_size == (1.5, 1.5, 1.5)
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
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    rows = log_rows(tmp_path)[1:]
    want = [(int(row[0]), pytest.approx(float(row[1]), rel=1e-4)) for row in rows]
    assert [(event.step, event.value) for event in events] == want


def test_errors_of_the_program_are_one_line_without_a_traceback(tmp_path):
    missing = tmp_path / "none"
    command = [sys.executable, str(ROOT / "train.py"), "--out", str(tmp_path / "a"), "--data"]
    done = subprocess.run([*command, str(missing)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and not (tmp_path / "a").exists()
    assert done.stderr.strip() == f"train.py: {missing}: no such file or folder"


def test_a_step_never_waits_for_a_gpu():
    # Neither reads it a number, nor does it wait for a copy; on a fake GPU, see fake_gpu.py.
    models = ["small", "small-jepa", "small-sharpen"]
    command = [sys.executable, str(ROOT / "tests/fake_gpu.py"), *models]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    counts = [line for line in done.stdout.splitlines() if line.startswith("small")]
    assert counts == [f"{model} 0" for model in models], done.stdout + done.stderr


def test_every_rank_evaluates_and_samples_so_that_none_waits_and_the_first_one_writes(
    tmp_path, maps, monkeypatch
):
    class SecondRank(train_ranks.Ranks):
        """Of two, but without the first one: what it would send is left out."""

        def __init__(self):
            super().__init__()
            self.rank, self.world = 1, 2

        def reduce(self, x, operation=None):
            return x

        def agree(self, *wishes):
            return wishes

        def wrap(self, net):
            return net

        def join(self):
            pass

        leave = join

    calls = []

    def note(name):
        function = getattr(train, name)

        def noted(*args):
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(train, name, noted)

    note("held_out_losses")
    note("draw_samples")
    monkeypatch.setattr(train, "Ranks", SecondRank)
    monkeypatch.setattr(train_log, "SAMPLE_STEPS", 1)
    flags = ["--steps", "2", "--eval-every", "1", "--sample-every", "2", "--save-every", "1"]
    train.main(["--model", "small", "--data", str(maps), "--out", str(tmp_path / "a"), *flags])
    assert calls == ["held_out_losses", "held_out_losses", "draw_samples"]
    assert not (tmp_path / "a").exists()


def test_each_block_is_compiled_once_per_shape_and_the_weights_keep_their_names(monkeypatch):
    compiled = []

    def compile(function, dynamic):
        compiled.append(function.__self__)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    net = HDiT(TINY)
    names = list(net.state_dict())
    train_objectives.compile_blocks(net)
    blocks = [*net.down_levels[0], *net.mid_level, *net.up_levels[0]]
    assert compiled == blocks and list(net.state_dict()) == names


CRYOFM = [name for name, cfg in train_presets.PRESETS.items() if cfg.objective == "flow"]
CRYOLVM = [name for name, cfg in train_presets.PRESETS.items() if cfg.objective != "flow"]


@pytest.mark.parametrize("name", CRYOLVM)
def test_every_preset_of_cryolvm_takes_one_step(tmp_path, atoms, monkeypatch, name):
    # Each preset as it is, but narrow and on the smallest crops that it allows.
    cfg = train_presets.PRESETS[name]
    net = SCUNetConfig(width=8, depths=(1,) * len(cfg.net.depths), d_head=4)
    crop = net.multiple
    if cfg.objective in train_config.PRETRAINING:
        crop = 6 * 2**net.levels  # the blocks to hide need 6^3 cells
    small = replace(
        cfg,
        net=net,
        predictor=SCUNET.predictor,
        crop=crop,
        crops_per_map=2,
        batch=2,
        micro_batch=2,
        held_out_crops=2,
        steps=1,
        warmup=0,
        lr=1e-3,
        workers=0,
    )
    monkeypatch.setitem(train_presets.PRESETS, name, small)
    run(tmp_path, model=name, data=atoms)
    made = checkpoint.load(tmp_path / f"{cfg.objective}.pt", kind="scunet")
    assert (made.net.config, made.box) == (net, crop)
    assert (made.voxel_size, made.task) == (cfg.voxel_size, cfg.objective)

    # The step has moved the weights, by more than half precision would.
    torch.manual_seed(cfg.seed)
    fresh = SCUNet(net)
    moved = (fresh.encoder.head.weight - made.net.encoder.head.weight).abs().max()
    assert moved > 1e-6


@pytest.mark.parametrize("name", CRYOFM)
def test_every_preset_of_cryofm_takes_one_step_and_samples(tmp_path, monkeypatch, name):
    cfg = train_presets.PRESETS[name]
    levels = len(cfg.net.depths)
    net = replace(cfg.net, depths=(1,) * levels, widths=(24, 48, 96)[:levels], d_head=12)
    count = 2 * cfg.crops_per_map
    small = replace(
        cfg, net=net, crop=net.multiple, batch=count, micro_batch=count, steps=1, workers=0
    )
    monkeypatch.setitem(train_presets.PRESETS, name, small)
    run(tmp_path, model=name)
    prior = checkpoint.load(tmp_path / "prior.pt", kind="hdit")
    net = replace(net, whole_thousandths=cfg.time_law == "logit-normal")
    assert (prior.net.config, prior.box) == (net, net.multiple)
    assert (prior.voxel_size, prior.mean, prior.std) == (cfg.voxel_size, cfg.mean, cfg.std)
    assert prior.references.shape[1:] == (prior.box,) * 3  # what maps are compared with

    # The step has moved the network off 0, which would sample x_0 = x_1.
    generator = torch.Generator().manual_seed(0)
    x_1 = torch.randn(1, 1, *[prior.box] * 3, generator=generator)
    x_0 = flow.sample(prior.net, x_1, steps=2)
    assert x_0.isfinite().all() and not torch.equal(x_0, x_1)
