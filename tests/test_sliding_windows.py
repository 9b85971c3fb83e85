"""What sampling.py promises of CryoLVM's fine-tuned network: the fusion of tiles, and its three tasks as programs."""
import itertools
import json
import os
import sys
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from mrcfile.dtypes import HEADER_DTYPE
from test_sampling import close, fft, filtered, molecule, names, random, values, wedge, write_mrc
from torch import nn

import checkpoint
import fourier
import fsc
import mrc
import posterior
import sampling
import sliding_windows
import volume
from checkpoint import Prior
from model_hdit import HDiT, HDiTConfig
from model_scunet import SCUNet, SCUNetConfig

# ---- Fusion ----------------------------------------------------------------------------------------------------------------

class Uneven(nn.Module):
    """Its answer depends on the place within the tile and on all of the tile."""
    def forward(self, x):
        place = torch.linspace(-1, 2, x[0].numel()).view(x.shape[1:])
        return x.square() * place + x.mean((1, 2, 3, 4), keepdim=True)


def dense(net, x, box, stride, fusion):
    """Algorithm 1 of CryoLVM in float64, voxel by voxel and tile by tile."""
    corners = lambda n: sorted({min(i, n - box) for i in range(0, n, stride)})
    middle, sigma = (box - 1) / 2, box / 4
    d2 = sum((axis - middle) ** 2 for axis in np.indices((box,) * 3))
    w = np.exp(-d2 / (2 * sigma ** 2))
    w = 1 + 2 * (w - w.min()) / (w.max() - w.min()) if fusion == "gaussian" else np.ones_like(w)
    V, S = np.zeros(x.shape), np.zeros(x.shape)
    for z, y, u in itertools.product(*map(corners, x.shape)):
        part = np.s_[z:z + box, y:y + box, u:u + box]
        V[part] += w * net(x[part][None, None].double())[0, 0].numpy()
        S[part] += w
    return torch.from_numpy(V / S)


@pytest.mark.parametrize("fusion", ["gaussian", "mean"])
@pytest.mark.parametrize("shape, box, stride", [((8, 8, 8), 8, 2), ((9, 13, 16), 8, 3), ((11, 8, 10), 8, 8), ((13, 9, 12), 7, 4)])
def test_fusion_equals_the_dense_sum_of_algorithm_1(shape, box, stride, fusion):
    x = random(shape)
    fused = sliding_windows.sliding_windows(Uneven(), x, box, stride, fusion)
    assert close(fused, dense(Uneven(), x, box, stride, fusion))


@pytest.mark.parametrize("fusion", ["gaussian", "mean"])
@pytest.mark.parametrize("shape", [(8, 8, 8), (5, 6, 7), (1, 8, 19), (16, 3, 9), (13, 17, 21)])
def test_the_identity_gives_back_any_map(shape, fusion):
    x = random(shape)
    assert close(sliding_windows.sliding_windows(nn.Identity(), x, 8, 2, fusion), x, 1e-6)


def test_a_map_smaller_than_the_box_is_seen_with_solvent_around_it():
    x, seen = random((3, 8, 5)), []
    out = sliding_windows.sliding_windows(lambda tiles: (seen.append(tiles), Uneven()(tiles))[1], x, 8, 2)
    wanted = torch.zeros(8, 8, 8)
    wanted[3:6, :, 2:7] = x                                     # voxel n // 2 in the middle, 4
    assert len(seen) == 1 and torch.equal(seen[0][0, 0], wanted)
    assert close(out, Uneven()(wanted[None, None])[0, 0, 3:6, :, 2:7])


def test_nothing_depends_on_how_many_tiles_share_a_call_and_none_goes_alone():
    torch.manual_seed(0)
    net, x, sizes = SCUNet(SMALL).eval(), random((12, 20, 17)).clamp(0, 1), []
    counted = lambda tiles: (sizes.append(len(tiles)), net(tiles))[1]
    one, two, eight, all_ = (sliding_windows.sliding_windows(counted, x, 12, 4, tiles_per_call=n) for n in (1, 2, 8, 99))
    assert sizes == [1] * 9 + [1, 2, 2, 2, 2] + [4, 5] + [9]    # 1 * 3 * 3 tiles
    assert close(one, all_) and close(two, all_) and close(eight, all_)


def resident():
    """Bytes of memory that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc/self/statm (Linux)")
def test_tiles_do_not_pile_up_in_memory():
    x, held = torch.ones(96, 64, 64), []                        # 12^2 * 23 tiles of 108 KiB: 350 MiB; a map: 1.5 MiB
    sliding_windows.sliding_windows(nn.Identity(), x[:30, :30, :30], 30, 3)
    before = resident()
    sliding_windows.sliding_windows(lambda tiles: (held.append(resident()), tiles + 0)[1], x, 30, 3)
    assert len(held) > 300 and max(held) - before < 64 * 2 ** 20


# ---- The programs, with a network of which the answer is known ---------------------------------------------------------------

SMALL = SCUNetConfig(width=16, depths=(1, 1, 2, 1, 1), d_head=8)
VOXEL_SIZE = {"sharpen": 1.0, "superres": 1.0, "wedge": 4.0}


@pytest.fixture(scope="module", autouse=True)
def without_matplotlib():                                       # drawing takes longer than everything else
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        yield


@pytest.fixture
def run(monkeypatch):
    """The program with --task, and in place of its network another one, of tiles of 12^3 voxels."""
    def start(task, *argv, net=nn.Identity()):
        prior = Prior(net=net, kind="scunet", voxel_size=VOXEL_SIZE[task], box=12, mean=0, std=1, sha256="", task=sampling.FINE_TUNED[task])
        monkeypatch.setattr(checkpoint, "load", lambda *_, **__: prior)
        return sampling.main([str(a) for a in ("--task", task, "--model", "scunet", "--device", "cpu", *argv)])
    return start


def clipped(x, percentile=99.999):
    return x.clamp(0, float(np.percentile(x.numpy(), percentile)))


@pytest.mark.parametrize("shape, axes", [((13, 10, 15), (2, 3, 1)), ((16, 12, 14), (1, 2, 3))])
def test_sharpening_by_the_identity_clips_the_map_and_keeps_header_and_grey_scale(tmp_path, run, shape, axes):
    y = 50 * molecule(shape, (1.0,) * 3) + random(shape)
    source, out = write_mrc(tmp_path / "in.mrc", y, (1.0,) * 3, axes), tmp_path / "in_sharpen.mrc"
    assert run("sharpen", source) == 0
    assert close(values(out), clipped(y), 1e-6) and mrcfile.validate(out)
    with mrcfile.open(source) as a, mrcfile.open(out) as b:
        assert b.data.dtype == np.float32
        for name in set(HEADER_DTYPE.names) - {"dmin", "dmax", "dmean", "rms"}:
            assert a.header[name].tobytes() == b.header[name].tobytes(), name
    run("sharpen", source, "--percentile", 90, "-o", tmp_path / "90.mrc")
    assert close(values(tmp_path / "90.mrc"), clipped(y, 90), 1e-6)
    report = json.loads((tmp_path / "in_sharpen.json").read_text())
    assert (report["stride"], report["fusion"], report["percentile"], report["box"]) == (12, "gaussian", 99.999, list(shape))


def test_the_network_sees_its_own_voxel_size_and_values_from_0_to_1(tmp_path, run):
    y, seen = 7 * molecule((12, 12, 12), (2.0,) * 3) - 0.5, []
    for name, unit in (("in", 1), ("big", 1024)):               # a power of two: the same rounding everywhere
        write_mrc(tmp_path / f"{name}.mrc", unit * y, (2.0,) * 3)
        run("sharpen", tmp_path / f"{name}.mrc", "--stride", 12, net=lambda tiles: (seen.append(tiles), 1 - tiles)[1])
    fine = clipped(fourier.resample(y, (24, 24, 24)))
    top = float(fine.max())
    corners = list(itertools.product((0, 12), repeat=3))
    first, second = torch.cat(seen)[:, 0].chunk(2)
    assert torch.equal(first, second) and close(first, volume.cut_tiles(fine / top, corners, 12))
    assert close(values(tmp_path / "in_sharpen.mrc"), fourier.resample(top - fine, (12, 12, 12)))
    assert torch.equal(values(tmp_path / "big_sharpen.mrc"), 1024 * values(tmp_path / "in_sharpen.mrc"))
    assert mrc.read_map(tmp_path / "in_sharpen.mrc").voxel_size == (2.0,) * 3


@pytest.mark.parametrize("flags, stride, fusion", [((), 12, "gaussian"), (("--stride", 5, "--fusion", "mean"), 5, "mean")])
def test_every_12_voxels_and_the_gaussian_unless_flags_say_otherwise(tmp_path, run, flags, stride, fusion):
    y = molecule((16, 13, 12), (1.0,) * 3)
    run("sharpen", write_mrc(tmp_path / "in.mrc", y, (1.0,) * 3), *flags, net=Uneven())
    top = float(clipped(y).max())
    assert close(values(tmp_path / "in_sharpen.mrc"), top * dense(Uneven(), clipped(y) / top, 12, stride, fusion))


@pytest.mark.parametrize("voxel_size, side, networks", [(1.5, 16, 24), (2.0, 13, 26), (1.0, 13, 13), (0.5, 26, 13)])
def test_super_resolution_stays_on_the_networks_grid_if_that_is_the_finer_one(tmp_path, run, voxel_size, side, networks):
    y = molecule((side,) * 3, (voxel_size,) * 3)
    source = write_mrc(tmp_path / "in.mrc", y, (voxel_size,) * 3)
    run("superres", source)
    before, after, finer = mrc.read_map(source), mrc.read_map(tmp_path / "in_superres.mrc"), max(side, networks)
    assert after.density.shape == (finer,) * 3 and mrcfile.validate(tmp_path / "in_superres.mrc")
    assert after.voxel_size == pytest.approx([v * side / finer for v in before.voxel_size])
    first = lambda m: [o + n * v for o, n, v in zip(m.origin, m.nstart, m.voxel_size)]
    assert first(after) == pytest.approx(first(before))
    assert close(after.density, fourier.resample(clipped(fourier.resample(y, (networks,) * 3)), (finer,) * 3), 2e-6)
    run("sharpen", source)
    assert values(tmp_path / "in_sharpen.mrc").shape == (side,) * 3


def test_super_resolution_is_scored_on_the_grid_of_the_truth_and_masked_on_its_own(tmp_path, run):
    y, truth = molecule((12, 12, 12), (2.0,) * 3, 5.0), molecule((24, 24, 24), (1.0,) * 3)
    source = write_mrc(tmp_path / "in.mrc", y, (2.0,) * 3)
    for voxel_size, there in ((1.0, truth), (2.0, fourier.resample(truth, (12,) * 3))):
        write_mrc(tmp_path / "truth.mrc", there, (voxel_size,) * 3)
        run("superres", source, "--truth", tmp_path / "truth.mrc", "--overwrite")
        report = json.loads((tmp_path / "in_superres.json").read_text())
        assert report["truth_voxel_size"] == [voxel_size] * 3 and report["voxel_size"] == [1.0] * 3
        for name, x in (("restored", values(tmp_path / "in_superres.mrc")), ("input", y)):
            curve = fsc.fsc(fourier.resample(x, there.shape), there)
            assert report["fsc"][name]["auc"] == pytest.approx(float(fsc.auc(curve)), abs=1e-5)
            assert report["fsc"][name]["fsc_05"] == pytest.approx(float(fsc.resolution(curve, voxel_size, 0.5)), rel=1e-4)
    mask = torch.ones(12, 12, 12)
    mask[0] = 0.5
    run("superres", source, "--mask", write_mrc(tmp_path / "mask.mrc", mask, (2.0,) * 3), "--overwrite", net=torch.zeros_like)
    soft, fine = fourier.resample(mask, (24,) * 3).clamp(0, 1), fourier.resample(y, (24,) * 3)
    assert close(values(tmp_path / "in_superres.mrc"), (1 - soft) * fine)


@pytest.mark.parametrize("voxel_size, side", [(4.0, 16), (3.0, 16), (5.0, 14)])
def test_a_wedge_is_filled_by_the_network_from_the_filtered_map_and_what_was_measured_stays(tmp_path, run, capsys, voxel_size, side):
    shape, size, seen = (side,) * 3, (voxel_size,) * 3, []
    truth, measured = molecule(shape, size, 10.0), wedge(shape, (-50, 60))
    y = 9 * (filtered(truth, measured) + 0.05 * random(shape))                  # noise in the wedge, too
    source = write_mrc(tmp_path / "in.mrc", y, size)
    write_mrc(tmp_path / "in_truth.mrc", truth, size)
    run("wedge", source, "--tilt-range", -50, 60, "--stride", 12,
        net=lambda tiles: (seen.append(tiles), tiles.clamp(max=0.5))[1])
    n = round(side * voxel_size / 4)
    k = torch.fft.fftfreq(n) * n
    held = k.abs() < side / 2 if side < n else k == k           # by the map's own grid
    known = wedge((n,) * 3, (-50, 60)) & held[:, None, None] & held[:, None] & held
    shown = clipped(filtered(fourier.resample(y, (n,) * 3), known))
    network = fourier.resample(shown.clamp(max=0.5 * float(shown.max())), shape)
    assert close(seen[0][0, 0], volume.pad(shown / shown.max(), 12)[:12, :12, :12])
    assert close(values(tmp_path / "in_wedge_network.mrc"), network)
    x = fft(values(tmp_path / "in_wedge.mrc"))
    assert close(x[measured], fft(y)[measured])
    if n == side:
        assert close(x[~measured], fft(network)[~measured])
    report = json.loads((tmp_path / "in_wedge.json").read_text())
    assert list(report["fsc"]) == ["input", "POCS", "restored", "network"] and report["fsc"]["restored"]["auc_missing"] > 0
    printed = capsys.readouterr().out
    assert all(f"{name:27} {v['auc']:8.3f}" in printed for name, v in report["fsc"].items())


def test_a_wedge_keeps_the_detail_that_the_networks_grid_cannot_hold_from_pocs(tmp_path, run):
    shape, size = (32, 32, 32), (2.0,) * 3                      # Nyquist 4 Å; the network's 8 Å
    measured = wedge(shape)
    y = filtered(molecule(shape, size, 5.0), measured)
    run("wedge", write_mrc(tmp_path / "in.mrc", y, size))
    kz, ky, kx = fourier.freq_grid(shape)
    beyond = ~measured & ((kz.abs() > 0.25) | (ky.abs() > 0.25) | (kx.abs() > 0.25))
    assert close(fft(values(tmp_path / "in_wedge.mrc"))[beyond], fft(posterior.pocs(y, measured))[beyond], 1e-3)


# ---- The programs, with networks from files ------------------------------------------------------------------------------------

@pytest.fixture
def ckpt(tmp_path):
    """ckpt(task): a file with a random network, fine-tuned for nothing, that says it was trained for the task."""
    def write(task):
        torch.manual_seed(0)
        path = tmp_path / f"{task}.pt"
        checkpoint.save(path, SCUNet(SMALL), voxel_size=4.0 if task == "wedge3d" else 1.0, box=12, mean=0, std=1, task=task)
        return path
    return write


@pytest.mark.parametrize("task, trained", sampling.FINE_TUNED.items())
def test_a_map_of_one_tile_becomes_what_its_network_makes_of_it(tmp_path, ckpt, task, trained):
    size = (VOXEL_SIZE[task],) * 3
    y = 3 * filtered(molecule((12, 12, 12), size, 3 * size[0]), wedge((12, 12, 12)))
    source, path = write_mrc(tmp_path / "in.mrc", y, size), ckpt(trained)
    model = ("--model", "scunet") if task == "wedge" else ()
    assert sampling.main([str(a) for a in ("--task", task, *model, "--ckpt", path, "--device", "cpu", source)]) == 0
    net, top = checkpoint.load(path).net, float(clipped(y).max())
    wanted = top * net(clipped(y)[None, None] / top)[0, 0]
    assert close(values(tmp_path / f"in_{task}{'_network' * (task == 'wedge')}.mrc"), wanted)
    report = json.loads((tmp_path / f"in_{task}.json").read_text())
    assert report["checkpoint_sha256"] == checkpoint.load(path).sha256 and report["settings"]["model"] == "scunet"


def hdit(folder):
    checkpoint.save(folder / "hdit.pt", HDiT(HDiTConfig(depths=(1, 1), widths=(24, 48), d_head=12, patch_size=4)), voxel_size=1.5,
                    box=16, mean=0.04, std=0.09)
    return folder / "hdit.pt"


BAD = {                                                         # what is wrong: the command line, what the message says
    "pre-trained only": lambda d, ckpt: (("--task", "sharpen", "--ckpt", ckpt("jepa")), "jepa.pt: trained for jepa, --task sharpen needs sharpen"),
    "another task": lambda d, ckpt: (("--task", "superres", "--ckpt", ckpt("sharpen")), "sharpen.pt: trained for sharpen, --task superres"),
    "another wedge": lambda d, ckpt: (("--model", "scunet", "--ckpt", ckpt("superres")), "superres.pt: .*--task wedge needs wedge3d"),
    "a flow prior": lambda d, ckpt: (("--task", "sharpen", "--ckpt", hdit(d)), "hdit.pt: holds a hdit network, this task needs scunet"),
    "not a flow prior": lambda d, ckpt: (("--ckpt", ckpt("wedge3d")), "wedge3d.pt: holds a scunet network, this task needs hdit"),
    "scunet denoises": lambda d, ckpt: (("--task", "generate", "--model", "scunet"), "--model scunet has not learnt --task generate"),
    "hdit sharpens": lambda d, ckpt: (("--task", "sharpen", "--model", "hdit"), "--model hdit has not learnt --task sharpen"),
    "another axis": lambda d, ckpt: (("--model", "scunet", "--tilt-axis", "x"), "--tilt-axis x: scunet has learnt wedges about y"),
    "stride": lambda d, ckpt: (("--task", "sharpen", "--ckpt", ckpt("sharpen"), "--stride", 13), "in.mrc: tiles of 12 voxels every 13"),
    "no stride": lambda d, ckpt: (("--task", "sharpen", "--ckpt", ckpt("sharpen"), "--stride", 0), "in.mrc: tiles of 12 voxels every 0"),
    "percentile": lambda d, ckpt: (("--task", "sharpen", "--percentile", 0), "--percentile 0"),
    "no POCS": lambda d, ckpt: (("--task", "sharpen", "--method", "pocs"), "--method pocs is no answer to --task sharpen"),
    "no algorithm": lambda d, ckpt: (("--model", "scunet", "--method", "paper"), "--method paper is no answer to --task wedge"),
    "dark protein": lambda d, ckpt: (("--task", "sharpen", "--ckpt", ckpt("sharpen"), write_mrc(d / "dark.mrc", -1 - molecule((9, 9, 9)))),
                                     "dark.mrc.*multiply"),
    "truth": lambda d, ckpt: (("--task", "superres", "--ckpt", ckpt("superres"), "--truth", write_mrc(d / "t.mrc", molecule((9, 9, 9)))),
                              r"t.mrc: \(9, 9, 9\) voxels, but .*in.mrc has \(12, 12, 12\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line_and_leaves_no_file(tmp_path, ckpt, case):
    source = write_mrc(tmp_path / "in.mrc", molecule((12, 12, 12)))
    argv, words = BAD[case](tmp_path, ckpt)
    if not any(str(a).endswith("dark.mrc") for a in argv):
        argv = (*argv, source)
    before = names(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        sampling.main([str(a) for a in ("--device", "cpu", *argv)])
    assert "\n" not in str(error.value) and names(tmp_path) == before


def test_a_folder_is_restored_from_its_inputs_alone(tmp_path, run):
    write_mrc(tmp_path / "in.mrc", filtered(molecule((12, 12, 12), (4.0,) * 3, 10.0), wedge((12, 12, 12))), (4.0,) * 3)
    for _ in range(2):                                          # the second time it holds results, too
        run("wedge", tmp_path, "--overwrite")
    assert {n for n in names(tmp_path) if n.endswith(".mrc")} == {"in.mrc", "in_wedge.mrc", "in_wedge_network.mrc"}


def test_a_report_that_exists_stays_as_its_map_does(tmp_path, run):
    source = write_mrc(tmp_path / "in.mrc", molecule((12, 12, 12)))
    run("sharpen", source)
    (tmp_path / "in_sharpen.mrc").unlink()
    with pytest.raises(ValueError, match="in_sharpen.json: exists.*--overwrite"):
        run("sharpen", source)
    assert names(tmp_path) == ["in.mrc", "in_sharpen.json"]
