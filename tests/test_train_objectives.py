"""train_objectives.py: data sets, their split into training and held-out parts, batches."""

from dataclasses import replace

import pytest
import torch

import data
import data_chains
import data_prepare
import mrc
import train
import train_objectives
import train_presets

SMALL = replace(train_presets.PRESETS["tiny"], crop=16, crops_per_map=2)

# The alpha carbons of five residues.
LINE = "ATOM  {0:5d}  C   ALA A{0:4d}    {1:8.3f}{2:8.3f}{3:8.3f}  1.00 20.00           C\n"
PDB = "".join(LINE.format(i + 1, 3.8 * i, i % 3, 0) for i in range(5))


def blob(*centre, box=18, sigma=2.5):
    """A Gaussian (box, box, box), its centre in voxels (z, y, x) from the middle."""
    grid = torch.meshgrid(*[torch.arange(box) - box / 2] * 3, indexing="ij")
    squares = sum((a - c) ** 2 for a, c in zip(grid, centre))
    return torch.exp(-squares / (2 * sigma**2))


def write_maps(folder):
    """Three small maps, each of two blobs."""
    for i in range(3):
        density = blob(0, 0, 0) + blob(i, 3, -3, sigma=1.5)
        mrc.write_map(folder / f"emd_{i}.mrc", mrc.Map(density, 1.5))
    return folder


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    return write_maps(tmp_path_factory.mktemp("maps"))


def datasets(path, **changes):
    return train_objectives.datasets(replace(SMALL, data=str(path), **changes))


def test_a_batch_is_shared_out_to_any_number_of_ranks_that_divides_it():
    s = train_presets.PRESETS["s"]  # 128 crops, 2 from each map, at most 16 at once
    shares = {1: (8, 16), 2: (4, 16), 8: (1, 16), 16: (1, 8), 64: (1, 2)}
    assert {world: train_objectives.split_batch(s, world) for world in shares} == shares
    assert train_objectives.split_batch(replace(s, micro_batch=13), 1) == (16, 8)
    for world in (3, 128):
        with pytest.raises(ValueError, match=f"--batch 128 must be a multiple of {world} rank"):
            train_objectives.split_batch(s, world)


def volumes(*numbers):
    return [data.Volume(f"emd_{i}", torch.zeros(1)) for i in numbers]


def test_a_label_is_held_out_or_trained_on_and_never_both():
    entries = volumes(*range(600), *range(400))  # some labels twice
    train, held_out = train_objectives.split(entries)
    assert len(train) + len(held_out) == 1000
    trained = {entry.label for entry in train}
    unseen = {entry.label for entry in held_out}
    assert len(trained | unseen) == 600 and not trained & unseen
    assert len(unseen) == pytest.approx(600 / 20, rel=0.3)


def test_of_a_few_labels_one_is_held_out_and_a_single_one_is_in_both_parts():
    for count in (2, 3, 5):
        parts = train_objectives.split(volumes(*range(count)))
        assert [len(part) for part in parts] == [count - 1, 1]
    single = volumes(0)
    assert train_objectives.split(single) == (single, single)


def test_procedural_structures_differ_between_training_and_held_out_part():
    train, held_out = datasets("procedural")
    assert isinstance(train.entries, data_chains.ProceduralChains)
    assert train.entries.seed != held_out.entries.seed
    first_crop, second_crop = train[0]
    assert not torch.equal(first_crop, second_crop)
    assert datasets("procedural", center_crops=True)[0].box == 16


def test_a_folder_of_maps_becomes_crops_of_maps(maps, capsys):
    train, held_out = datasets(maps)
    assert isinstance(train, data.MapCrops)
    assert "0 maps skipped, 3 read" in capsys.readouterr().out
    labels = sorted(volume.label for volume in train.entries + held_out.entries)
    assert labels == ["emd_0", "emd_1", "emd_2"]
    assert not train.center and datasets(maps, center_crops=True)[0].center


def test_atomic_models_become_simulated_crops(tmp_path, capsys):
    for name in "abc":
        (tmp_path / f"{name}.pdb").write_text(PDB)
    train, held_out = datasets(tmp_path)
    assert isinstance(train, data.SimulatedCrops)
    assert (len(train.entries), len(held_out.entries)) == (2, 1)

    # One structure: other orientations of it are held out.
    capsys.readouterr()
    train, held_out = datasets(tmp_path / "a.pdb")
    assert train.entries == held_out.entries and not torch.equal(train[0], held_out[0])
    says = "1 to train on, 1 held out, the same one in other orientations"
    assert says in capsys.readouterr().out


def test_models_beside_maps_are_not_used_and_that_is_said(maps, capsys):
    (maps / "a.pdb").write_text(PDB)
    (maps / "B.NPZ").write_text("")
    train, _ = datasets(maps)
    assert isinstance(train, data.MapCrops)
    assert "2 models or archives beside the maps are not used" in capsys.readouterr().out


def test_a_restoration_refuses_maps_without_their_models(tmp_path, maps):
    cfg = replace(train_presets.PRESETS["tiny-sharpen"], data=str(maps))
    with pytest.raises(ValueError, match="maps without a pairs.csv"):
        train_objectives.datasets(cfg)
    # A prepared folder holds maps, too, though none is an .mrc.
    (tmp_path / data_prepare.SETTINGS).write_text("{}")
    with pytest.raises(ValueError, match="maps without a pairs.csv"):
        train_objectives.datasets(replace(cfg, data=str(tmp_path)))


def test_more_than_one_map_in_a_hundred_that_cannot_be_read_stops_the_run(tmp_path, maps, capsys):
    content = (maps / "emd_0.mrc").read_bytes()
    for i in range(199):
        (tmp_path / f"emd_{i}.mrc").write_bytes(content)

    # 1 of 200 is skipped and counted.
    (tmp_path / "bad_1.mrc").write_bytes(content[:5000])
    datasets(tmp_path)
    out = capsys.readouterr().out
    assert "1 maps skipped, 199 read" in out and out.count("skipped ") == 1
    assert "bad_1.mrc: truncated" in out

    # 3 of 201 are too many.
    (tmp_path / "bad_2.mrc").write_bytes(content[:5000])
    (tmp_path / "emd_0.mrc").write_bytes(b"")
    says = "3 of 201 maps cannot be used, more than 1 %; .*bad_1.mrc: truncated"
    with pytest.raises(ValueError, match=says):
        datasets(tmp_path)


def test_nothing_to_train_on_is_one_clear_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.mrc").write_bytes(b"junk")
    (tmp_path / "notes.txt").write_text("hello")
    nothing = "nothing to train on; give a folder of maps"
    unusable = "no map can be used, the first: .*a.mrc"
    for path, words in (("empty", nothing), ("bad", unusable), ("notes.txt", nothing)):
        says = f"{path}: {words}"
        with pytest.raises(ValueError, match=says):
            datasets(tmp_path / path)
    with pytest.raises(OSError, match="none: no such file or folder"):
        datasets(tmp_path / "none")


def test_many_raw_maps_are_refused_for_several_ranks_with_the_command_to_type(tmp_path):
    for i in range(17):
        (tmp_path / f"emd_{i}.mrc").touch()
    cfg = replace(SMALL, data=str(tmp_path))
    says = f"17 raw maps.* 2 ranks .*: python data_prepare.py maps {tmp_path} {tmp_path}_prepared "
    with pytest.raises(ValueError, match=says + "--voxel-size 1.5, then --data"):
        train_objectives.refuse_raw_maps(cfg, 2)
    train_objectives.refuse_raw_maps(cfg, 1)
    train_objectives.refuse_raw_maps(replace(cfg, data="procedural"), 2)
    (tmp_path / data_prepare.SETTINGS).write_text("{}")
    train_objectives.refuse_raw_maps(cfg, 2)


@pytest.mark.parametrize("objective", ["jepa", "mae"])
def test_every_held_out_crop_counts_the_same_though_parts_are_unequal(monkeypatch, objective):
    def loss_of_part(net, ema, part, cfg, generator):
        return part.mean()[None], None

    monkeypatch.setattr(train_objectives, "losses", loss_of_part)
    cfg = replace(train_presets.PRESETS[f"tiny-{objective}"], micro_batch=4)
    x = torch.arange(5.0)[:, None].expand(5, 8)[:, None]  # parts of four and of one
    tokens = torch.nn.Identity()
    got = train_objectives.held_out_losses(None, tokens, x, cfg)[0]
    assert got == pytest.approx(2.0)  # the mean of 0 ... 4; that of the parts' means is 2.75


@pytest.mark.parametrize(
    "data, flags, name",
    [
        ("maps", "--resolution-max 5", "--resolution-max"),
        ("maps", "--resolution-min 3", "--resolution-min"),
        ("maps", "--as-deposited 0.5", "--as-deposited"),
        ("maps", "--model jepa --voxel-size 1.5 --resolution-min 3", "--resolution-min"),
        ("procedural", "--cubic", "--cubic"),
        ("procedural", "--no-cubic", "--cubic"),
        ("models", "--cubic", "--cubic"),
        ("models", "--model mae --center-crops", "--center-crops"),
    ],
)
def test_a_flag_that_the_data_do_not_use_is_refused(maps, tmp_path, data, flags, name):
    (tmp_path / "a.pdb").write_text(PDB)
    path = {"maps": str(maps), "models": str(tmp_path), "procedural": "procedural"}[data]
    cfg = train.parse(["--data", path, *flags.split()])
    with pytest.raises(ValueError, match=f"^{name}: training on .* does not use it; drop it"):
        train_objectives.datasets(cfg)

    # Without being typed, what the preset says is no mistake.
    train_objectives.datasets(replace(cfg, typed=()))


@pytest.mark.parametrize("model", ["tiny", "tiny-vae-4", "tiny-lfm-4"])
def test_central_crops_of_simulated_maps_are_for_all_that_generates(model):
    cfg = train.parse(["--model", model, "--data", "procedural", "--center-crops"])
    train_set, _ = train_objectives.datasets(cfg)
    assert train_set.box == cfg.crop


def test_a_network_that_learns_whole_thousandths_says_so():
    for law, whole in (("uniform", False), ("logit-normal", True)):
        with torch.device("meta"):
            net = train_objectives.build(replace(SMALL, time_law=law))
        assert net.config.whole_thousandths is whole


def test_literal_percentiles_reach_simulated_pairs():
    cfg = replace(train_presets.PRESETS["tiny-mae"], crop=24)
    x, literal = (
        train_objectives.datasets(replace(cfg, literal_percentiles=literal))[0][0]
        for literal in (False, True)
    )
    # One voxel in a hundred is saturated, not one in 100,000.
    assert (literal == 1).float().mean() > 0.003 > (x == 1).float().mean()


def test_wedge_pairs_come_from_maps_and_from_models_and_know_their_settings(maps):
    cfg = replace(train_presets.PRESETS["tiny-wedge3d"], crop=12, crops_per_map=2, fill="zeros")
    for where in ("procedural", str(maps)):
        x = train_objectives.datasets(replace(cfg, data=where, voxel_size=1.5))[0][0]
        assert x.shape == (2, 2, 12, 12, 12)
        filled = train_objectives.datasets(replace(cfg, data=where, voxel_size=1.5, fill="pocs"))[
            0
        ][0]
        # The same wanted crops, and other ones in which the wedge was filled in.
        assert torch.equal(x[:, 1], filled[:, 1]) and not torch.equal(x[:, 0], filled[:, 0])


def test_an_augmentation_reaches_the_crops_of_maps_and_is_refused_for_models(maps):
    for augmentation in ("center", "random", "rot24", "so3"):
        train, held_out = datasets(maps, augmentation=augmentation)
        assert train.augmentation == held_out.augmentation == augmentation
    # The only thing that is random about a centre crop is the map.
    centre, _ = datasets(maps, augmentation="center")
    assert len({float(centre[i].sum()) for i in range(10)}) == len(centre.entries)
    with pytest.raises(ValueError, match="--augmentation rot24: for maps"):
        datasets("procedural", augmentation="rot24")
