"""`--batch-size auto`: the largest batch whose predicted step fits into the memory there is."""

from collections.abc import Callable

import torch
from torch import nn

import memopt
from memopt.measure import GPU, Target, predict_step
from memopt.measure.memory import available_bytes

from ..errors import CommandError

CPU = Target(name="CPU", device_type="cpu", rounding_bytes=64)
USED_SHARE = 0.9
"""Of the free memory; the rest is for what the allocator cannot use and for what predictions do not know."""
PRECISION = 0.02
"""The batch found is at most this share below the largest."""
FIRST_TRY = 16
LINEAR_TRIES = 3
"""After so many, every other try halves what is left, in case the peak does not grow linearly."""


def largest_batch(peak_bytes: Callable[[int], int], free_bytes: int, most: int, multiple: int = 1) -> int | None:
    """Bisect between a batch that fits and one that does not, guessing as if the peak grew linearly.

    Args:
        peak_bytes: peak memory of a step with a batch.
        free_bytes: what there is.
        most: no batch above this is wanted.
        multiple: the batch is a multiple of this.

    Returns:
        The batch, or None if not even `multiple` fits.
    """
    most -= most % multiple
    fits, too_large = 0, most + multiple
    peaks: dict[int, int] = {}
    guess = min(FIRST_TRY * multiple, most)
    while too_large - fits > max(multiple, PRECISION * fits):
        guess = min(max(guess - guess % multiple, fits + multiple), too_large - multiple)
        peaks[guess] = peak_bytes(guess)
        if peaks[guess] <= free_bytes:
            fits = guess
        else:
            too_large = guess
        halve = len(peaks) > LINEAR_TRIES and len(peaks) % 2 == 0
        guess = (fits + too_large) // 2 if halve else _guess(peaks, free_bytes)
    return fits or None


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


def _guess(peaks: dict[int, int], free: int) -> int:
    """The batch at which a line through the two peaks closest to `free` reaches it."""
    closest = sorted(peaks, key=lambda batch: abs(peaks[batch] - free))[:2]
    first, second = min(closest), max(closest)
    if first == second:
        return int(first * free / max(peaks[first], 1))
    slope = (peaks[second] - peaks[first]) / (second - first)
    return int(first + (free - peaks[first]) / slope) if slope > 0 else second * 2
