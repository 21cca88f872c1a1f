"""Ranges as people write them: 40:400:60."""

import re

from .errors import CommandError


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
            f"{option} {text!r} is not a range of two or more numbers. Write START:STOP:STEP with START below STOP, "
            "for example 40:400:60."
        )
    return values
