"""Which scratch buffer each passing value gets."""

from memopt.ir import Compute, Extent, Kind, OpSpec, RegionDraft, Role, Step
from memopt.plan import plan_region


def _step(kind: Kind, inputs: tuple[int, ...], output: int, **options: bool) -> Step:
    op = OpSpec(kind, Role.GLUE, from_module=False, **options)
    return Step(op, inputs, inputs, tuple(3 for _ in inputs), output, False, f"step_{output}")


def test_what_a_view_looks_at_keeps_its_buffer_as_long_as_the_view_is_read() -> None:
    steps = (
        _step(Kind.CONCAT, (0,), 1, writes_out=True),
        _step(Kind.JOINT, (1,), 2, aliases=True),
        _step(Kind.BATCH_NORM, (2,), 3, writes_out=True),
        _step(Kind.JOINT, (2, 3), 4),
    )
    values = range(5)
    draft = RegionDraft(steps, 1, (), (4,), frozenset(values), {v: Extent((2, 3, 4, 4), 384) for v in values})

    plan = plan_region(draft)

    slots = [instruction.slot for instruction in plan.forward if isinstance(instruction, Compute)]
    concat, norm = slots[0], slots[2]
    assert concat is not None
    assert norm is not None
    assert concat.lane != norm.lane


def test_what_leaves_the_region_as_a_view_lies_in_no_scratch() -> None:
    steps = (_step(Kind.CONCAT, (0,), 1, writes_out=True), _step(Kind.JOINT, (1,), 2, aliases=True))
    draft = RegionDraft(steps, 1, (), (2,), frozenset(range(3)), {v: Extent((2, 3, 4, 4), 384) for v in range(3)})

    plan = plan_region(draft)

    assert all(instruction.slot is None for instruction in plan.forward)
