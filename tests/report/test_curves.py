import xml.etree.ElementTree as ElementTree

import pytest

from memopt.report import Curve, draw_curves

CURVES = (
    Curve("cross-entropy", [2.0, 1.0, 0.5], [2.1, 1.2, 0.8]),
    Curve("error (%)", [80.0, 40.0, 9.0], [90.0, 50.0, 20.0]),
)


def test_svg_is_well_formed_and_repeatable() -> None:
    drawn = draw_curves(CURVES, "DenseNet", "svg")
    ElementTree.fromstring(drawn)
    assert drawn == draw_curves(CURVES, "DenseNet", "svg")
    assert drawn != draw_curves(CURVES[:1], "DenseNet", "svg")


def test_png() -> None:
    assert draw_curves(CURVES, "DenseNet", "png").startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [1, 300])
def test_any_number_of_epochs(count: int) -> None:
    assert draw_curves([Curve("error (%)", [1.0] * count, [0.0] * count)], "x", "svg")


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_values_that_span_no_axis(value: float) -> None:
    """Warnings are errors here."""
    assert draw_curves([Curve("error (%)", [value], [value])], "x", "svg")
