"""The promises of fsc_picture.py: curves, thresholds and both axes of an FSC plot."""

import math

import pytest
import torch

from fsc_picture import draw_fsc

figure_module = pytest.importorskip("matplotlib.figure", reason="pictures need matplotlib")


def drawn(**settings):
    frequency = [0.0, 0.1, 0.2, 0.3]
    curves = {"good": torch.tensor([1.0, 0.9, 0.6, -0.3]), "_other": [math.nan, 0.8, 0.2, 0.1]}
    axis = figure_module.Figure().subplots()
    draw_fsc(axis, frequency, curves, **settings)
    return axis


def test_every_curve_and_both_thresholds_are_drawn():
    lines = [line.get_ydata() for line in drawn().lines]
    assert [list(line) for line in lines[2:]] == [[0.143, 0.143], [0.5, 0.5], [0, 0]]
    assert lines[0][3] == pytest.approx(-0.3) and lines[1][1] == pytest.approx(0.8)


def test_the_legend_leaves_out_labels_with_an_underscore_in_front():
    legend = drawn(legend_title="resolution").get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["good"]
    assert legend.get_title().get_text() == "resolution"


def test_the_upper_axis_shows_the_resolution_of_each_frequency():
    axis = drawn()
    (top,) = axis.child_axes
    for tick, label in zip(top.get_xticks(), top.get_xticklabels(), strict=True):
        assert float(label.get_text()) == pytest.approx(1 / tick, rel=5e-3)


def test_the_vertical_axis_reaches_below_the_lowest_value():
    bottom, top = drawn().get_ylim()
    assert bottom == pytest.approx(-0.35) and top > 1


def test_a_style_is_passed_on_to_its_curve():
    axis = drawn(styles={"good": {"color": "red", "lw": 2}})
    assert axis.lines[0].get_color() == "red" and axis.lines[0].get_linewidth() == 2
