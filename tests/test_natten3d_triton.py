"""What natten3d_triton.py promises. The oracle is that of test_natten3d.py.

The kernels run on a GPU, or with TRITON_INTERPRET=1 on a CPU. They are compiled without a GPU.
"""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_natten3d import assert_close, leaves, make_inputs, run_dense, run_na3d, sees

import natten3d
import natten3d_triton

ROOT = Path(__file__).parent.parent
NO_TRITON = importlib.util.find_spec("triton") is None
if torch.cuda.is_available():
    DEVICE = "cuda"
elif natten3d_triton.INTERPRETED:
    DEVICE = "cpu"
else:
    DEVICE = None
needs_triton = pytest.mark.skipif(NO_TRITON, reason="needs triton (pip install triton)")
needs_nvidias_triton = pytest.mark.skipif(
    NO_TRITON or importlib.util.find_spec("triton.backends.nvidia") is None,
    reason="needs triton with its NVIDIA compiler (pip install triton)",
)
needs_gpu_or_interpreter = pytest.mark.skipif(
    DEVICE is None, reason="needs a GPU or TRITON_INTERPRET=1"
)


@pytest.mark.parametrize("rows_are_keys", [False, True])
@pytest.mark.parametrize("grid, kernel", [((2, 5, 9), (1, 3, 7)), ((1, 9, 4), (1, 7, 3))])
def test_tables_hold_every_pair_once(grid, kernel, rows_are_keys):
    by_query, by_key = natten3d.token_tables(grid, kernel, torch.device("cpu"))
    row, column, columns = by_key if rows_are_keys else by_query
    T = grid[0] * grid[1] * grid[2]
    found = torch.zeros(T, T, dtype=torch.int64)
    for tile in range(len(row)):
        i, row_bits = row[tile, :, row[tile, 0] >= 0]
        j, column_bits = column[tile, :, : columns[tile]]
        found[i[:, None], j] += (row_bits[:, None] & column_bits) == row_bits[:, None]
    expected = sees(grid, kernel).T if rows_are_keys else sees(grid, kernel)
    assert torch.equal(found, expected.long())


def test_the_file_can_be_imported_without_triton():
    program = "import sys; sys.modules['triton'] = None; import natten3d_triton"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@needs_nvidias_triton
@pytest.mark.parametrize("architecture, shared_kib", [(80, 163), (90, 227), (100, 227)])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(architecture, shared_kib, tmp_path):
    # In a new process, because Triton reads TRITON_INTERPRET when it is imported.
    table = tmp_path / "compiled.csv"
    command = [sys.executable, "tests/benchmark_compile.py", "--csv", table, "--workers", "1"]
    command += ["--architectures", str(architecture), "--dtypes", "bf16", "--one", "64", "4", "2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kernel"] for row in rows] == ["forward_kernel", "dq_kernel", "dkv_kernel"]
    for row in rows:
        assert int(row["spills"]) == 0
        assert 0 < int(row["shared"]) <= shared_kib * 1024


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("number_bytes", [2, 4])
@pytest.mark.parametrize("P", [16, 32, 64, 128])
def test_every_call_is_offered_a_candidate(P, number_bytes, backward):
    facts = (P, number_bytes, backward)
    candidates = natten3d_triton.CANDIDATES
    assert any(natten3d_triton.is_offered(N, warps, *facts) for N, warps, _ in candidates)


@needs_triton
@pytest.mark.skipif(natten3d_triton.INTERPRETED, reason="the interpreter has one candidate")
@pytest.mark.parametrize(
    "dtype, forward_N, backward_N",
    [(torch.bfloat16, {32, 64, 128}, {32, 64}), (torch.float32, {16}, {16})],
)
def test_candidates_that_spill_are_not_offered_to_the_autotuner(dtype, forward_N, backward_N):
    q = torch.zeros(1, dtype=dtype)
    expected = {"forward_kernel": forward_N, "dq_kernel": backward_N, "dkv_kernel": backward_N}
    for name, wanted in expected.items():
        # The autotuner zips the arguments of a launch with their names, as here.
        kernel = getattr(natten3d_triton, name)
        kernel.nargs = dict.fromkeys(kernel.arg_names[: kernel.arg_names.index("d")], q)
        offered = kernel.prune_configs({"d": 64, "P": 64, "M": 64})
        assert {config.kwargs["N"] for config in offered} == wanted


@needs_triton
@needs_gpu_or_interpreter
@pytest.mark.parametrize("grid, kernel, d", [((2, 5, 9), (3, 3, 7), 16), ((1, 9, 4), 7, 40)])
@pytest.mark.parametrize(
    "dtype, atol", [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)]
)
def test_triton_equals_masked_dense_attention(grid, kernel, d, dtype, atol):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter (3.9) multiplies bfloat16 matrices as if integers")
    q, k, v, g = make_inputs(grid, d=d, dtype=dtype)
    results = run_na3d(*leaves((q, k, v), DEVICE), g.to(DEVICE), kernel, "triton")
    assert_close([t.cpu() for t in results], run_dense(q, k, v, g, kernel), atol)


@needs_triton
@needs_gpu_or_interpreter
def test_triton_operators_keep_pytorchs_rules():
    q, k, v, g = (t.detach().to(DEVICE) for t in make_inputs((1, 5, 2), dtype=torch.float32))
    settings = ([1, 3, 1], 0.5, True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(natten3d.attention, (q, k, v, *settings), test_utils=checks)
    saved = (g, q, k, v, *natten3d.attention(q, k, v, *settings))
    torch.library.opcheck(natten3d.attention_backward, (*saved, *settings), test_utils=checks)


@needs_triton
@pytest.mark.skipif(DEVICE is not None, reason="the tests above have run the kernels")
def test_tritons_interpreter_passes_the_tests_above():
    # Triton reads the variable when it is imported, so start a new process.
    command = [sys.executable, "-m", "pytest", "-q", __file__]
    command += ["-k", "triton_equals or triton_operators"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "5 passed" in run.stdout, run.stdout
