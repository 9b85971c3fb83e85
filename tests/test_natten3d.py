"""What natten3d.py promises.

The oracle is attention over all pairs of tokens under an explicit mask, in float64.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import natten3d
from natten3d import na3d

ORACLES = Path(__file__).parent / "oracles"
GRIDS_AND_KERNELS = [
    ((8, 8, 8), 7),
    ((9, 2, 10), 7),
    ((5, 1, 12), 3),
    ((6, 7, 8), (3, 5, 7)),
    ((2, 3, 17), 9),
    ((1, 1, 2), 1),
    # Many queries share a window.
    ((12, 2, 5), (13, 1, 3)),
    ((1, 2, 41), 33),
]


def sees(grid, kernel):
    """(T, T) boolean, who sees whom.

    On an axis: of all windows of k tokens inside the grid, the one whose middle is nearest to the
    query.
    """
    kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
    axes = []
    for length, k in zip(grid, kernel):
        middle = k // 2
        k = min(k, length)
        axis = torch.zeros(length, length)
        for i in range(length):
            distance = [abs(start + middle - i) for start in range(length - k + 1)]
            start = distance.index(min(distance))
            axis[i, start : start + k] = 1
        axes.append(axis)
    return torch.kron(torch.kron(axes[0], axes[1]), axes[2]) > 0


def masked_scores(q, k, grid, kernel, scale):
    """(B, n, T, T), -inf for pairs that do not see each other."""
    scores = scale * torch.einsum("bind,bjnd->bnij", q.flatten(1, 3), k.flatten(1, 3))
    return scores.masked_fill(~sees(grid, kernel), -torch.inf)


def dense(q, k, v, kernel, scale=None):
    """The oracle."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p = masked_scores(q, k, q.shape[1:4], kernel, scale).softmax(-1)
    return torch.einsum("bnij,bjnd->bind", p, v.flatten(1, 3)).view(q.shape)


def make_inputs(grid, B=2, n=2, d=4, dtype=torch.float64):
    """q, k, v that want gradients, and a gradient for the output."""
    rng = torch.Generator().manual_seed(0)
    tensors = torch.randn(4, B, *grid, n, d, generator=rng, dtype=torch.float64).to(dtype)
    q, k, v, g = tensors
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), g


def leaves(tensors, *args):
    """Copies of another dtype or device that want gradients."""
    return [t.detach().to(*args).requires_grad_() for t in tensors]


def with_gradients(attention, q, k, v, g):
    out = attention(q, k, v)
    return out, *torch.autograd.grad(out, (q, k, v), g)


def run_na3d(q, k, v, g, kernel, backend="auto"):
    """Output and gradients."""
    return with_gradients(lambda q, k, v: na3d(q, k, v, kernel, backend=backend), q, k, v, g)


def run_dense(q, k, v, g, kernel):
    """Output and gradients of the oracle, in float64."""
    q, k, v = leaves((q, k, v), torch.float64)
    return with_gradients(lambda q, k, v: dense(q, k, v, kernel), q, k, v, g.double())


def assert_close(results, expected, atol):
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=atol)


def assert_same_bits(results, expected):
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("grid, kernel", GRIDS_AND_KERNELS)
def test_output_and_gradients_equal_masked_dense_attention(grid, kernel, backend):
    inputs = make_inputs(grid)
    assert_close(run_na3d(*inputs, kernel, backend), run_dense(*inputs, kernel), 1e-13)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_over_all_pairs_keeps_the_mask(dtype, close):
    # Few pairs are hidden here, so na3d attends to all pairs instead of making tiles.
    inputs = make_inputs((8, 8, 8), dtype=dtype)
    assert_close(run_na3d(*inputs, 7, "tiled"), run_dense(*inputs, 7), close)


def test_the_mask_over_all_pairs_is_made_once_and_serves_training_after_inference():
    q, k, v, g = make_inputs((8, 8, 8), dtype=torch.float32)
    natten3d.cached_whole_bias.cache_clear()
    with torch.inference_mode():
        na3d(q, k, v, 7)
    # Autograd cannot save a tensor that was made in inference mode.
    run_na3d(q, k, v, g, 7)
    info = natten3d.cached_whole_bias.cache_info()
    assert (info.hits, info.misses) == (1, 1)


@pytest.mark.parametrize("chunk", [1, 5000])
def test_cutting_the_work_into_chunks_changes_nothing(chunk, monkeypatch):
    inputs = make_inputs((9, 2, 18), B=1, n=3)  # along x: two edges and three full tiles
    expected = run_na3d(*inputs, 5, "reference")
    monkeypatch.setattr(natten3d, "CHUNK", chunk)
    natten3d.plan.cache_clear()
    results = run_na3d(*inputs, 5, "tiled")
    natten3d.plan.cache_clear()
    assert_close(results, expected, 1e-13)


def test_tiled_gradients_are_finite_differences():
    q, k, v, _ = make_inputs((3, 6, 2), B=1, n=1, d=2)

    def attention(q, k, v):
        return na3d(q, k, v, 3, scale=0.7, backend="tiled")

    assert torch.autograd.gradcheck(attention, (q, k, v))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("case", [0, 1])  # case 2 is dilated, which na3d is not
def test_output_equals_natten(case, backend):
    fixture = np.load(ORACLES / "natten3d.npz")
    names = [f"case{case}_{name}" for name in ("q", "k", "v", "out")]
    q, k, v, out = (torch.tensor(fixture[name])[None] for name in names)
    kernel = fixture[f"case{case}_kernel"].tolist()
    scale = float(fixture[f"case{case}_scale"])
    assert (fixture[f"case{case}_dilation"] == 1).all()
    assert_close([na3d(q, k, v, kernel, scale=scale, backend=backend)], [out], 2e-6)


@pytest.mark.parametrize("std", [1, 4])
@pytest.mark.parametrize("kernel", [5, 7])  # by tiles, and over all pairs
def test_bfloat16_errors_stay_within_what_rounding_explains(std, kernel):
    """Scores, probabilities, sum and output are each rounded once, by at most u relative.

    With |S| <= S_max the probabilities are off by 2 u S_max + 2 u, the output by u more, to first
    order.
    """
    q, k, v, _ = make_inputs((8, 8, 8), B=1, d=32, dtype=torch.bfloat16)
    q = (q * std).detach()  # std is the standard deviation of the logits
    out = na3d(q, k, v, kernel, backend="tiled")

    # The exact output, and the bound.
    u = 2.0**-8
    scores = masked_scores(q.double(), k.double(), (8, 8, 8), kernel, 32**-0.5)
    p = scores.softmax(-1)
    values = v.double().flatten(1, 3)
    expected = torch.einsum("bnij,bjnd->bind", p, values).view(v.shape)
    size = torch.einsum("bnij,bjnd->bind", p, values.abs()).view(v.shape)
    s_max = scores.masked_fill(scores.isinf(), 0).abs().max()
    error = (out - expected).abs()
    assert (error <= u * (2 * s_max + 3) * size).all()

    # Rounding errors average out.
    assert error.mean() <= u * expected.abs().mean() * (1 + std)


def test_bfloat16_gradients_are_summed_in_float32():
    # The gradient of a key comes from up to 9 tiles.
    inputs = make_inputs((1, 20, 20), B=1, d=32, dtype=torch.bfloat16)
    for a, b in zip(run_na3d(*inputs, 9, "tiled"), run_dense(*inputs, 9), strict=True):
        assert a.dtype == torch.bfloat16
        # 1.3 was measured, and 1.6 with bfloat16 sums.
        assert (a - b).norm() < 1.5 * 2.0**-8 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_does_not_depend_on_its_batch(dtype):
    q, k, v, g = make_inputs((8, 9, 8), B=3, n=3, dtype=dtype)
    together = run_na3d(q, k, v, g, 7, "tiled")
    alone = run_na3d(*leaves((q[1:2], k[1:2], v[1:2])), g[1:2], 7, "tiled")
    assert_same_bits([a[1:2] for a in together], alone)


def test_slices_of_one_projection_are_as_good_as_copies():
    q, k, v, g = make_inputs((6, 6, 9))
    # A network makes q, k, v as one tensor (B, D, H, W, 3, n, d).
    qkv = torch.stack((q, k, v), 4).detach().requires_grad_()
    out = na3d(*qkv.unbind(4), 3, backend="tiled")
    (gradient,) = torch.autograd.grad(out.transpose(1, 3), qkv, g.transpose(1, 3))
    assert_close([out, *gradient.unbind(4)], run_na3d(q, k, v, g, 3, "tiled"), 1e-15)


def test_autocast_chooses_the_dtype():
    q, k, v, g = make_inputs((4, 5, 6), dtype=torch.float32)
    expected = run_na3d(*leaves((q, k, v), torch.bfloat16), g.bfloat16(), 3)
    with torch.autocast("cpu", torch.bfloat16):
        # As in the network: q and k are float32, v is bfloat16.
        results = with_gradients(lambda q, k, v: na3d(q, k, v.bfloat16(), 3), q, k, v, g.bfloat16())
    assert results[0].dtype == torch.bfloat16
    assert results[1].dtype == torch.float32
    assert_same_bits(results, [b.to(a.dtype) for a, b in zip(results, expected)])


def test_autocast_leaves_float64_alone():
    inputs = make_inputs((4, 5, 6))
    with torch.autocast("cpu", torch.bfloat16):
        results = run_na3d(*inputs, 3)
    assert_close(results, run_dense(*inputs, 3), 1e-13)


def test_autocast_does_not_reach_the_backward_pass_of_a_float32_operator():
    q, k, v, g = make_inputs((4, 5, 6), dtype=torch.float32)
    out = na3d(q, k, v, 3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(out, (q, k, v), g, retain_graph=True)
    assert_same_bits(inside, torch.autograd.grad(out, (q, k, v), g))


def test_without_autocast_the_widest_dtype_wins():
    q, k, v, _ = make_inputs((4, 5, 6), dtype=torch.float32)
    v = v.bfloat16()
    assert torch.equal(na3d(q, k, v, 3), na3d(q, k, v.float(), 3))


@pytest.mark.parametrize("grid", [(5, 6, 9), (5, 5, 6)])  # by tiles, and over all pairs
def test_compiling_without_graph_breaks_and_checkpointing_change_nothing(grid):
    inputs = make_inputs(grid, dtype=torch.float32)

    def layer(q, k, v):
        return 2 * na3d(q + 1, k, v, 5)

    def checkpointed(q, k, v):
        return checkpoint(layer, q, k, v, use_reentrant=False)

    expected = with_gradients(layer, *inputs)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_close(with_gradients(compiled, *inputs), expected, 1e-6)
    assert_close(with_gradients(checkpointed, *inputs), expected, 1e-6)


def test_operators_keep_pytorchs_rules():
    inputs = make_inputs((4, 5, 6), dtype=torch.float32)
    # Inputs whose strides differ from those of the results.
    q, k, v, g = (t.detach().transpose(1, 4).contiguous().transpose(1, 4) for t in inputs)
    q, k, v, g = leaves((q, k, v, g))
    settings = ([3, 3, 3], 0.5, False)
    torch.library.opcheck(natten3d.attention, (q, k, v, *settings))
    out, lse = natten3d.attention(q, k, v, *settings)
    saved = [t.detach() for t in (g, q, k, v, out, lse)]
    torch.library.opcheck(natten3d.attention_backward, (*saved, *settings))


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"kernel_size": 4}, "odd"),
        ({"kernel_size": (3, 3)}, "three"),
        ({"kernel_size": -1}, "odd"),
        ({"backend": "dense"}, "reference"),
        ({"k": torch.zeros(2, 2, 3, 3, 2, 4)}, "one shape"),
        ({"q": torch.zeros(3, 3, 3, 2, 4)}, "one shape"),
        ({"backend": "triton"}, "triton"),  # float64, which Triton does not support
    ],
)
def test_a_bad_argument_is_named(wrong, word):
    q, k, v, _ = make_inputs((3, 3, 3))
    arguments = {"q": q, "k": k, "v": v, "kernel_size": 3} | wrong
    with pytest.raises(ValueError, match=word):
        na3d(**arguments)
