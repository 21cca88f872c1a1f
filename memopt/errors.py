"""Errors a user can meet. Each message gives the place, the fact and the remedy."""


class MemoptError(Exception):
    """Base class of every error raised on purpose by memopt."""


class ConfigError(MemoptError, ValueError):
    """A `Config` field has a value it cannot have."""


class ModelError(MemoptError, TypeError):
    """What was given as a model is none: a class, a function, nothing."""


class BudgetError(MemoptError):
    """A training step cannot be kept within a memory budget."""


class CaptureError(MemoptError):
    """`forward` could not be recorded as a graph."""


class EquivalenceError(MemoptError):
    """The rewritten model does not compute what the untouched model computes."""
