"""`--batch-size auto`: the largest batch whose predicted step fits into the memory there is."""

from collections.abc import Callable

import torch
from torch import nn

import memopt
from memopt.measure import GPU, Target, predict_step
from memopt.measure.memory import available_bytes
from memopt.measure.scaling import largest_fitting

from ..errors import CommandError

CPU = Target(name="CPU", device_type="cpu", rounding_bytes=64)
USED_SHARE = 0.9
"""Of the free memory; the rest is for what the allocator cannot use and for what predictions do not know."""
PRECISION = 0.02
"""The batch found is at most this share below the largest."""
FIRST_TRY = 16


def largest_batch(peak_bytes: Callable[[int], int], free_bytes: int, most: int, multiple: int = 1) -> int | None:
    """The largest batch that fits, or None if not even `multiple` does.

    Args:
        peak_bytes: peak memory of a step with a batch.
        free_bytes: what there is.
        most: no batch above this is wanted.
        multiple: the batch is a multiple of this.
    """
    found = largest_fitting(lambda n: peak_bytes(n * multiple), free_bytes, FIRST_TRY, PRECISION, most // multiple)
    return None if found is None else found * multiple


def predicted_peak(
    make_model: Callable[[], nn.Module],
    image_shape: tuple[int, ...],
    device_type: str,
    amp: torch.dtype | None,
    config: memopt.Config | None,
) -> Callable[[int], int]:
    """Predicted peak allocated of a step, by batch, on fake tensors.

    Args:
        make_model: builds the model on the CPU.
        image_shape: (C, H, W).
        device_type: "cuda" or "cpu".
        amp: autocast dtype or None.
        config: how memopt is applied; None if it is not.
    """
    if config is not None and config.numerics == "auto" and device_type == "cuda":
        config = memopt.Config(numerics="fast", recompute=config.recompute)

    def peak_bytes(batch: int) -> int:
        inputs = (torch.empty((batch, *image_shape), device="meta"),)
        figures = predict_step(
            make_model,
            inputs,
            GPU if device_type == "cuda" else CPU,
            amp=amp,
            apply=lambda model: model if config is None else memopt.apply(model, config=config),
        )
        assert figures.peak_allocated_bytes is not None
        return figures.peak_allocated_bytes

    return peak_bytes


def free_bytes(device: torch.device) -> int:
    """Memory that a step may take.

    Raises:
        CommandError: the system does not say.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    if free is None:
        raise CommandError("--batch-size auto: this system does not say how much memory is free. Give a number.")
    return int(USED_SHARE * free)
