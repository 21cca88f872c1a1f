"""Loss and error over the epochs, drawn with matplotlib where it is installed."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Curve:
    """A quantity over the epochs, of training and of validation data.

    Attributes:
        label: what is drawn, with its unit.
        train: a value for each epoch.
        valid: likewise.
    """

    label: str
    train: Sequence[float]
    valid: Sequence[float]


def draw_curves(curves: Sequence[Curve], title: str, file_format: str) -> bytes:
    """Draw each curve in a panel of its own, epochs from 1 on.

    Args:
        curves: one or more, of as many epochs each.
        title: above the panels.
        file_format: "svg" or "png".

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Without an identity of its own a drawing of the same curves is the same file.
    with rc_context({"svg.hashsalt": "memopt"}):
        figure = Figure(figsize=(4.5 * len(curves), 3.4), layout="constrained")
        figure.suptitle(title, fontsize="medium")
        for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
            epochs = range(1, len(curve.train) + 1)
            marker = "o" if len(epochs) < 10 else ""
            axes.plot(epochs, curve.train, label="training", color="#0072b2", marker=marker)
            axes.plot(epochs, curve.valid, label="validation", color="#d55e00", linestyle="--", marker=marker)
            axes.set_xlabel("epoch")
            axes.set_ylabel(curve.label)
            axes.set_ylim(0, _top(curve))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        content = io.BytesIO()
        figure.savefig(content, format=file_format, dpi=150, metadata={"Date": None} if file_format == "svg" else None)
    return content.getvalue()


def _top(curve: Curve) -> float:
    """Where the axis ends: a little above the largest value; a loss may be infinite, and an error always zero."""
    largest = max((value for value in (*curve.train, *curve.valid) if math.isfinite(value)), default=0.0)
    return 1.05 * largest or 1.0
