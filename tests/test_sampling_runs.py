"""What sampling_runs.py promises: the names of all files, before any work."""

from pathlib import Path

import pytest

import sampling_runs
from sampling_runs import default_output, names_of_maps, plan_runs

SUFFIXES = ("", "_half1", "_half2", "_std")


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ("half_1.mrc", "half_2.mrc", "half_mean_denoise.mrc"),
        ("half1.mrc", "half2.mrc", "half_mean_denoise.mrc"),
        ("emd_1234_half_map_1.map.gz", "emd_1234_half_map_2.map.gz",
         "emd_1234_half_map_mean_denoise.mrc"),
        ("run_half1_class001_unfil.mrc", "run_half2_class001_unfil.mrc",
         "run_half_mean_class001_unfil_denoise.mrc"),
        ("job_11.mrc", "job_12.mrc", "job_mean_denoise.mrc"),
        ("x10.mrc", "x20.mrc", "x_mean_denoise.mrc"),
        ("even.mrc", "odd.mrc", "mean_denoise.mrc"),
    ],
)  # fmt: skip
def test_the_name_of_the_mean_of_two_halves_says_so(first, second, expected):
    inputs = [Path("folder") / name for name in (first, second)]
    assert default_output("denoise", inputs) == Path("folder") / expected


def test_the_name_of_a_result_says_what_was_done_to_which_input():
    assert default_output("wedge", [Path("a/in.map.gz")]) == Path("a/in_wedge.mrc")
    assert default_output("generate", []) == Path("generate.mrc")


def test_all_maps_of_a_run_have_the_ending_that_was_asked_for():
    named = names_of_maps(Path("a/gen.map.gz"), ("", "_2"))
    assert named == {"": Path("a/gen.map.gz"), "_2": Path("a/gen_2.map.gz")}


def fill(folder, *file_names):
    for name in file_names:
        (folder / name).write_bytes(b"")


def test_a_folder_of_half_maps_is_a_run_for_every_pair(tmp_path):
    fill(tmp_path, "a_half_1.mrc", "a_half_2.mrc", "b_half-A.mrc", "b_half-B.mrc")
    fill(tmp_path, "a_half_mean_denoise.mrc", "a_half_mean_denoise_half1.mrc")
    fill(
        tmp_path, "a_half_mean_denoise_half2.mrc", "c_half_1.mrc", "mask.mrc", "a_half_1_truth.mrc"
    )
    said = []
    runs = plan_runs("denoise", [tmp_path], None, SUFFIXES, True, said.append)
    found = [[path.name for path in (*run.inputs, run.out)] for run in runs]
    assert found == [
        ["a_half_1.mrc", "a_half_2.mrc", "a_half_mean_denoise.mrc"],
        ["b_half-A.mrc", "b_half-B.mrc", "b_half_mean_denoise.mrc"],
    ]
    assert [line.split(":")[0] for line in said] == [
        str(tmp_path / "c_half_1.mrc"),
        str(tmp_path / "mask.mrc"),
    ]


def test_folders_without_pairs_and_missing_folders_are_refused(tmp_path):
    fill(tmp_path, "half_1.mrc", "map.mrc")
    with pytest.raises(ValueError, match="no pair of half maps"):
        plan_runs("denoise", [tmp_path], None, SUFFIXES, True)
    with pytest.raises(ValueError, match="one folder with pairs"):
        plan_runs("denoise", [tmp_path, tmp_path / "map.mrc"], None, SUFFIXES, True)
    with pytest.raises(ValueError, match="none/: no such folder"):
        plan_runs("wedge", [tmp_path / "map.mrc"], f"{tmp_path}/none/", ("",), False)


def test_a_label_fits_into_a_header_and_names_no_network_where_none_was_used():
    label = sampling_runs.label_of("anisotropic", "prior", Path("long" * 30 + ".pt"), "05a4b1d8ff")
    assert len(label) <= 80 and label.endswith(" 05a4b1d8")
    label = sampling_runs.label_of("wedge", "pocs", Path("hdit.pt"), "05")
    assert label == "cryofm sampling.py wedge pocs"
