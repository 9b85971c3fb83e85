"""train_dry_run.py: what a run would cost."""

import re

import pytest

import train
import train_dry_run
import train_presets
from model_hdit import HDiT


# In 1e9, counted on the authors' release.
@pytest.mark.parametrize("name, box, want", [("s", 64, 410.67), ("l", 128, 458.09)])
def test_multiply_adds_are_those_counted_on_the_release(name, box, want):
    count = train_dry_run.multiply_adds(train_presets.PRESETS[name].net, box)
    assert count / 1e9 == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("model", ["tiny", "tiny-jepa"])
def test_a_dry_run_takes_one_step_says_what_a_run_costs_and_writes_nothing(tmp_path, capsys, model):
    flags = {"--model": model, "--crop": "24", "--out": str(tmp_path / "a")}
    train.main([part for item in flags.items() for part in item] + ["--dry-run"])
    out = capsys.readouterr().out
    assert not (tmp_path / "a").exists()
    assert "micro-batch of 1 stands for all" in out
    assert re.search(r"loss \d\.\d{4}, \d+\.\d\d s, peak", out)
    assert re.search(r"so a step of 16 takes [\d.,]+ s here, [\d,]+ steps [\d.]+ days", out)
    if model == "tiny":
        net = HDiT(train_presets.PRESETS["tiny"].net)
        parameters = sum(p.numel() for p in net.parameters())
        assert f"{parameters:,} parameters" in out
        assert f"{20 * parameters / 2**30:.1f} GiB for weights" in out


def test_a_dry_run_refuses_an_init_that_is_not_there_and_a_resume():
    with pytest.raises(OSError, match="nope"):
        train.main(["--dry-run", "--init", "nope"])
    with pytest.raises(ValueError, match="--dry-run --resume"):
        train.main(["--dry-run", "--resume"])


def test_under_torchrun_a_dry_run_counts_all_ranks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    train.main(["--dry-run", "--model", "tiny", "--crop", "24"])
    out = capsys.readouterr().out
    step = float(re.search(r"loss [\d.]+, ([\d.]+) s, peak", out)[1])
    took = float(re.search(r"so a step of 16 takes ([\d.]+) s on 4 ranks like this one", out)[1])
    # Each rank takes 4 of 16 crops, and the step above was of one.
    assert took == pytest.approx(4 * step, abs=0.1)
    assert "with --micro-batch 4," in out


def test_under_torchrun_one_rank_is_enough_for_a_dry_run(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train, "dry_run", None)  # a call would be an error
    train.main(["--dry-run"])
