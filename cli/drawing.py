"""`--timeline` and `--html`: pictures and pages of a comparison."""

import argparse
from pathlib import Path

from memopt.measure import Comparison
from memopt.report.page import comparison_page, named_timelines, timeline_page
from memopt.report.pictures import require_matplotlib, save_figure, timeline_figure

from .errors import CommandError
from .output import STDOUT, require_writable

SUFFIXES = (".html", ".svg", ".png")


def require_drawable(options: argparse.Namespace) -> None:
    """Find out before the long work whether `draw` will be able to.

    Raises:
        CommandError: a file cannot be written, or its name does not say what it shall hold.
        PictureError: matplotlib is not installed.
    """
    if options.timeline is not None:
        require_matplotlib("--timeline")
        require_writable(options.timeline, "--timeline")
        if Path(options.timeline).suffix not in SUFFIXES:
            raise CommandError(
                f"--timeline {options.timeline} names no kind of picture. End it in {', '.join(SUFFIXES)}."
            )
    if options.html is not None:
        require_matplotlib("--html")
        if options.html == STDOUT:
            raise CommandError(
                "--html - names no file: a page is not written to stdout. Give it a name, such as page.html."
            )
        require_writable(options.html, "--html")


def require_different(options: argparse.Namespace) -> None:
    """One file cannot hold what two options write.

    Raises:
        CommandError: it would have to.
    """
    written: dict[Path, str] = {}
    for name in ("json", "html", "timeline"):
        path = getattr(options, name)
        if path is not None and (name != "json" or path != STDOUT):
            other = written.setdefault(Path(path).resolve(), name)
            if other != name:
                raise CommandError(f"--{other} and --{name} both name {path}. Give each a file of its own.")


def draw(options: argparse.Namespace, comparison: Comparison) -> None:
    """Write what `--timeline` and `--html` ask for.

    Raises:
        CommandError: nothing was predicted, so there is no timeline.
    """
    if options.html is not None:
        Path(options.html).write_text(comparison_page(comparison, options.target), encoding="utf-8")
    if options.timeline is None:
        return
    path, before, after = Path(options.timeline), comparison.timeline_before, comparison.timeline_after
    lines = named_timelines(before, after)
    if not lines:
        why = " ".join(comparison.notes) or "The model is not equivalent."
        raise CommandError(f"--timeline: nothing was predicted, so there is nothing to draw. {why}")
    if path.suffix == ".html":
        path.write_text(timeline_page(before, after, options.target), encoding="utf-8")
    else:
        save_figure(timeline_figure(lines), path)
