"""What a user may choose. Few fields, each with its default."""

from dataclasses import dataclass
from typing import Literal, get_args

from memopt.errors import ConfigError

Numerics = Literal["auto", "exact", "fast"]
Recompute = Literal["auto", "concat", "layer"]


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
            output; "layer" keeps only the features and recomputes the bottleneck convolution too. "auto" (the
            default) is "layer".
        verify: compare the rewritten model with the untouched one when `apply` is given example inputs
            (default True).

    Raises:
        ConfigError: a field has a value it cannot have.
    """

    numerics: Numerics = "auto"
    recompute: Recompute = "auto"
    verify: bool = True

    def __post_init__(self) -> None:
        if self.numerics not in get_args(Numerics):
            raise ConfigError(f"Config.numerics is {self.numerics!r}. Choose one of {get_args(Numerics)}.")
        if self.recompute not in get_args(Recompute):
            raise ConfigError(f"Config.recompute is {self.recompute!r}. Choose one of {get_args(Recompute)}.")
