"""What bench.py promises: it reports what it measured, and why it could not. No speed is tested."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import bench_peers


def table_rows(text):
    """The rows of a printed table, by what their second column says."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    names, _, *rows = lines
    return {row[names.index("who")]: dict(zip(names, row, strict=True)) for row in rows}


def test_a_peer_that_cannot_run_leaves_a_dash_and_a_note(monkeypatch, capsys):
    def prepare_broken(problem):
        raise RuntimeError("no such kernel\nand a long story")

    peers = {
        "na3d": bench_peers.prepare_na3d,
        "broken": prepare_broken,
        "slow": bench_peers.prepare_dense,
    }
    monkeypatch.setattr(bench, "PEERS", peers)
    # Pretend that a matrix product runs at 1 TFLOP/s, for the floors.
    monkeypatch.setattr(bench, "ceilings", lambda device, dtype, budget: (1e12, 1e10))
    bench.main(["--only", "attention", "--quick", "--dtype", "float32", "--seconds", "0.00001"])
    text = capsys.readouterr().out

    what = "tiny level 0: 1 x 8^3 x 2 x 64"
    broken_note, slow_note = text.splitlines()[-2:]
    assert broken_note == f"{what}, broken: no such kernel and a long story"
    assert slow_note.startswith(f"{what}, slow: forward+backward takes about ")

    rows = table_rows(text)
    assert float(rows["na3d"]["forward error"]) < 1e-6
    assert float(rows["na3d"]["forward+backward error"]) < 1e-6
    assert rows["broken"]["forward ms"] == "-"
    assert rows["slow"]["forward ms"] != "-"
    assert rows["slow"]["forward+backward ms"] == "-"
    floor_ms = 1e3 * 4 * 8**3 * 343 * 128 / 1e12
    assert math.isclose(float(rows["floor: FLOPs"]["forward ms"]), floor_ms, rel_tol=1e-3)


def test_a_network_runs_in_its_own_process_and_reports_its_own_memory(monkeypatch, capsys):
    ballast = torch.ones(2**28)  # 1 GiB in this process, none in the other
    monkeypatch.setattr(bench, "ceilings", lambda device, dtype, budget: (1e12, 1e10))
    bench.main(["--only", "scunet", "--quick", "--seconds", "0.1", "--dtype", "float32"])
    row = table_rows(capsys.readouterr().out)["tiny"]
    assert row["step"] == "2 x 24^3"
    assert float(row["voxels/s"]) == pytest.approx(2 * 24**3 / float(row["s"]), rel=1e-3)
    assert 0.1 < float(row["peak GiB"]) < 1 <= ballast.nbytes / 2**30


def test_a_network_that_fails_leaves_a_note():
    notes = []
    nowhere = torch.device("meta")  # torch has no autocast for it
    args = SimpleNamespace(model=["tiny"], quick=True, gpu=False, seconds=0.1, device=nowhere)
    assert bench.network_rows("scunet", args, 1e12, notes) == [{"who": "tiny"}]
    assert len(notes) == 1 and notes[0].startswith("scunet, tiny: ") and "meta" in notes[0]


def test_what_the_hardware_cannot_do_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--gpu: torch finds no CUDA"):
        bench.parse(["--gpu"])
    monkeypatch.setattr(bench.flow, "has_bf16", lambda device: False)
    with pytest.raises(ValueError, match="--dtype bfloat16"):
        bench.parse(["--dtype", "bfloat16"])
    assert bench.parse([]).dtype == torch.float32


def test_a_run_on_a_gpu_fills_every_row_of_results_md_that_has_a_dash(monkeypatch, capsys):
    # Rows of the table of attentions whose NATTEN column is empty.
    text = (Path(bench.__file__).parent / "RESULTS.md").read_text()
    table = text.split("| NATTEN |")[1].split("\n\n")[0]
    lacking = [line.split("|")[1].strip() for line in table.splitlines() if "| - |" in line]
    names = list(bench.RESULTS_ROWS)
    assert len(lacking) == len(names)
    assert all(row.startswith(name) for row, name in zip(lacking, names))

    # A run with --gpu measures all of them. The device "meta" makes no numbers.
    args = dict(gpu=True, quick=False, model=["tiny", "s", "l"], device="meta")
    problems = bench.problems(SimpleNamespace(**args, dtype=torch.bfloat16))
    assert set(bench.RESULTS_ROWS.values()) <= {problem.name for problem in problems}

    # What it prints: times of na3d, ratios of the peers, a dash for what could not run.
    shape = bench.RESULTS_ROWS[names[0]]
    ours = {"shape": shape, "who": "na3d", "forward ms": 2.0, "forward+backward ms": 7.0}
    natten = {"shape": shape, "who": "NATTEN", "forward / na3d": 1.5}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(bench.flow, "has_bf16", lambda device: True)
    monkeypatch.setattr(bench, "ceilings", lambda device, dtype, budget: (1e12, 1e10))
    monkeypatch.setattr(bench, "attention_rows", lambda *_: [ours, natten])
    bench.main(["--gpu", "--only", "attention"])
    text = capsys.readouterr().out.split("for RESULTS.md, Speed (a GPU)")[1]
    lines = text.strip().splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [names[0], "2 / 7", "- / -", "- / -", "- / -", "1.5 / -", "- / -"]
    assert len(lines) == 2 + len(names)
