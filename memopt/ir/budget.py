"""What a memory budget makes of a model."""

from dataclasses import dataclass
from typing import Literal

from memopt.ir.plan import Level
from memopt.ir.units import duration, mebibytes, whole_mebibytes


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
        sparable_seconds: how much less it would be where the layer kept most.
    """

    path: str
    block: int
    level: Level
    kept_bytes: int
    seconds: float
    spared_seconds: float
    sparable_seconds: float

    @property
    def reason(self) -> str:
        """Why it has its level, in words."""
        why = "keeping more would exceed the budget" if self.sparable_seconds else "keeping more would spare no time"
        if not self.kept_bytes:
            return why
        spares = f"keeping {mebibytes(self.kept_bytes)} spares {duration(self.spared_seconds)}"
        return f"{spares}; {why}" if self.sparable_seconds else spares


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Levels that keep a training step within a budget.

    Attributes:
        budget_bytes: of everything allocated: parameters, gradients, momentum and activations.
        target: the machine predicted for.
        numerics: "fast" where any layer runs on fused kernels.
        layers: in the order of forward.
        peak_allocated_bytes: predicted for a step with these levels.
        largest_peak_bytes: the same if every workspace that was never measured took as much as it may: an upper bound.
        peak_reserved_bytes: as `peak_allocated_bytes`; None for a target whose allocator is not modelled.
        seconds: predicted time of all that is computed again.
        least_bytes: the least budget that the step can be kept within; None where the model stays as it is, and that
            was not looked for.
        stays_because: why the model stays as it is; None where it is rewritten.
    """

    budget_bytes: int
    target: str
    numerics: Literal["exact", "fast"]
    layers: tuple[PlannedLayer, ...]
    peak_allocated_bytes: int
    largest_peak_bytes: int
    peak_reserved_bytes: int | None
    seconds: float
    least_bytes: int | None = None
    stays_because: str | None = None

    @property
    def untouched(self) -> bool:
        """The model stays as it is, with eager's own kernels."""
        return self.stays_because is not None

    @property
    def levels(self) -> dict[str, Level]:
        """By path of the layer's norm."""
        return {layer.path: layer.level for layer in self.layers}

    @property
    def summary(self) -> str:
        """The plan in a few sentences."""
        reserved = "" if self.peak_reserved_bytes is None else f", reserved {mebibytes(self.peak_reserved_bytes)}"
        counts = {level: sum(layer.level == level for layer in self.layers) for level in ("keep", "concat", "layer")}
        levels = ", ".join(f"{count} × {level}" for level, count in counts.items() if count)
        does = "the model stays as it is" if self.untouched else f"levels {levels or 'none'}"
        again = f", {duration(self.seconds)} of recomputation a step" if self.seconds else ""
        sentences = [
            f"Budget {whole_mebibytes(self.budget_bytes)} on a {self.target}, numerics {self.numerics}: {does}; "
            f"predicted peak allocated {mebibytes(self.peak_allocated_bytes)}{reserved}{again}."
        ]
        if (self.peak_reserved_bytes or 0) > self.budget_bytes:
            sentences.append(
                "On a card with no more than the budget, torch would have to give cached memory back within the step, "
                "which takes time."
            )
        if self.largest_peak_bytes > self.budget_bytes:
            sentences.append(
                f"It may reach {whole_mebibytes(self.largest_peak_bytes)}, beyond the budget, if workspaces of "
                "convolutions that were never measured are at their largest: measure a step on the GPU before you rely "
                "on it."
            )
        if self.least_bytes is not None:
            sentences.append(
                f"The least possible budget is {whole_mebibytes(self.least_bytes)}, of which 1 % and 2 MiB stay free."
            )
        return " ".join(sentences)
