"""Claims of checkpoint.py: what was saved comes back, and nothing else passes for a checkpoint."""

import io
import multiprocessing
import os
import pickle
import random
import resource
import time
import zipfile
from pathlib import Path

import pytest
import torch

import checkpoint
from model_hdit import HDiT, HDiTConfig

NET = HDiTConfig(
    depths=(1, 1),
    widths=(24, 48),
    d_head=12,
    kernel_size=3,
    mapping_width=16,
    time_phase="bfloat16",
)
TESTS = Path(__file__).parent
META = dict(voxel_size=1.5, box=16, mean=0.05, std=0.13)


def make_net(seed=0):
    torch.manual_seed(seed)
    net = HDiT(NET)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net


def weights(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


@pytest.mark.parametrize("half", [False, True])
def test_what_was_saved_comes_back(tmp_path, half):
    net = make_net()
    training = dict(
        step=7,
        optimizers=[{"state": {0: {"m": torch.arange(3.0)}}}],
        flags={"net": {"depths": (1, 1)}},
    )
    checkpoint.save(tmp_path / "a.pt", net, **META, half=half, training=training)
    prior = checkpoint.load(tmp_path / "a.pt", kind="hdit")
    assert prior.references is None
    assert prior.net.config == NET
    assert {key: getattr(prior, key) for key in META} == META
    assert prior.training["step"] == 7 and prior.training["flags"] == training["flags"]
    assert torch.equal(prior.training["optimizers"][0]["state"][0]["m"], torch.arange(3.0))
    assert not prior.net.training and not any(p.requires_grad for p in prior.net.parameters())
    for key, value in net.state_dict().items():
        assert prior.net.state_dict()[key].dtype == value.dtype
        assert torch.equal(prior.net.state_dict()[key], value.half().float() if half else value), (
            key
        )
    size = sum(v.numel() * v.element_size() for v in net.state_dict().values())
    assert (
        os.path.getsize(tmp_path / "a.pt") < (0.5 if half else 1) * size + 40_000
    )  # and the archive's names


def test_references_come_back_and_other_tensors_are_refused(tmp_path):
    crops = torch.arange(2 * 8**3).reshape(2, 8, 8, 8).to(torch.uint8)
    path = tmp_path / "a.pt"
    checkpoint.save(path, make_net(), **META, references=crops)
    assert torch.equal(checkpoint.load(path).references, crops)
    for wrong in (crops.float(), crops[0], [1, 2], crops[:1], crops[:, :4], 0 * crops):
        checkpoint.save(path, make_net(), **META, references=wrong)
        refused(path, "damaged, its references cannot be")


def test_percentiles_are_kept_and_older_files_have_those_of_the_release(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, make_net(), **META, percentiles=(1.0, 99.0))
    assert checkpoint.load(path).percentiles == (1.0, 99.0)
    content = checkpoint.read(path)
    del content["percentiles"]
    torch.save(content, path)
    assert checkpoint.load(path).percentiles == (0.0, 99.999)


def test_equal_weights_have_equal_hashes_and_others_do_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        checkpoint.save(tmp_path / name / "prior.pt", make_net(seed), **META)
    a, b, c = (checkpoint.load(tmp_path / name / "prior.pt").sha256 for name in "abc")
    assert a == b != c


def test_a_crash_at_any_byte_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    checkpoint.save(path, make_net(0), **META)
    before = path.read_bytes()

    def die(*_):
        raise KeyboardInterrupt  # no Exception: nothing may hold it up

    def write_half(content, file):
        file.write(before[: len(before) // 2])
        die()

    for name, function in (("torch.save", write_half), ("os.fsync", die), ("os.replace", die)):
        with monkeypatch.context() as patch:
            patch.setattr(name, function)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(path, make_net(1), **META)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_is_written_over(tmp_path):
    checkpoint.save(tmp_path / "a.pt", make_net(), **META)
    before = set(tmp_path.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)  # as kill -9: no clearing up
        patch.setattr("os.replace", lambda *_: None)
        checkpoint.save(tmp_path / "a.pt", make_net(), **META)
    assert len(set(tmp_path.iterdir()) - before) == 1
    checkpoint.save(tmp_path / "a.pt", make_net(), **META)
    assert set(tmp_path.iterdir()) == before


def write_for_ever(path, step):
    torch.set_num_threads(1)
    net = make_net()
    # 4 MB, so that a write takes a while.
    moments = {i: torch.full((100_000,), float(i)) for i in range(10)}
    while True:
        step += 1
        checkpoint.save(path, net, **META, training=dict(step=step, moments=moments))


def test_kill_9_at_any_moment_of_writing_leaves_a_checkpoint_to_resume(tmp_path, monkeypatch):
    # A process that only writes is killed KILLS times. Each goes on where the last was killed.
    kills = int(os.environ.get("KILLS", 30))
    path = tmp_path / "checkpoint.pt"
    rng = random.Random(0)
    step = 0
    torn = 0
    processes = multiprocessing.get_context("forkserver")  # they share one import of torch
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}:{TESTS.parent}")
    processes.set_forkserver_preload(["test_checkpoint"])
    checkpoint.save(path, make_net(), **META, training=dict(step=0))
    for _ in range(kills):
        writer = processes.Process(target=write_for_ever, args=(path, step))
        writer.start()
        before = path.stat().st_mtime_ns
        while path.stat().st_mtime_ns == before:  # it has begun
            assert writer.is_alive()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        writer.kill()
        writer.join()
        torn += any(tmp_path.glob(".checkpoint.pt.*tmp"))  # in the middle of a write
        training = checkpoint.read(path)["training"]
        assert training["step"] > step
        assert all((moment == i).all() for i, moment in training["moments"].items())
        step = training["step"]
    print(f"{kills} kills, {torn} of them inside a write, {step} checkpoints written")
    assert torn > kills / 3
    assert len(list(tmp_path.iterdir())) <= 2


def test_a_full_disk_is_one_clear_line_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, make_net(0), **META)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (100, len(before) // 2, len(before) - 100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # bytes; write() fails beyond
        try:
            with pytest.raises(OSError) as error:
                checkpoint.save(path, make_net(1), **META)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(error.value)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def refused(path, match):
    with pytest.raises(ValueError, match=match) as error:
        checkpoint.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert "allocate" not in str(error.value)  # it did not try to take the memory


def test_junk_is_refused_in_one_line(tmp_path):
    archive, legacy, module = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("a.txt", "hello")
    torch.save({"kind": "hdit"}, legacy, _use_new_zipfile_serialization=False)
    torch.save(make_net(), module)  # a pickled class: weights_only does not load it
    cases = {
        "empty": b"",
        "text": b"hello world\n" * 50,
        "pickle": pickle.dumps({"kind": "hdit"}),
        "zip": archive.getvalue(),
        "legacy": legacy.getvalue(),
        "module": module.getvalue(),
        "npy": b"\x93NUMPY" + bytes(100),
    }
    cases |= {f"random {n}": random.Random(n).randbytes(n) for n in (1, 2, 10, 100, 1000, 10_000)}
    path = tmp_path / "a.pt"
    for content in cases.values():
        path.write_bytes(content)
        refused(path, "not a checkpoint of this project, or a damaged one")
    torch.save({"state_dict": {}}, path)
    refused(path, "a PyTorch file, but not a checkpoint of this project")
    with pytest.raises(OSError, match=str(tmp_path)):
        checkpoint.load(tmp_path)  # a folder
    with pytest.raises(OSError, match="none.pt"):
        checkpoint.load(tmp_path / "none.pt")


def test_a_truncated_or_damaged_checkpoint_is_refused_in_one_line(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, make_net(), **META)
    whole, want = path.read_bytes(), weights(make_net())
    for length in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(path, "a damaged one")
    rng, found = random.Random(0), 0
    for _ in range(100):  # a flipped bit is found, or it was in a gap
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            content = checkpoint.read(path)
        except ValueError as error:
            assert "a damaged one" in str(error)
            found += 1
        else:
            assert all(torch.equal(content["weights"][key], value) for key, value in want.items())
    assert found > 50


def test_another_kind_of_network_is_refused_in_one_line(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    checkpoint.save(path, make_net(), **META)
    with pytest.raises(
        ValueError, match="a.pt: holds a hdit network, wanted is scunet; give another file"
    ):
        checkpoint.load(path, kind="scunet")
    content = checkpoint.read(path)
    for change, match in (
        (dict(config={**content["config"], "depth": 3}), "depth"),
        (dict(config={**content["config"], "widths": (24, 96)}), "size mismatch"),
        (dict(weights={}), "Missing key"),
        (dict(kind="unet"), "not a checkpoint of this project"),
    ):
        torch.save({**content, **change}, path)
        refused(path, match)


@pytest.mark.parametrize(
    "field, value",
    [
        ("weights", None),
        ("weights", {"patch_in.proj.weight": "no tensor"}),
        ("weights", {"patch_in.proj.weight": torch.ones(3, dtype=torch.int64)}),
        ("config", None),
        ("voxel_size", "x"),
        ("voxel_size", float("nan")),
        ("voxel_size", torch.ones(2, 2)),
        ("voxel_size", 0.0),
        ("box", None),
        ("box", 16.0),
        ("box", 10**6),
        ("mean", float("inf")),
        ("std", 0),
        ("std", None),
        ("task", 3),
        ("percentiles", [1]),
        ("percentiles", [99, 1]),
        ("training", [1]),
    ],
)
def test_a_field_of_the_wrong_type_or_value_is_named_in_one_line(tmp_path, field, value):
    path = tmp_path / "a.pt"
    checkpoint.save(path, make_net(), **META)
    torch.save({**checkpoint.read(path), field: value}, path)
    refused(path, f"damaged, its {field} cannot be")


@pytest.mark.parametrize(
    "change",
    [
        {"depths": (10**6, 1)},
        {"depths": (0,) * 10**6, "widths": (24,) * 10**6},
        {"depths": None},
        {"depths": (1.5, 1)},
        {"depths": "ab"},
        {"widths": (12 * 10**6, 12 * 10**6)},
        {"widths": (12 * 10**12, 12 * 10**12)},
        {"widths": (24, -48)},
        {"d_head": 0},
        {"d_head": "x"},
        {"mapping_width": 10**9},
        {"ff_mult": 10**9},
        {"patch_size": 10**4},
        {"patch_size": float("nan")},
        {"time_phase": 3},
    ],
)
def test_an_absurd_config_is_refused_before_it_fills_the_memory(tmp_path, change):
    path = tmp_path / "a.pt"
    checkpoint.save(path, make_net(), **META)
    content = checkpoint.read(path)
    torch.save({**content, "config": {**content["config"], **change}}, path)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, limits[1]))
    try:
        refused(path, "its weights do not fit this version's HDiT")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
