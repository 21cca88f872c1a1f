"""What is allocated while each region of a predicted step runs."""

from dataclasses import dataclass

from memopt.measure.allocator import CachingAllocator
from memopt.measure.trace import Trace, replay


@dataclass(frozen=True, slots=True)
class RegionPeaks:
    """Most allocated in each part of a step.

    Attributes:
        inside: by the name of a region, in the order of forward: until its forward has run, from what ran before it on,
            and the same of its backward. What comes between the last forward and its backward is the last region's.
        after: when every region's backward has run.
    """

    inside: tuple[tuple[str, int], ...]
    after: int


def region_peaks(trace: Trace, step_from: int) -> RegionPeaks | None:
    """The parts of the last step of a trace, which begins with the event `step_from`.

    Returns:
        None where backward does not run the regions in the reverse of forward's order, each once.
    """
    moments = [moment for moment in trace.regions if moment[2] >= step_from]
    names = [name for name, phase, _ in moments if phase == "forward"]
    expected = [(name, "forward") for name in names] + [(name, "backward") for name in reversed(names)]
    if [(name, phase) for name, phase, _ in moments] != expected or len(set(names)) < len(names):
        return None
    step_to = trace.marks[-1][1]
    ends = [at for _, _, at in moments] + [step_to]
    peaks = [0] * len(ends)
    allocator, part = CachingAllocator(), 0
    for index, _ in replay(trace, allocator):
        if index >= step_to:
            break
        if index < step_from:
            continue
        while index >= ends[part]:
            part += 1
        peaks[part] = max(peaks[part], allocator.allocated_bytes)
    pairs = zip(names, peaks[: len(names)], reversed(peaks[len(names) : -1]), strict=True)
    return RegionPeaks(tuple((name, max(forward, backward)) for name, forward, backward in pairs), peaks[-1])
