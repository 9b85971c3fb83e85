"""What bench_peers.py promises: all peers compute the same thing, and it is counted correctly."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import natten3d
from bench_peers import PEERS, Problem


def make_problem(grid, kernel, n=2, d=16, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    *qkv, grad = torch.randn(4, 2, *grid, n, d, generator=rng, dtype=dtype)
    return Problem("small", kernel, [x.requires_grad_() for x in qkv], grad)


def test_useful_flops_are_the_products_of_the_plain_reference():
    problem = make_problem((3, 4, 5), (3, 3, 3))
    with FlopCounterMode(display=False) as counter:
        out = natten3d.na3d(*problem.qkv, 3, backend="reference")
        forward = counter.get_total_flops()
        out.backward(problem.grad)
    assert problem.useful_flops("forward") == forward
    # Recomputing the scores q k, which plain autograd keeps, takes half a forward pass more.
    both = counter.get_total_flops() + forward / 2
    assert problem.useful_flops("forward+backward") == both


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("grid, kernel", [((8, 8, 8), (7, 7, 7)), ((4, 8, 16), (3, 7, 5))])
def test_all_peers_compute_what_the_reference_does(grid, kernel, monkeypatch):
    # Without compiling, flex uses the same mask but builds no C++.
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    problem = make_problem(grid, kernel)
    q, k, v = (x.detach() for x in problem.qkv)  # flex has no backward pass on a CPU
    expected = natten3d.na3d(q, k, v, kernel, backend="reference")
    for who in ("na3d", "dense SDPA with a mask", "flex, raster order", "flex, tiles of 4x4x8"):
        attention = PEERS[who](problem)
        torch.testing.assert_close(
            attention(q, k, v), expected, msg=lambda m, who=who: f"{who}: {m}"
        )


def test_errors_are_taken_against_the_first_head_of_the_reference():
    problem = make_problem((3, 8, 5), (3, 7, 5))
    out = natten3d.na3d(*problem.qkv, problem.kernel, backend="reference")
    gradients = torch.autograd.grad(out, problem.qkv, problem.grad)
    exact = problem.exact()
    for found, expected in zip([*exact["forward"], *exact["forward+backward"]], [out, *gradients]):
        torch.testing.assert_close(found, expected[:1, ..., :1, :])
