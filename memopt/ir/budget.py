"""What a memory budget makes of a model."""

from dataclasses import dataclass

from memopt.ir.plan import Level


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """What a memory budget makes of a layer.

    Attributes:
        path: dotted path of its norm's module.
        block: as in `ChainReport`.
        level: how much it recomputes.
        kept_bytes: what it keeps for that, beyond its feature.
        seconds: predicted time for computing the rest again.
        spared_seconds: how much more it would be at level "layer".
    """

    path: str
    block: int
    level: Level
    kept_bytes: int
    seconds: float
    spared_seconds: float

    @property
    def reason(self) -> str:
        """Why it has its level, in words."""
        if not self.kept_bytes:
            return "the budget's memory spares more time elsewhere" if self.seconds else "there is nothing to spare"
        return f"keeping {self.kept_bytes / 2**20:,.1f} MiB spares {self.spared_seconds * 1e6:,.0f} µs"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Levels that keep a training step within a budget.

    Attributes:
        budget_bytes: of everything allocated: parameters, gradients, momentum and activations.
        layers: in the order of forward.
        peak_allocated_bytes: predicted for a step with these levels.
        peak_reserved_bytes: likewise; None for a target whose allocator is not modelled.
        least_bytes: the least predicted peak allocated that is known of.
        seconds: predicted time of all that is computed again.
        untouched: the model as it is fits the budget, with eager's own kernels.
    """

    budget_bytes: int
    layers: tuple[PlannedLayer, ...]
    peak_allocated_bytes: int
    peak_reserved_bytes: int | None
    least_bytes: int
    seconds: float
    untouched: bool = False

    @property
    def levels(self) -> dict[str, Level]:
        """By path of the layer's norm."""
        return {layer.path: layer.level for layer in self.layers}

    @property
    def summary(self) -> str:
        """The plan in a sentence."""
        reserved = "" if self.peak_reserved_bytes is None else f", reserved {_mib(self.peak_reserved_bytes)}"
        counts = {level: sum(layer.level == level for layer in self.layers) for level in ("keep", "concat", "layer")}
        levels = ", ".join(f"{count} × {level}" for level, count in counts.items() if count)
        what = "the model fits as it is" if self.untouched else f"levels {levels or 'none'}"
        again = f"{self.seconds * 1e3:,.1f} ms of recomputation a step"
        return (
            f"Budget {_mib(self.budget_bytes)}: {what}; predicted peak allocated {_mib(self.peak_allocated_bytes)}"
            f"{reserved}, {again}. The least possible is {_mib(self.least_bytes)}."
        )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
