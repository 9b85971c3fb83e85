"""train_resume.py: stopping and resuming changes no bit; --init and --resume take what fits."""

import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from small_runs import (
    SCUNETS,
    SMALL,
    assert_same,
    atoms,
    log_rows,
    maps,
    run,
    small_presets,
    stop_after,
)
from test_files import OWNER

import checkpoint
import train
import train_objectives
import train_optim
import train_resume
from model_scunet import SCUNet, SCUNetConfig


@pytest.mark.parametrize(
    "optimizer, signum",
    [
        ("adam", signal.SIGTERM),
        ("muon", signal.SIGUSR1),
        ("adam", signal.SIGINT),
        ("adam", signal.SIGHUP),
    ],
)
def test_a_run_that_is_stopped_and_resumed_equals_one_never_stopped(
    tmp_path, maps, monkeypatch, capsys, optimizer, signum
):
    lr_at = train_optim.lr_at

    def lr_at_and_kill(step, cfg):  # as `kill` would, in the middle of the second step
        if step == 1:
            os.kill(os.getpid(), signum)
        return lr_at(step, cfg)

    settings = dict(data=maps, optimizer=optimizer)
    unbroken = run(tmp_path / "unbroken", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(train_optim, "lr_at", lr_at_and_kill)
        stopped = run(tmp_path / "parts", **settings)
    assert stopped["training"]["step"] == 2
    assert "stopped by a signal after step 2" in capsys.readouterr().out
    with open(tmp_path / "parts/log.csv", "a") as log:
        print(3, 9.9, sep=",", file=log)  # a row of a step that was lost

    # The number of workers does not matter.
    resumed = run(tmp_path / "parts", "--resume", workers=2, **settings)
    out = capsys.readouterr().out
    assert f"resuming {tmp_path / 'parts/checkpoint.pt'} after step 2" in out
    assert "changed: --workers 0 -> 2" in out
    assert_same(resumed, unbroken)
    scale = "out_norm.scale"
    assert not torch.equal(stopped["weights"][scale], unbroken["weights"][scale])

    # The log is the same but for the speed: column 4, and seconds and waiting at the end.
    rows = log_rows(tmp_path / "parts")
    assert [row[0] for row in rows] == ["step", "1", "2", "3", "4"]
    for row, other in zip(rows, log_rows(tmp_path / "unbroken"), strict=True):
        assert row[:4] == other[:4] and row[5:15] == other[5:15]
    assert all(len(row) == 19 and all(row[:5]) for row in rows)
    held_out = [all(row[5:10]) for row in rows[1:]]
    assert held_out == [False, True, False, True]

    run(tmp_path / "parts", "--resume", **settings)
    assert "nothing to do: step 4 of 4" in capsys.readouterr().out


@pytest.mark.parametrize("model", SCUNETS)
def test_resuming_cryolvms_runs_equals_never_stopping(tmp_path, atoms, monkeypatch, model):
    unbroken = run(tmp_path / "unbroken", model=model, data=atoms)
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        stopped = run(tmp_path / "parts", model=model, data=atoms)
    assert stopped["training"]["step"] == 2
    assert_same(run(tmp_path / "parts", "--resume", model=model, data=atoms), unbroken)
    if model == "small-sharpen":
        assert unbroken["training"]["plateau"]["last_epoch"] == 4
    assert log_rows(tmp_path / "parts")[-1][:4] == log_rows(tmp_path / "unbroken")[-1][:4]
    name = model.removeprefix("small-")
    prior = checkpoint.load(tmp_path / f"unbroken/{name}.pt", kind="scunet")
    assert (prior.task, prior.box, prior.voxel_size) == (name, 12, 1.0)
    assert (prior.mean, prior.std) == (0.0, 1.0)


def test_a_run_of_an_older_version_resumes_though_flags_are_missing_or_unknown(tmp_path, maps):
    unbroken = run(tmp_path / "a", data=maps)
    run(tmp_path / "b", data=maps, steps=2, decay=0)
    path = tmp_path / "b/checkpoint.pt"
    content = torch.load(path, weights_only=True)
    flags = content["training"]["flags"]
    assert flags.keys() == asdict(SMALL).keys()
    del flags["objective"], flags["tensorboard"], flags["net"]["whole_thousandths"]
    flags["gone"] = 1
    torch.save(content, path)
    resumed = run(tmp_path / "b", "--resume", data=maps)
    assert resumed["training"]["step"] == unbroken["training"]["step"] == 4


def nan_in_step(step, monkeypatch, where):
    """Make the loss ("loss") or only the gradient ("gradient") of a step nan, from 1."""
    rates, losses = train.set_rates, train.losses
    now = []

    def set_rates(opts, n, cfg):
        now[:] = [n + 1]
        return rates(opts, n, cfg)

    def losses_of_step(*args):
        loss, bucket = losses(*args)
        if now == [step]:
            # The slope of a root at 0, times 0, is nan.
            loss = loss * torch.nan if where == "loss" else loss + (0 * loss).sqrt()
        return loss, bucket

    monkeypatch.setattr(train, "set_rates", set_rates)
    monkeypatch.setattr(train, "losses", losses_of_step)


def test_a_gradient_that_is_not_finite_is_not_saved_and_the_checkpoint_before_goes_on(
    tmp_path, maps, monkeypatch
):
    unbroken = run(tmp_path / "unbroken", data=maps)
    with monkeypatch.context() as patch:
        nan_in_step(4, patch, "gradient")
        says = "step 4: each loss is finite, the gradient is not; .*parts/checkpoint.pt is still"
        with pytest.raises(ValueError, match=says):
            run(tmp_path / "parts", data=maps, save_every=2)
    assert checkpoint.read(tmp_path / "parts/checkpoint.pt")["training"]["step"] == 2
    assert_same(run(tmp_path / "parts", "--resume", data=maps), unbroken)


@pytest.mark.parametrize("when", [dict(save_every=3), dict(save_minutes=1e-9)])
def test_a_loss_that_is_not_finite_is_found_before_the_next_checkpoint(
    tmp_path, maps, monkeypatch, when
):
    # The log would look at it after step 4 only.
    nan_in_step(2, monkeypatch, "loss")
    says = "step 2: the loss is not finite in micro-batch 1, items 2 to 3 of the data, on rank 0; "
    with pytest.raises(ValueError, match=says):
        run(tmp_path / "a", data=maps, log_every=100, eval_every=100, **when)
    saved = tmp_path / "a/checkpoint.pt"
    if "save_every" in when:
        assert not saved.exists()
    else:
        assert checkpoint.read(saved)["training"]["step"] == 1


def test_the_last_two_checkpoints_and_every_so_many_steps_one_are_kept(tmp_path, maps):
    kept = run(tmp_path / "a", data=maps, steps=5, save_every=1, keep_every=2)
    steps = {}
    for path in tmp_path.glob("a/checkpoint*.pt"):
        steps[path.stem] = checkpoint.read(path)["training"]["step"]
    names = ("checkpoint", "checkpoint_before", "checkpoint_000002", "checkpoint_000004")
    assert steps == dict(zip(names, (5, 4, 2, 4)))
    # A run that saves only at its end has the same.
    assert_same(kept, run(tmp_path / "b", data=maps, steps=5))


@pytest.mark.parametrize("resumed", ["checkpoint_new.pt", "checkpoint_before.pt"])
def test_the_newest_whole_checkpoint_is_resumed(tmp_path, maps, capsys, resumed):
    run(tmp_path / "a", data=maps, steps=3, decay=0, save_every=1)
    newest, before = tmp_path / "a/checkpoint.pt", tmp_path / "a/checkpoint_before.pt"
    if resumed == "checkpoint_new.pt":  # a kill between writing and renaming leaves this
        os.replace(newest, tmp_path / "a" / resumed)
    else:
        newest.write_bytes(newest.read_bytes()[:-1000])  # as a failing disk leaves it
    run(tmp_path / "a", "--resume", data=maps, decay=0)
    out = capsys.readouterr().out
    assert f"resuming {tmp_path / 'a' / resumed} after step" in out
    assert ("not resumed: " + str(newest) in out) == (resumed == "checkpoint_before.pt")
    # The whole one is not replaced by the damaged one.
    assert checkpoint.read(before)["training"]["step"] == 2
    assert checkpoint.read(newest)["training"]["step"] == 4


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path, maps, monkeypatch):
    def full_disk(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(train_resume.checkpoint, "save", full_disk)
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path / "a", data=maps, steps=50, save_every=1)
    assert len(log_rows(tmp_path / "a")) < 10


def test_a_run_is_neither_overwritten_nor_resumed_by_mistake(tmp_path, maps):
    out = tmp_path / "a"
    with pytest.raises(OSError, match="checkpoint.pt: no checkpoint to resume from"):
        run(out, "--resume", data=maps)
    assert not out.exists()
    run(out, data=maps, steps=1)
    before = (out / "checkpoint.pt").read_bytes()
    with pytest.raises(FileExistsError, match="checkpoint.pt: a run is there; --resume it, or"):
        run(out, data=maps)
    with pytest.raises(ValueError, match="another network, objective or optimiser"):
        run(out, "--resume", data=maps, optimizer="muon")
    with pytest.raises(ValueError, match="another network, objective or optimiser"):
        run(out, "--resume", "--crop=32", data=maps, model="tiny", optimizer="adam")
    assert (out / "checkpoint.pt").read_bytes() == before
    os.replace(out / "prior.pt", out / "checkpoint.pt")
    with pytest.raises(ValueError, match="holds no training state"):
        run(out, "--resume", data=maps)


def test_init_starts_from_averaged_weights_with_a_fresh_optimiser(tmp_path, maps, capsys):
    first = run(tmp_path / "a", data=maps)
    source = tmp_path / "a/checkpoint.pt"
    second = run(tmp_path / "b", data=maps, init=source, steps=1, warmup=0, lr=1e-9, std=0.2)
    for key, value in first["weights"].items():
        got = second["training"]["net"][key]
        torch.testing.assert_close(got, value, rtol=0, atol=1e-8)
    assert second["training"]["optimizers"][0]["param_groups"][0]["step"] == 1
    assert second["training"]["step"] == 1
    out = capsys.readouterr().out
    assert f"starting from {source}" in out
    assert "changed: --std 0.13 -> 0.2" in out and "--mean" not in out

    # --resume comes before --init.
    resumed = run(tmp_path / "b", "--resume", data=maps, init=source, steps=2)
    assert resumed["training"]["optimizers"][0]["param_groups"][0]["step"] == 2
    says = "another network, HDiTConfig.*give the --model it was trained as"
    with pytest.raises(ValueError, match=says):
        run(tmp_path / "c", "--crop=32", data=maps, init=source, model="tiny")
    with pytest.raises(OSError, match="none.pt"):
        run(tmp_path / "c", data=maps, init=tmp_path / "none.pt")


@pytest.mark.parametrize("laws", [("logit-normal", "uniform"), ("logit-normal", "logit-normal")])
def test_init_takes_the_same_sizes_whatever_law_of_times_they_learnt(tmp_path, maps, laws):
    run(tmp_path / "a", data=maps, steps=1, time_law=laws[0])
    init = tmp_path / "a/prior.pt"
    second = run(tmp_path / "b", data=maps, steps=1, time_law=laws[1], init=init)
    assert second["config"]["whole_thousandths"] is (laws[1] == "logit-normal")


def test_what_to_do_after_a_failed_run_is_something_that_works(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    flow = replace(SMALL, out=str(tmp_path))
    assert "--resume it with a lower --lr" in train_resume.what_is_kept(flow)
    # With --patience, --resume refuses another --lr.
    sharpen = replace(SCUNETS["small-sharpen"], out=str(tmp_path))
    assert "new run with --init" in train_resume.what_is_kept(sharpen)


def test_weights_that_are_not_finite_are_never_saved(tmp_path, maps):
    says = r"after step 1 the weights are not finite, or beyond 65504; nothing is saved"
    with pytest.raises(ValueError, match=says):
        run(tmp_path / "new", data=maps, lr=1e30, warmup=0, steps=1)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["log.csv"]

    # The checkpoint before stays.
    run(tmp_path / "a", data=maps, steps=1)
    before = (tmp_path / "a/checkpoint.pt").read_bytes()
    says = r"after step 2 the weights .*/a/checkpoint.pt is still the one of an earlier step"
    with pytest.raises(ValueError, match=says):
        run(tmp_path / "a", "--resume", data=maps, lr=1e30, warmup=0, steps=2)
    assert (tmp_path / "a/checkpoint.pt").read_bytes() == before

    # The next step finds its loss, before anything is saved.
    with pytest.raises(ValueError, match="step 3: the loss is not finite .*/a/checkpoint.pt is"):
        run(tmp_path / "a", "--resume", data=maps, lr=1e30, warmup=0)
    assert (tmp_path / "a/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    "model, setting, value, saved",
    [
        ("small", "weight_decay", 0.3, 0.01),
        ("small", "beta2", 0.9, 0.98),
        ("small-sharpen", "lr", 0.5, 0.01),
        ("small-sharpen", "patience", 0, 1),
        ("small-jepa", "weight_decay", 0, 0.1),
    ],
)
def test_resuming_refuses_a_setting_that_the_optimiser_would_not_see(
    tmp_path, maps, atoms, model, setting, value, saved
):
    data = maps if model == "small" else atoms
    run(tmp_path / "a", model=model, data=data, steps=1)
    flag = "--" + setting.replace("_", "-")
    says = f"{flag} {value} comes too late, the saved optimiser state has {saved}"
    with pytest.raises(ValueError, match=says):
        run(tmp_path / "a", "--resume", model=model, data=data, **{setting: value})


def test_resuming_with_other_micro_batches_says_so(tmp_path, maps, capsys):
    run(tmp_path / "a", data=maps, steps=1)
    run(tmp_path / "a", "--resume", data=maps, steps=2)
    assert "micro-batches" not in capsys.readouterr().out
    run(tmp_path / "a", "--resume", data=maps, steps=3, micro_batch=2)
    assert "changed: micro-batches of 4 crops -> 2; so noise" in capsys.readouterr().out


def cut_step(training):
    training["step"] = "x"


def cut_flags(training):
    del training["flags"]


def cut_weight(training):
    training["net"].popitem()


def cut_moment(training):
    del training["optimizers"][0]["state"][0]["v"]


def cut_moments(training):
    training["optimizers"][0]["state"] = {}


def narrow_moment(training):
    training["optimizers"][0]["state"][0]["m"] = torch.zeros(3)


def cut_rate(training):
    training["optimizers"][0]["param_groups"][0]["lr"] = "x"


def cut_optimizer(training):
    training["optimizers"] = []


DAMAGES = [cut_step, cut_flags, cut_weight, cut_moment, cut_moments]
DAMAGES += [narrow_moment, cut_rate, cut_optimizer]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_training_state_is_refused_in_one_line(tmp_path, maps, damage):
    run(tmp_path / "a", data=maps, steps=1)
    path = tmp_path / "a/checkpoint.pt"
    content = torch.load(path, weights_only=True)
    damage(content["training"])
    torch.save(content, path)
    with pytest.raises(ValueError, match="checkpoint.pt: its training state is damaged") as caught:
        run(tmp_path / "a", "--resume", data=maps, steps=2)
    assert "\n" not in str(caught.value)


def test_a_new_run_never_replaces_a_network_be_it_the_one_it_starts_from(tmp_path, maps):
    run(tmp_path / "a", data=maps, steps=1)
    prior = tmp_path / "b/prior.pt"
    prior.parent.mkdir()
    prior.write_bytes((tmp_path / "a/prior.pt").read_bytes())
    before = prior.read_bytes()
    with pytest.raises(OSError, match="b/prior.pt: exists and would be replaced"):
        run(tmp_path / "b", data=maps, init=prior, steps=1)
    assert prior.read_bytes() == before
    assert [file.name for file in prior.parent.iterdir()] == ["prior.pt"]


def test_two_runs_cannot_share_a_folder(tmp_path, maps):
    out = tmp_path / "a"
    command = [sys.executable, "-c", OWNER, str(Path(train.__file__).parent), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        owner.stdout.readline()
        with pytest.raises(OSError, match=f"a: in use by another run .process {owner.pid} on"):
            run(out, data=maps, steps=1)
        owner.kill()
    run(out, data=maps, steps=1)


def test_fine_tuning_takes_the_encoder_of_pre_training_and_a_decoder_of_its_own(tmp_path, atoms):
    run(tmp_path / "jepa", model="small-jepa", data=atoms, steps=1)
    pretrained = checkpoint.load(tmp_path / "jepa/jepa.pt").net
    cfg = replace(SCUNETS["small-sharpen"], init=str(tmp_path / "jepa/jepa.pt"))
    torch.manual_seed(0)
    net = train_objectives.build(cfg)
    torch.manual_seed(0)
    fresh = SCUNet(cfg.net)
    train_resume.start_from(net, cfg, lambda _: None)
    for name, value in net.encoder.state_dict().items():
        assert torch.equal(value, pretrained.encoder.state_dict()[name])
    for name, value in net.decoder.state_dict().items():
        assert torch.equal(value, fresh.decoder.state_dict()[name])
    assert not torch.equal(fresh.encoder.head.weight, net.encoder.head.weight)

    init = tmp_path / "jepa/jepa.pt"
    run(tmp_path / "sharpen", model="small-sharpen", data=atoms, steps=1, init=init)
    init = str(tmp_path / "sharpen/sharpen.pt")
    for objective in ("superres", "jepa"):
        other = replace(cfg, objective=objective, patience=0, init=init)
        with pytest.raises(ValueError, match=f"fine-tuned for sharpen, not for {objective}"):
            train_resume.start_from(net, other)
    wider = SCUNetConfig(width=16, depths=(1, 1, 1), d_head=4)
    with pytest.raises(ValueError, match="another network"):
        train_resume.start_from(net, replace(cfg, net=wider))


def test_a_networks_file_says_which_percentiles_it_was_trained_with(tmp_path, atoms, capsys):
    flags = dict(model="small-sharpen", data=atoms, steps=1)
    run(tmp_path / "literal", "--literal-percentiles", **flags)
    assert checkpoint.load(tmp_path / "literal/sharpen.pt").percentiles == (1.0, 99.0)
    # A run that starts from it with others says so.
    run(tmp_path / "other", init=tmp_path / "literal/sharpen.pt", **flags)
    assert checkpoint.load(tmp_path / "other/sharpen.pt").percentiles == (0.0, 99.999)
    assert "changed: --literal-percentiles True -> False" in capsys.readouterr().out
