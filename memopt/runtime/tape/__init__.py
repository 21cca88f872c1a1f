"""Running the same straight line of operations again and again with little Python in between.

What a region does in forward or backward depends on shapes and settings alone. So it is written down once, by running
it on fake tensors (`recorder`): which tensors are made, which operators run on which parts of them. Where each tensor
lies is settled then, too (`layout`): all that passes within one call shares a single buffer. From then on the tape is
played (`player`): a few allocations, and for each kernel one call of its launcher with addresses for arguments.

A CUDA graph would need the same addresses at every step, and would keep its memory between steps; a tape needs neither.
"""

from memopt.runtime.tape.player import Tape
from memopt.runtime.tape.recorder import NotTapedError, described, record

__all__ = ["NotTapedError", "Tape", "described", "record"]
