"""The programs of a region's forward and backward: what runs when, and when each value dies."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from memopt.ir import Compute, Gradient, Kind, RegionDraft, RegionPlan, Slot, Step
from memopt.plan.keep import kept_values, needed_by
from memopt.plan.slots import Lifetime, assign_lanes

Program = list[Compute | Gradient]


def plan_region(draft: RegionDraft) -> RegionPlan:
    """Decide what a region keeps and write both of its programs."""
    kept = kept_values(draft)
    draft = replace(draft, steps=_settle_in_place(draft, frozenset(kept)))
    lasting = frozenset(kept) | frozenset(draft.outputs)
    forward: Program = [Compute(index, None, ()) for index in range(len(draft.steps))]
    forward = _with_frees(draft, forward, lasting, inputs_live=True)
    # Concat and norm outputs grow from layer to layer: in fresh memory each would need a larger block.
    forward, forward_lanes = _with_slots(draft, forward, lasting, lambda step: step.op.writes_out)
    backward = _with_frees(draft, _backward(draft, frozenset(kept)), frozenset(), inputs_live=False)
    # In backward sizes shrink, so the allocator reuses its blocks; a norm's output in fresh memory can be let go
    # before the norm's gradient of the same size is allocated.
    backward, backward_lanes = _with_slots(draft, backward, frozenset(kept), lambda step: step.op.kind is Kind.CONCAT)
    return RegionPlan(
        steps=draft.steps,
        input_count=draft.input_count,
        passed_through=draft.passed_through,
        outputs=draft.outputs,
        kept=kept,
        forward=tuple(i for i in forward if isinstance(i, Compute)),
        backward=tuple(backward),
        forward_lanes_bytes=tuple(forward_lanes),
        backward_lanes_bytes=tuple(backward_lanes),
    )


def _settle_in_place(draft: RegionDraft, kept: frozenset[int]) -> tuple[Step, ...]:
    """Overwriting is allowed where the input is a norm's own result that nothing else reads, now or in backward."""
    norms = {step.output for step in draft.steps if step.op.kind in (Kind.BATCH_NORM, Kind.SYNC_BATCH_NORM)}
    readers = Counter(value for step in draft.steps for value in {*step.inputs, *step.leaves})
    free = {value for value in norms - kept - set(draft.outputs) if readers[value] == 1}
    return tuple(replace(step, in_place=step.in_place and step.inputs[0] in free) for step in draft.steps)


def _backward(draft: RegionDraft, kept: frozenset[int]) -> Program:
    """Steps in reverse; before each gradient, what it reads and was neither kept nor computed yet."""
    producer = {step.output: index for index, step in enumerate(draft.steps)}
    program: Program = []
    present: set[int] = set()

    def ensure(value: int) -> None:
        if value in kept or value in present:
            return
        index = producer[value]
        for source in draft.steps[index].leaves:
            ensure(source)
        present.add(value)
        program.append(Compute(index, None, ()))

    for index in reversed(range(len(draft.steps))):
        step = draft.steps[index]
        if step.output not in draft.requires_grad:
            continue
        for value in needed_by(step):
            ensure(value)
        program.append(Gradient(index, ()))
    return program


def _shares_memory(step: Step) -> bool:
    return step.in_place or step.op.aliases


def _reads(draft: RegionDraft, instruction: Compute | Gradient) -> tuple[int, ...]:
    step = draft.steps[instruction.step]
    return step.leaves if isinstance(instruction, Compute) else needed_by(step)


def _with_frees(draft: RegionDraft, program: Program, lasting: frozenset[int], inputs_live: bool) -> Program:
    """Note at each instruction the values that nothing after it reads."""
    last: dict[int, int] = {}
    for instant, instruction in enumerate(program):
        for value in _reads(draft, instruction):
            last[value] = instant
        if isinstance(instruction, Compute):
            last[draft.steps[instruction.step].output] = instant
    freed: dict[int, list[int]] = {}
    for value, instant in last.items():
        if value not in lasting and not (inputs_live and value < draft.input_count):
            freed.setdefault(instant, []).append(value)
    return [replace(instruction, free=tuple(freed.get(instant, ()))) for instant, instruction in enumerate(program)]


def _with_slots(
    draft: RegionDraft, program: Program, lasting: frozenset[int], eligible: Callable[[Step], bool]
) -> tuple[Program, list[int]]:
    """Give passing values that can be written to a given place a slot in a scratch buffer."""
    for step in reversed(draft.steps):  # what a lasting value is a view of lasts as well
        if _shares_memory(step) and step.output in lasting:
            lasting = lasting | frozenset(step.inputs)
    born: dict[int, int] = {}
    died: dict[int, int] = {}
    owner: dict[int, int] = {}  # an in-place result or a view lives where its input lives
    for instant, instruction in enumerate(program):
        if isinstance(instruction, Compute):
            step = draft.steps[instruction.step]
            placed = [value for value in step.inputs if value in owner] if _shares_memory(step) else []
            if placed:
                owner[step.output] = owner[placed[0]]
            elif eligible(step) and step.output not in lasting:
                owner[step.output] = step.output
                born[step.output] = instant
        for value in (*_reads(draft, instruction), *instruction.free):
            if value in owner:
                died[owner[value]] = instant
    values = list(born)
    lifetimes = [Lifetime(born[v], died[v], draft.extents[v].size_bytes) for v in values]
    lanes, sizes = assign_lanes(lifetimes)
    slots = {v: Slot(lane, draft.extents[v].size) for v, lane in zip(values, lanes, strict=True)}
    program = [replace(i, slot=slots.get(draft.steps[i.step].output)) if isinstance(i, Compute) else i for i in program]
    return program, sizes
