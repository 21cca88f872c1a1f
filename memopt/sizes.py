"""Sizes as people write them: 12GiB."""

import re

from memopt.errors import ConfigError

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_size(text: str, name: str) -> int:
    """Bytes of "12GiB", "800 MiB", "16GB" or a plain number.

    Args:
        text: what was given.
        name: of the option or field, for the message.

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = None if match is None else _UNITS.get(match[2].lower())
    if match is None or factor is None or float(match[1]) == 0:
        raise ConfigError(f"{name} {text!r} is not a size. Write a number and a unit, for example 12GiB or 800MiB.")
    return int(float(match[1]) * factor)
