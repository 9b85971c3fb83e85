"""What bench.py promises: that it counts, compares and reports the same thing. No speed is tested."""
import csv
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import natten3d


def tensors(grid, n=2, d=16, seed=0):
    """q, k, v that want gradients, and a gradient for the output, float64."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(2, *grid, n, d, generator=rng, dtype=torch.float64).requires_grad_(i < 3) for i in range(4)]


def test_useful_flops_are_the_products_of_the_plain_reference():
    q, k, v, g = tensors((3, 4, 5))
    with FlopCounterMode(display=False) as counter:
        out = natten3d.na3d(q, k, v, 3, backend="reference")
        forward = counter.get_total_flops()
        out.backward(g)
    counted = bench.useful_flops(q, (3, 3, 3))
    assert counted["forward"] == forward
    assert counted["forward+backward"] == counter.get_total_flops() + forward / 2      # S = q k is taken twice


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("grid, kernel", [((8, 8, 8), (7, 7, 7)), ((4, 8, 16), (3, 7, 5))])
def test_peers_and_the_float64_truth_compute_one_thing(grid, kernel, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)       # the same mask, no C++ to build
    q, k, v, g = tensors(grid)
    out = natten3d.na3d(q, k, v, kernel, backend="reference")
    want = [t[0, ..., 0, :] for t in (out.detach(), *torch.autograd.grad(out, (q, k, v), g))]
    for got, expected in zip(bench.exact(*(t[0, ..., 0, :] for t in (q, k, v, g)), kernel), want, strict=True):
        torch.testing.assert_close(got, expected)
    q, k, v = (t.detach() for t in (q, k, v))            # flex_attention has no backward pass on a CPU
    for who in ("na3d", "dense SDPA with a mask", "flex, raster order", "flex, tiles of 4x4x8"):
        torch.testing.assert_close(bench.WHO[who](grid, kernel, q)(q, k, v), out.detach(), msg=lambda m: f"{who}: {m}")


def test_a_reason_stands_where_a_peer_cannot_run(monkeypatch, tmp_path, capsys):
    def broken(grid, kernel, q):
        raise RuntimeError("no such kernel\nand a long story")
    monkeypatch.setattr(bench, "WHO", {"na3d": bench.ours, "broken": broken, "slow": bench.dense})
    bench.main(["--only", "attention", "--quick", "--seconds", "0.001", "--csv", str(tmp_path / "new/bench.csv")])
    broken_note, slow_note = capsys.readouterr().out.splitlines()[-2:]
    assert broken_note == "quick: 1 x 16^3 x 1 x 32, broken: no such kernel"
    assert slow_note.startswith("quick: 1 x 16^3 x 1 x 32, slow, backward: about ") and slow_note.endswith("s a call (--seconds)")
    rows = {(r["who"], r["quantity"]): r["value"] for r in csv.DictReader(open(tmp_path / "new/bench.csv"))}
    assert float(rows["na3d", "output error"]) < 1e-6 and float(rows["na3d", "gradient error"]) < 1e-6
    assert rows["broken", "forward ms"] == "" and rows["slow", "forward+backward ms"] == ""
    floor = 4 * 16**3 * 343 * 32 / float(rows["float32", "FLOP/s"])
    assert math.isclose(float(rows["floor: FLOPs", "forward ms"]), 1e3 * floor)
    assert float(rows["na3d", "forward ms"]) > 1e3 * floor


def test_a_heavy_item_runs_in_a_process_of_its_own_and_reports_its_own_memory(tmp_path, capsys):
    ballast = torch.ones(2**28)                          # 1 GiB in this process, none of the child's business
    bench.main(["--only", "scunet", "--quick", "--seconds", "0.1", "--dtype", "float32", "--csv", str(tmp_path / "bench.csv")])
    rows = {r["quantity"]: float(r["value"]) for r in csv.DictReader(open(tmp_path / "bench.csv")) if r["part"] == "scunet"}
    assert rows["voxels/s"] == pytest.approx(2 * 24**3 / rows["s"])
    assert 0.1 < rows["peak GiB"] < 1 <= ballast.nbytes / 2**30
    assert "| 2 x 24^3 | tiny |" in capsys.readouterr().out


def test_what_the_hardware_cannot_do_is_an_error():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--gpu: torch finds no CUDA"):
            bench.parse(["--gpu"])
    if not bench.flow.has_bf16(torch.device("cpu")):
        with pytest.raises(ValueError, match="--dtype bfloat16"):
            bench.parse(["--dtype", "bfloat16"])
