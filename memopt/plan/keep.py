"""Which values a region keeps for backward, by the recompute level of each step."""

from memopt.ir import NEEDS_INPUT, NEEDS_OUTPUT, Kind, RegionDraft, Step


def needed_by(step: Step) -> tuple[int, ...]:
    """Values that the gradient of a step reads."""
    inputs = step.inputs if step.op.kind in NEEDS_INPUT else ()
    outputs = (step.output,) if step.op.kind in NEEDS_OUTPUT else ()
    return inputs + outputs


def kept_values(draft: RegionDraft) -> tuple[int, ...]:
    """Values to save: those that backward reads, directly or to compute others again, and may not compute again.

    Level "layer" keeps the features alone. "concat" also keeps whatever lies behind a layer's first convolution, as
    eager does, so that no convolution runs twice. "keep" keeps what eager keeps.
    """
    recomputed = _recomputed(draft)
    producer = {step.output: step for step in draft.steps}
    kept: set[int] = set()
    seen: set[int] = set()
    todo = [v for step in draft.steps if step.output in draft.requires_grad for v in needed_by(step)]
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in recomputed:
            todo.extend(producer[value].leaves)
        else:
            kept.add(value)
    return tuple(sorted(kept))


def _recomputed(draft: RegionDraft) -> frozenset[int]:
    features = set(draft.outputs) | set(range(draft.input_count))
    for step in draft.steps:
        if step.op.kind is Kind.CONCAT:
            features.update(step.leaves)
    whole_layers = {s.output for s in draft.steps if s.level == "layer" and s.output not in features}
    expanded: set[int] = set()
    for step in draft.steps:
        if step.level == "keep":
            continue
        if step.op.kind is Kind.CONCAT:
            expanded.add(step.output)
        elif step.op.kind is Kind.CONVOLUTION or step.output in features:
            continue
        elif any(source in expanded or source in features for source in step.inputs):
            expanded.add(step.output)
    return frozenset(expanded | whole_layers)
