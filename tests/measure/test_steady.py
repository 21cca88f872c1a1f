from memopt.ir import MIB
from memopt.measure.steady import repeated, served
from memopt.measure.trace import BACKWARD_BEGINS, FORWARD_BEGINS, STEP_ENDS, Origin, SimulatedDevice

HERE = Origin("here")


def step(device: SimulatedDevice, sizes_mib: list[int]) -> None:
    device.mark(FORWARD_BEGINS)
    held = [device.allocate(size * MIB, HERE) for size in sizes_mib]
    device.mark(BACKWARD_BEGINS)
    for number in held:
        device.free(number)
    device.mark(STEP_ENDS)


def test_a_repeated_step_is_served_as_steps_one_after_another_are() -> None:
    sizes = [30, 12, 45, 3]
    one, four = SimulatedDevice(), SimulatedDevice()
    one.allocate(5 * MIB, HERE)
    four.allocate(5 * MIB, HERE)
    step(one, sizes)
    for _ in range(4):
        start = len(four.trace.events)
        step(four, sizes)
    trace, step_from = repeated(one.trace, 1, 3)
    assert step_from == start
    assert [event.size_bytes for event in trace.events] == [event.size_bytes for event in four.trace.events]
    assert served(trace, step_from, False) == served(four.trace, start, False)
    # 45 MiB get a segment of 46, of which a rest of 1 MiB is not split off.
    assert served(trace, step_from, False).saved_bytes == (30 + 12 + 46 + 3) * MIB
    assert len({event.number for event in trace.events}) == 17  # no request is another's


def test_what_a_step_replaces_is_freed_by_the_next() -> None:
    device = SimulatedDevice()
    state = device.allocate(20 * MIB, HERE)
    device.mark(FORWARD_BEGINS)
    device.allocate(20 * MIB, HERE)
    device.mark(BACKWARD_BEGINS)
    device.free(state)
    device.mark(STEP_ENDS)
    trace, step_from = repeated(device.trace, 1, 2)
    last = served(trace, step_from, False)
    assert (last.before_bytes, last.peak_allocated_bytes, last.peak_reserved_bytes) == (20 * MIB, 40 * MIB, 40 * MIB)
    assert step_from == 5


def test_a_step_that_leaves_more_than_it_found_is_not_repeated() -> None:
    device = SimulatedDevice()
    device.mark(FORWARD_BEGINS)
    device.allocate(MIB, HERE)
    device.mark(BACKWARD_BEGINS)
    device.mark(STEP_ENDS)
    assert repeated(device.trace, 0, 3) == (device.trace, 0)


def test_the_moment_of_each_peak() -> None:
    device = SimulatedDevice()
    step(device, [30, 40])
    start = len(device.trace.events)
    step(device, [40, 12])
    last = served(device.trace, start, False)
    assert (last.peak_at, last.reserved_at) == (start + 1, 1)
    assert (last.peak_allocated_bytes, last.peak_reserved_bytes) == (52 * MIB, 70 * MIB)
