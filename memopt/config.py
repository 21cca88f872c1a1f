"""What a user may choose. Few fields, each with its default."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

from memopt.errors import ConfigError
from memopt.ir import Level, parse_size, require_plausible

Numerics = Literal["auto", "exact", "fast"]
Recompute = Literal["auto", "keep", "concat", "layer"]


@dataclass(frozen=True, slots=True)
class Config:
    """How `memopt.apply` rewrites a model.

    Args:
        numerics: "exact" uses the kernels of eager in eager's order and is bit-identical to it. "fast" runs dense
            blocks on fused kernels: compiled by Triton on CUDA, plain torch elsewhere (to try it out; nothing is
            faster there). Its numbers differ from eager's by rounding, by no more than eager's own error. What it
            cannot run is run exactly, with the reason in `explain`. "auto" (the default) is "fast" on CUDA and
            "exact" elsewhere.
        recompute: "concat" recomputes concat → norm → activation in backward and keeps each layer's bottleneck
            output; "layer" keeps only the features and recomputes the bottleneck convolution too; "keep" recomputes
            nothing that eager does not (on fused kernels, which never store concats, it is "concat"). "auto" (the
            default) is "layer". A mapping chooses for each layer: of patterns of the dotted path of the layer's first
            norm, such as {"block3.*": "concat"}, the first that matches counts; "layer" where none does. Of a pattern
            that matches no layer there is a warning once forward is recorded.
        memory_budget: bytes (a MiB or more), or a size such as "6GiB", that a training step's peak allocated stays
            within: parameters, gradients and one momentum for each parameter included. Each layer then keeps as much
            as there is room for, where that spares most time; `recompute` must be "auto". Planned from predicted steps
            for every kind of input anew, which takes some seconds. None (the default): as `recompute` says.
        verify: compare the rewritten model with the untouched one when `apply` is given example inputs
            (default True).

    Raises:
        ConfigError: a field has a value it cannot have.
    """

    numerics: Numerics = "auto"
    recompute: Recompute | Mapping[str, Recompute] = "auto"
    memory_budget: int | str | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        if self.numerics not in get_args(Numerics):
            raise ConfigError(f"Config.numerics is {self.numerics!r}. Choose one of {get_args(Numerics)}.")
        levels = self.recompute.values() if isinstance(self.recompute, Mapping) else (self.recompute,)
        for level in levels:
            if level not in get_args(Recompute):
                raise ConfigError(f"Config.recompute is {level!r}. Choose one of {get_args(Recompute)}.")

        if self.memory_budget is not None and self.recompute != "auto":
            raise ConfigError(
                f"Config.memory_budget chooses the recompute levels, and Config.recompute is {self.recompute!r}. Give "
                "one of them."
            )
        if self.budget_bytes is not None and self.budget_bytes <= 0:
            raise ConfigError(f"Config.memory_budget is {self.memory_budget!r}. Give more than nothing.")
        if not isinstance(self.memory_budget, str | None):
            require_plausible(self.memory_budget, "Config.memory_budget")

    @property
    def budget_bytes(self) -> int | None:
        """The memory budget in bytes; None without one."""
        if isinstance(self.memory_budget, str):
            return parse_size(self.memory_budget, "Config.memory_budget")
        return self.memory_budget

    def level_of(self, path: str) -> Level:
        """How much of a layer is recomputed, by the dotted path of its first norm."""
        chosen: str = "layer"
        if isinstance(self.recompute, Mapping):
            matching = (level for pattern, level in self.recompute.items() if fnmatchcase(path, pattern))
            chosen = next(matching, "layer")
        else:
            chosen = self.recompute
        return "layer" if chosen == "auto" else cast("Level", chosen)

    def unmatched(self, paths: Collection[str]) -> tuple[str, ...]:
        """Patterns of `recompute` that match none of the layers' paths: misspelt, or of another model."""
        patterns = self.recompute if isinstance(self.recompute, Mapping) else ()
        return tuple(p for p in patterns if not any(fnmatchcase(path, p) for path in paths))
