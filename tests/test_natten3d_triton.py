"""What natten3d_triton.py promises. The oracle is that of test_natten3d.py.

The kernels run on a GPU, or with TRITON_INTERPRET=1 on a CPU.
"""

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
