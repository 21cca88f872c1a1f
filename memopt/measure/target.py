"""The machine a prediction is made for, as data: nothing here asks what this machine has."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """What a prediction needs to know of the machine it speaks of.

    Attributes:
        name: how the report calls it.
        device_type: the device type predicted for; operators that torch runs differently there are chosen by
            it.
        rounding_bytes: every allocation is rounded up to a multiple of this.
        workspace_bytes: what libraries (cuBLAS, cuDNN) keep allocated through training, added to the peak
            allocated. The one place for it; 0 models none.
    """

    name: str = "GPU"
    device_type: str = "cuda"
    rounding_bytes: int = 512
    workspace_bytes: int = 0


GPU = Target()
