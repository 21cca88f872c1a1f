"""Sizes and ranges as people write them: 12GiB, 40:400:60."""

import re

from .errors import CommandError

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_size(text: str, option: str) -> int:
    """Bytes of "12GiB", "800 MiB", "16GB" or a plain number.

    Raises:
        CommandError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = None if match is None else _UNITS.get(match[2].lower())
    if match is None or factor is None or float(match[1]) == 0:
        raise CommandError(f"{option} {text!r} is not a size. Write a number and a unit, for example 12GiB or 800MiB.")
    return int(float(match[1]) * factor)


def is_range(text: str) -> bool:
    """Whether a text is written START:STOP:STEP."""
    return re.fullmatch(r"\d+:\d+:\d+", text) is not None


def parse_range(text: str, option: str) -> tuple[int, ...]:
    """The numbers of "40:400:60": from the first to the second, which is one of them if a step ends there.

    Raises:
        CommandError: it is no such range, or holds fewer than two numbers.
    """
    numbers = [int(part) for part in text.split(":")] if is_range(text) else []
    values = tuple(range(numbers[0], numbers[1] + 1, numbers[2])) if len(numbers) == 3 and numbers[2] else ()
    if len(values) < 2 or values[0] < 1:
        raise CommandError(
            f"{option} {text!r} is not a range of two or more numbers. Write START:STOP:STEP, for example 40:400:60."
        )
    return values
