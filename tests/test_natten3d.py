"""What natten3d.py promises. The oracle is attention over all pairs of tokens under an explicit mask, in float64."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import natten3d
from natten3d import na3d

ORACLES = Path(__file__).parent / "oracles"
GRIDS = [((8, 8, 8), 7), ((9, 2, 10), 7), ((5, 1, 12), 3), ((6, 7, 8), (3, 5, 7)), ((2, 3, 17), 9), ((1, 1, 2), 1),
         ((12, 2, 5), (13, 1, 3)), ((1, 2, 41), 33)]                    # these two: many queries share a window
DEVICE = "cuda" if torch.cuda.is_available() else "cpu" if natten3d.INTERPRETED else None     # where Triton can run
NO_TRITON = importlib.util.find_spec("triton") is None


def visible(grid, kernel):
    """(T, T) boolean, who sees whom. On an axis: of all windows of k tokens inside the grid, the one whose middle is
    nearest to the query."""
    kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
    axes = []
    for length, k in zip(grid, kernel):
        middle = k // 2
        k = min(k, length)
        start = [min(range(length - k + 1), key=lambda s: abs(s + middle - i)) for i in range(length)]
        axes.append(torch.tensor([[int(s <= j < s + k) for j in range(length)] for s in start]))
    return torch.kron(torch.kron(*axes[:2]), axes[2]) > 0


def scores(q, k, grid, kernel, scale):
    """(B, n, T, T), -inf for pairs that do not see each other."""
    s = scale * torch.einsum("bind,bjnd->bnij", q.flatten(1, 3), k.flatten(1, 3))
    return s.masked_fill(~visible(grid, kernel), -torch.inf)


def dense(q, k, v, kernel, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p = scores(q, k, q.shape[1:4], kernel, scale).softmax(-1)
    return torch.einsum("bnij,bjnd->bind", p, v.flatten(1, 3)).view(q.shape)


def make(grid, B=2, n=2, d=4, dtype=torch.float64, count=4, seed=0):
    """q, k, v that want gradients, and a gradient for the output."""
    rng = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(B, *grid, n, d, generator=rng, dtype=torch.float64).to(dtype) for _ in range(count)]
    return [t.requires_grad_(i < 3) for i, t in enumerate(tensors)]


def with_gradients(function, q, k, v, g):
    out = function(q, k, v)
    return out, *torch.autograd.grad(out, (q, k, v), g)


def close(results, expected, atol):
    return all(torch.allclose(a.double(), b.double(), rtol=0, atol=atol) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("grid, kernel", GRIDS)
def test_output_and_gradients_equal_masked_dense_attention(grid, kernel, backend):
    q, k, v, g = make(grid)
    expected = with_gradients(lambda *qkv: dense(*qkv, kernel), q, k, v, g)
    results = with_gradients(lambda *qkv: na3d(*qkv, kernel, backend=backend), q, k, v, g)
    assert close(results, expected, 1e-13)


def test_float32_attention_over_all_pairs_keeps_the_mask():
    q, k, v, g = make((8, 8, 8), dtype=torch.float32)                   # few enough pairs are hidden to leave out tiles
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = with_gradients(lambda *qkv: dense(*qkv, 7), *wide, g.double())
    assert close(with_gradients(lambda *qkv: na3d(*qkv, 7, backend="tiled"), q, k, v, g), expected, 1e-5)


def test_the_mask_over_all_pairs_is_made_once_and_serves_training_after_inference():
    q, k, v, g = make((8, 8, 8), dtype=torch.float32)
    natten3d.whole_bias.cache_clear()
    with torch.inference_mode():
        na3d(q, k, v, 7)
    with_gradients(lambda *qkv: na3d(*qkv, 7), q, k, v, g)              # what inference mode makes cannot be saved for this
    assert natten3d.whole_bias.cache_info()[:2] == (1, 1)               # hits, misses


@pytest.mark.parametrize("chunk", [1, 5000])
def test_cutting_the_work_into_chunks_changes_nothing(chunk, monkeypatch):
    q, k, v, g = make((9, 2, 18), B=1, n=3)                             # x: ends, three full tiles
    expected = with_gradients(lambda *qkv: na3d(*qkv, 5, backend="reference"), q, k, v, g)
    monkeypatch.setattr(natten3d, "CHUNK", chunk)
    natten3d.plan.cache_clear()
    results = with_gradients(lambda *qkv: na3d(*qkv, 5, backend="tiled"), q, k, v, g)
    natten3d.plan.cache_clear()
    assert close(results, expected, 1e-13)


def test_tiled_gradients_are_finite_differences():
    q, k, v, _ = make((3, 6, 2), B=1, n=1, d=2)
    assert torch.autograd.gradcheck(lambda *qkv: na3d(*qkv, 3, scale=0.7, backend="tiled"), (q, k, v))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("case", [0, 1])                                # case 2 is dilated, which na3d is not
def test_output_equals_natten(case, backend):
    if not (ORACLES / "natten3d.npz").exists():
        pytest.skip(f"needs {ORACLES}/oracles/natten3d.npz, which is not part of the project")
    fixture = np.load(ORACLES / "natten3d.npz")
    q, k, v, expected = (torch.tensor(fixture[f"case{case}_{name}"])[None] for name in ("q", "k", "v", "out"))
    kernel, scale = fixture[f"case{case}_kernel"].tolist(), float(fixture[f"case{case}_scale"])
    assert (fixture[f"case{case}_dilation"] == 1).all()
    assert close([na3d(q, k, v, kernel, scale=scale, backend=backend)], [expected], 2e-6)


@pytest.mark.parametrize("std", [1, 4])
def test_bfloat16_errors_stay_within_what_rounding_explains(std):
    """Scores, probabilities, sum and output are each rounded once, by at most u relative: with |S| <= S_max the
    probabilities are off by 2 u S_max + 2 u, the output by u more, to first order."""
    q, k, v, g = make((8, 8, 8), B=1, d=32, dtype=torch.bfloat16)
    q = (q * std).detach()                                              # standard deviation of the logits
    u, scale = 2.0**-8, 32**-0.5
    s = scores(q.double(), k.double(), (8, 8, 8), 7, scale)
    p, values = s.softmax(-1), v.double().flatten(1, 3)
    expected, size = (torch.einsum("bnij,bjnd->bind", p, t).view(v.shape) for t in (values, values.abs()))
    s_max = s.masked_fill(s.isinf(), 0).abs().max()
    error = (na3d(q, k, v, 7, backend="tiled") - expected).abs()
    assert (error <= u * (2 * s_max + 3) * size).all()
    assert error.mean() <= u * expected.abs().mean() * (1 + std)        # and rounding errors average out


def test_bfloat16_gradients_are_summed_in_float32():
    q, k, v, g = make((1, 20, 20), B=1, d=32, dtype=torch.bfloat16)     # a key's gradient comes from up to 9 tiles
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = with_gradients(lambda *qkv: dense(*qkv, 9), *wide, g.double())
    results = with_gradients(lambda *qkv: na3d(*qkv, 9, backend="tiled"), q, k, v, g)
    for a, b in zip(results, expected):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() < 1.5 * 2.0**-8 * b.norm()                # measured 1.3; with bfloat16 sums 1.6


def test_a_sample_does_not_depend_on_its_batch():
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, g = make((8, 9, 8), B=3, n=3, dtype=dtype)
        together = with_gradients(lambda *qkv: na3d(*qkv, 7, backend="tiled"), q, k, v, g)
        alone = with_gradients(lambda *qkv: na3d(*qkv, 7, backend="tiled"),
                               *(t[1:2].detach().requires_grad_() for t in (q, k, v)), g[1:2])
        assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone))


def test_slices_of_one_projection_are_as_good_as_copies():
    q, k, v, g = make((6, 6, 9), count=4)
    qkv = torch.stack((q, k, v), 4).detach().requires_grad_()           # as a network makes them: (B, D, H, W, 3, n, d)
    out = na3d(*qkv.unbind(4), 3, backend="tiled")
    gradient, = torch.autograd.grad(out.transpose(1, 3), qkv, g.transpose(1, 3))
    expected = with_gradients(lambda *qkv: na3d(*qkv, 3, backend="tiled"), q, k, v, g)
    assert close([out, *gradient.unbind(4)], expected, 1e-15)


def test_autocast_chooses_the_dtype_and_otherwise_the_widest_wins():
    q, k, v, g = make((4, 5, 6), dtype=torch.float32)
    half = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    expected = with_gradients(lambda *qkv: na3d(*qkv, 3), *half, g.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):                         # the network's q, k are float32, its v bfloat16
        results = with_gradients(lambda q, k, v: na3d(q, k, v.bfloat16(), 3), q, k, v, g.bfloat16())
        wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
        untouched = with_gradients(lambda *qkv: na3d(*qkv, 3), *wide, g.double())
    out = na3d(q, k, v, 3)
    with torch.autocast("cpu", torch.bfloat16):                         # a float32 operator stays one in its backward
        inside = torch.autograd.grad(out, (q, k, v), g, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(inside, torch.autograd.grad(out, (q, k, v), g)))
    assert results[0].dtype == torch.bfloat16 and results[1].dtype == torch.float32
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(results, expected))
    assert close(untouched, with_gradients(lambda *qkv: dense(*qkv, 3), *wide, g.double()), 1e-13)
    assert torch.equal(na3d(q, k, half[2], 3), na3d(q, k, half[2].float(), 3))


@pytest.mark.parametrize("grid", [(5, 6, 9), (5, 5, 6)])                # by tiles; over all pairs
def test_compiling_without_graph_breaks_and_checkpointing_change_nothing(grid):
    q, k, v, g = make(grid, dtype=torch.float32)
    layer = lambda q, k, v: 2 * na3d(q + 1, k, v, 5)
    expected = with_gradients(layer, q, k, v, g)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert close(with_gradients(compiled, q, k, v, g), expected, 1e-6)
    checkpointed = lambda *qkv: checkpoint(layer, *qkv, use_reentrant=False)
    assert close(with_gradients(checkpointed, q, k, v, g), expected, 1e-6)


def test_operators_keep_pytorchs_rules():
    q, k, v, g = (t.detach().transpose(1, 4).contiguous().transpose(1, 4).requires_grad_() for t in
                  make((4, 5, 6), dtype=torch.float32))                 # strides of their own: the results' are plain
    torch.library.opcheck(natten3d.attention, (q, k, v, [3, 3, 3], 0.5, False))
    out, lse = natten3d.attention(q, k, v, [3, 3, 3], 0.5, False)
    saved = [t.detach() for t in (g, q, k, v, out, lse)]
    torch.library.opcheck(natten3d.attention_backward, (*saved, [3, 3, 3], 0.5, False))


def test_a_bad_argument_is_named():
    q, k, v, _ = make((3, 3, 3))
    for wrong, word in (({"kernel_size": 4}, "odd"), ({"kernel_size": (3, 3)}, "three"), ({"kernel_size": -1}, "odd"),
                        ({"backend": "dense"}, "reference"), ({"k": k[:, 1:]}, "one shape"), ({"q": q[0]}, "one shape"),
                        ({"backend": "triton"}, "triton")):             # float64 where there is Triton
        with pytest.raises(ValueError, match=word):
            na3d(**{"q": q, "k": k, "v": v, "kernel_size": 3} | wrong)


needs_triton = pytest.mark.skipif(NO_TRITON, reason="triton is not installed (pip install triton)")
needs_gpu_or_interpreter = pytest.mark.skipif(not DEVICE, reason="needs a GPU or TRITON_INTERPRET=1")


@needs_triton
@needs_gpu_or_interpreter
@pytest.mark.parametrize("grid, kernel, d", [((2, 5, 9), (3, 3, 7), 16), ((1, 9, 4), 7, 40)])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_triton_equals_masked_dense_attention(grid, kernel, d, dtype, atol):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter (3.9) multiplies bfloat16 matrices as if their bits were integers")
    q, k, v, g = make(grid, d=d, dtype=dtype)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = with_gradients(lambda *qkv: dense(*qkv, kernel), *wide, g.double())
    moved = [t.detach().to(DEVICE).requires_grad_() for t in (q, k, v)]
    results = with_gradients(lambda *qkv: na3d(*qkv, kernel, backend="triton"), *moved, g.to(DEVICE))
    assert close([t.cpu() for t in results], expected, atol)


@needs_triton
@needs_gpu_or_interpreter
def test_triton_operators_keep_pytorchs_rules():
    q, k, v, g = (t.detach().to(DEVICE) for t in make((1, 5, 2), dtype=torch.float32))
    settings = [1, 3, 1], 0.5, True
    torch.library.opcheck(natten3d.attention, (q, k, v, *settings), test_utils=("test_schema", "test_faketensor"))
    saved = g, q, k, v, *natten3d.attention(q, k, v, *settings)
    torch.library.opcheck(natten3d.attention_backward, (*saved, *settings), test_utils=("test_schema", "test_faketensor"))


@needs_triton
@pytest.mark.skipif(bool(DEVICE), reason="the tests above have run the kernels")
def test_triton_interpreter_passes_the_tests_above():
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", __file__, "-k", "triton_equals or triton_operators"],
                         text=True, capture_output=True, cwd=Path(__file__).parent.parent,
                         env=os.environ | {"TRITON_INTERPRET": "1"})    # read when triton is imported: a new process
    assert run.returncode == 0 and "5 passed" in run.stdout, run.stdout
