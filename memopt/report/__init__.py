"""What is shown of a comparison: rows and JSON as plain data, and rendering (the only importer of rich)."""

from memopt.report.curves import Curve, draw_curves
from memopt.report.document import SCHEMA, comparison_document
from memopt.report.progress import stage_display, training_display
from memopt.report.rows import (
    FIGURE_NAMES,
    BlockRow,
    FigureRow,
    RejectionRow,
    block_rows,
    equivalence_line,
    figure_rows,
    rejection_rows,
    shape_text,
)
from memopt.report.table import print_as_found, print_comparison, print_explanation, print_table
from memopt.report.tree import explanation_document

__all__ = [
    "FIGURE_NAMES",
    "SCHEMA",
    "BlockRow",
    "Curve",
    "FigureRow",
    "RejectionRow",
    "block_rows",
    "comparison_document",
    "draw_curves",
    "equivalence_line",
    "explanation_document",
    "figure_rows",
    "print_as_found",
    "print_comparison",
    "print_explanation",
    "print_table",
    "rejection_rows",
    "shape_text",
    "stage_display",
    "training_display",
]
