import builtins
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from memopt.measure import CATEGORIES, Holding, Timeline
from memopt.report.pictures import (
    COLOURS,
    PictureError,
    as_svg,
    lines_figure,
    new_figure,
    save_figure,
    size_ticks,
    timeline_figure,
)

MIB = 2**20


def line(*totals_mib: int) -> Timeline:
    moments = tuple(tuple(total * MIB if name == "scratch" else 0 for name in CATEGORIES) for total in totals_mib)
    at = totals_mib.index(max(totals_mib))
    return Timeline(
        moments, (("forward", 0), ("backward", 1)), at, (Holding("scratch", "op", 1, max(totals_mib) * MIB),)
    )


def test_both_panels_have_one_scale_and_mark_their_peaks() -> None:
    panels = timeline_figure({"before": line(1, 900, 3), "after": line(1, 2, 90, 4)}).axes
    assert [panel.get_title("left") for panel in panels] == ["before: peak 900 MiB", "after: peak 90 MiB"]
    assert panels[0].get_ylim() == panels[1].get_ylim()
    marked = [panel.lines[-1].get_xydata().tolist() for panel in panels]
    assert marked == [[[1.0, 900.0]], [[2.0, 90.0]]]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["forward", "backward"]
    assert "op" in panels[0].get_xlabel()


BLINDNESS = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
}


def seen_by(colour: str, blindness: str | None) -> list[float]:
    """Linear red, green and blue of a colour for people who lack a kind of cone (Machado et al. 2009, severity 1)."""
    given = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in given]
    if blindness is None:
        return linear
    return [sum(w * c for w, c in zip(row, linear, strict=True)) for row in BLINDNESS[blindness]]


@pytest.mark.parametrize("blindness", [None, *BLINDNESS])
def test_everybody_tells_the_categories_apart(blindness: str | None) -> None:
    seen = {name: seen_by(COLOURS[name], blindness) for name in CATEGORIES}
    for first, second in combinations(seen, 2):
        assert math.dist(seen[first], seen[second]) > 0.15, f"{first} and {second}"


def test_origins_keep_operator_and_line() -> None:
    def shown(origin: str) -> str:
        at_peak = replace(line(1, 2), holdings=(Holding("scratch", origin, 1, 3 * MIB),))
        return str(timeline_figure({"before": at_peak}).axes[0].get_xlabel().splitlines()[2])

    assert shown("aten.cat.default  bc.py:49 DenseLayer.forward") == "     3.00 MiB  cat  bc.py:49 DenseLayer.forward"
    long = shown(f"aten.cat.default  {'x' * 80}.py:49 forward")
    assert long.startswith("     3.00 MiB  cat  xxx")
    assert long.endswith("xxx.py:49 forward")
    assert len(long) == 15 + 62


@pytest.mark.parametrize("panels", [1, 2])
def test_nothing_is_cut_at_the_edge(panels: int) -> None:
    many = line(*range(1, 900), *[100] * 30)
    late = replace(
        many,
        phases=(("forward", 0), ("backward", 400), ("update", 925)),
        holdings=tuple(Holding("scratch", "operator " * 12, 1, 12345 * MIB) for _ in range(9)),
    )
    figure = timeline_figure(dict.fromkeys(("before", "after")[:panels], late))
    figure.draw_without_rendering()
    assert [label.get_ha() for label in figure.axes[0].get_xticklabels()] == ["left", "left", "right"]
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert 0 <= drawn.x0 < drawn.x1 <= width
    assert 0 <= drawn.y0 < drawn.y1 <= height


def test_the_suffix_says_what_is_written(tmp_path: Path) -> None:
    figure = lines_figure(
        {"naive": [(40, 500.0 * MIB), (100, 2000.0 * MIB)]}, x_label="depth", y_label="peak", limit=("card", 12e3 * MIB)
    )
    save_figure(figure, tmp_path / "a.png")
    save_figure(figure, tmp_path / "a.svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "a.svg").read_text()
    assert as_svg(figure).startswith("<svg")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["naive", "card"]


@pytest.mark.parametrize(
    ("least_mib", "most_mib", "labels"),
    [
        (94, 25000, ["50", "100", "200", "500", "1 GiB", "2 GiB", "5 GiB", "10 GiB", "20 GiB", "50 GiB"]),
        (22, 45, ["20", "50"]),
        (20, 20, ["20", "50"]),
        (0.3, 0.6, ["0.2", "0.5", "1"]),
    ],
)
def test_sizes_are_labelled_in_steps_of_one_two_and_five(least_mib: float, most_mib: float, labels: list[str]) -> None:
    found = size_ticks(least_mib * MIB, most_mib * MIB)
    assert list(found.values()) == [label if "GiB" in label else f"{label} MiB" for label in labels]
    panel = lines_figure({"a": [(1, least_mib * MIB), (2, most_mib * MIB)]}, x_label="x", y_label="y").axes[0]
    assert [text.get_text() for text in panel.get_yticklabels()] == list(found.values())
    low, high = panel.get_ylim()
    assert low < least_mib * MIB <= most_mib * MIB < high


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def refusing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(PictureError, match="pip install matplotlib"):
        new_figure(1, 1)
