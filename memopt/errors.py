"""Errors a user can meet. Each message gives the place, the fact and the remedy."""


class MemoptError(Exception):
    """Base class of every error raised on purpose by memopt."""


class ConfigError(MemoptError, ValueError):
    """A `Config` field has a value it cannot have."""


class ModelError(MemoptError, TypeError):
    """What was given as a model is none: a class, a function, nothing."""


class BudgetError(MemoptError):
    """A training step cannot be kept within a memory budget.

    Attributes:
        least_bytes: the least budget that it can be kept within; None where that is not known.
    """

    def __init__(self, message: str, least_bytes: int | None = None) -> None:
        super().__init__(message)
        self.least_bytes = least_bytes


class CaptureError(MemoptError):
    """`forward` could not be recorded as a graph."""


class EquivalenceError(MemoptError):
    """The rewritten model does not compute what the untouched model computes."""
