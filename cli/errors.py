"""The one error that ends a command with a line on stderr and exit status 2."""

import traceback

import torch


class CommandError(Exception):
    """What the user gave cannot be used. The message gives the place, the fact and the remedy in one line."""


def describe(error: BaseException, place: str | None = None) -> str:
    """An exception of the user's code as "ValueError: text (file.py, line 3)".

    Args:
        error: as caught.
        place: file whose last frame in the traceback is named; None for the last frame outside torch.
    """
    text = " ".join(str(error).split()) or "without a message"
    where = _where(error, place)
    return f"{type(error).__name__}: {text}" + (f" ({where})" if where else "")


def kind_of(value: object) -> str:
    """What a value is, with its article: "an int", "None"."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _where(error: BaseException, place: str | None) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if place is not None:
        chosen = [frame for frame in frames if frame.filename == place]
    else:
        chosen = [frame for frame in frames if not frame.filename.startswith((*torch.__path__, "<"))]
    return f"{chosen[-1].filename}, line {chosen[-1].lineno}" if chosen else ""
