"""The report as a JSON document, for programs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from memopt.ir import ChainReport, MemoryPlan
from memopt.measure import Comparison, Equivalence, StepFigures
from memopt.report.rows import block_rows, not_paying

SCHEMA = 1


def comparison_document(
    comparison: Comparison,
    target: str | None = None,
    arguments: Sequence[str] = (),
    options: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """What `memopt optimize --json` writes. Sizes in bytes, times in seconds, None where there is no figure.

    Args:
        comparison: from `memopt.compare`.
        target: what was compared, as the user named it.
        arguments: what it was made with, "name=value" each.
        options: what was asked for of memopt, as the user wrote it.
    """
    shapes = [list(shape) for shape in comparison.input_shapes]
    return {
        "schema": SCHEMA,
        "target": target,
        "arguments": list(arguments),
        "options": dict(options or {}),
        "device": comparison.device,
        "device_name": comparison.device_name,
        "input_shape": shapes[0] if shapes else None,
        "input_shapes": shapes,
        "dtype": _dtype_name(comparison.dtype),
        "amp": None if comparison.amp is None else _dtype_name(comparison.amp),
        "chains": _chains(comparison.explanation.chains),
        "before": _figures(comparison.before, "measured"),
        "after": _figures(comparison.after, "measured"),
        "predicted": {
            "target": comparison.target.name,
            "before": _figures(comparison.predicted_before, "predicted"),
            "after": _figures(comparison.predicted_after, "predicted"),
            "peak_by_category": {
                "before": None if comparison.timeline_before is None else comparison.timeline_before.at_peak,
                "after": None if comparison.timeline_after is None else comparison.timeline_after.at_peak,
            },
        },
        "plan": None if comparison.plan is None else _plan(comparison.plan),
        "equivalence": _equivalence(comparison.equivalence),
        "warnings": list(not_paying(comparison)),
        "notes": [*comparison.explanation.notes, *comparison.notes],
    }


def _chains(chains: tuple[ChainReport, ...]) -> dict[str, Any]:
    rejected = [chain for chain in chains if chain.action == "rejected"]
    return {
        "found": len(chains),
        "rewritten": len(chains) - len(rejected),
        "rejected": [
            {"node": chain.node, "reason": chain.reason, "module": chain.module, "source": chain.source}
            for chain in rejected
        ],
        "blocks": [asdict(row) for row in block_rows(chains)],
    }


def _plan(plan: MemoryPlan) -> dict[str, Any]:
    return {**asdict(plan), "untouched": plan.untouched, "summary": plan.summary}


def _figures(figures: StepFigures | None, source: str) -> dict[str, Any]:
    return {"source": None if figures is None else source, **asdict(figures or StepFigures())}


def _equivalence(equivalence: Equivalence) -> dict[str, Any]:
    document = asdict(equivalence)
    if not math.isfinite(equivalence.max_gradient_error):
        # JSON has no infinity.
        document["max_gradient_error"] = None
    return document


def _dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
