"""Sizes, times and lists as people read and write them: 12GiB, 297.1 MiB, 6.7 ms, a, b, c and 2 more."""

import re
from collections.abc import Sequence

from memopt.errors import ConfigError

MIB = 2**20
NO_LESS_BYTES = MIB
"""What nobody trains in: a smaller number without a unit was meant in another one."""

NAMES_SHOWN = 3

_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_size(text: str, name: str) -> int:
    """Bytes of "12GiB", "800 MiB", "16GB", or of a plain number that can be meant in bytes.

    Args:
        text: what was given.
        name: of the option or field, for the message.

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = None if match is None else _UNITS.get(match[2].lower() or "b")
    if match is None or factor is None or float(match[1]) == 0:
        raise ConfigError(f"{name} {text!r} is not a size. Write a number and a unit, for example 12GiB or 800MiB.")
    if not match[2]:
        require_plausible(float(match[1]), name)
    return int(float(match[1]) * factor)


def require_plausible(size_bytes: float, name: str) -> None:
    """Refuse a bare number that would be bytes and cannot be meant so.

    Raises:
        ConfigError: it is less than a mebibyte.
    """
    if size_bytes < NO_LESS_BYTES:
        number = f"{size_bytes:.15g}"
        raise ConfigError(f"{name} {number} would be {number} bytes. Write the unit too, for example {number}GiB.")


def mebibytes(size_bytes: float) -> str:
    """A size in bytes as "12.3 MiB"."""
    size = size_bytes / MIB
    return f"{size:,.1f} MiB" if size >= 10 or size == 0 else f"{size:.2f} MiB"


def whole_mebibytes(size_bytes: int) -> str:
    """A size in bytes as "13 MiB", rounded up: so much is enough."""
    return f"{-(-size_bytes // MIB):,} MiB"


def duration(seconds: float) -> str:
    """A time as "2.10 s", "6.7 ms", "54 µs" or "under 1 µs"."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    # Below this a tenth of a millisecond says nothing.
    if seconds >= 1e-4 or seconds == 0:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:,.0f} µs" if seconds >= 1e-6 else "under 1 µs"


def first_names(names: Sequence[str]) -> str:
    """The first few of a list of names, and how many more there are."""
    shown, more = ", ".join(names[:NAMES_SHOWN]), len(names) - NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
