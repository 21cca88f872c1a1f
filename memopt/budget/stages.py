"""What the layers of a model can keep and what its regions need, read off steps predicted at one level each."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from memopt.ir import ChainReport, Level
from memopt.measure.predict import Prediction
from memopt.measure.regions import region_peaks
from memopt.measure.target import Target
from memopt.plan.choice import Layer, Option, Stage


@dataclass(frozen=True, slots=True)
class Predicted:
    """A predicted step, and the chains that were rewritten for it."""

    prediction: Prediction
    chains: tuple[ChainReport, ...]

    @property
    def peak_bytes(self) -> int:
        """Allocated, workspaces that were never measured at their estimates."""
        return known(self.prediction.figures.peak_allocated_bytes)

    @property
    def numerics(self) -> Literal["exact", "fast"]:
        """With whose kernels it is: "fast" where any chain runs on fused ones."""
        return "fast" if any(chain.numerics == "fast" for chain in self.chains) else "exact"


def useful_levels(chains: tuple[ChainReport, ...]) -> tuple[Level, ...]:
    """Levels beside "layer" that may be of use: on fused kernels "keep" is no other than "concat"."""
    return ("concat", "keep") if any(chain.numerics == "exact" for chain in chains) else ("concat",)


def layers_of(uniform: Mapping[Level, Predicted], target: Target) -> dict[str, Layer]:
    """The options of each layer, by its path: chains of one path have one level."""
    least = _saved(uniform["layer"].chains)
    options: dict[str, list[Option]] = defaultdict(list)
    for level in ("layer", "concat", "keep"):
        if level not in uniform:
            continue
        saved, seconds = _saved(uniform[level].chains), _seconds(uniform[level].chains, target)
        for path, saved_bytes in saved.items():
            options[path].append(Option(level, max(0, least[path] - saved_bytes), seconds[path]))
    return {path: Layer(path, tuple(own)) for path, own in options.items()}


def _saved(chains: tuple[ChainReport, ...]) -> dict[str, int]:
    totals: dict[str, int] = defaultdict(int)
    for chain in chains:
        totals[chain.module] += chain.saved_bytes
    return totals


def _seconds(chains: tuple[ChainReport, ...], target: Target) -> dict[str, float]:
    totals: dict[str, float] = defaultdict(float)
    for chain in chains:
        totals[chain.module] += target.seconds(chain.recomputed_bytes, chain.recomputed_flops)
    return totals


def stages_of(uniform: Mapping[Level, Predicted], layers: dict[str, Layer]) -> list[Stage]:
    """The regions of the step with what they need; all as one where they are not nested in time."""
    chains = uniform["layer"].chains
    peaks = {level: region_peaks(p.prediction.trace, p.prediction.step_from) for level, p in uniform.items()}
    names = [name for name, _ in peaks["layer"].inside] if peaks["layer"] is not None else []
    alike = all(p is not None and [name for name, _ in p.inside] == names for p in peaks.values())
    if not alike or {chain.region for chain in chains} != set(names):
        kept = {level: sum(_kept(layer, level) for layer in layers.values()) for level in uniform}
        return [Stage(tuple(layers.values()), {level: p.peak_bytes - kept[level] for level, p in uniform.items()})]
    first: dict[str, str] = {}  # a layer that runs in several regions keeps from the first on
    for chain in sorted(chains, key=lambda chain: names.index(chain.region)):
        first.setdefault(chain.module, chain.region)
    stages = [Stage((), {level: p.after for level, p in peaks.items() if p is not None})]
    held = dict.fromkeys(uniform, 0)
    for number, name in enumerate(names):
        own = tuple(layers[path] for path, region in first.items() if region == name)
        needed: dict[Level, int] = {}
        for level, peak in peaks.items():
            assert peak is not None
            held[level] += sum(_kept(layer, level) for layer in own)
            needed[level] = peak.inside[number][1] - held[level]
        stages.append(Stage(own, needed))
    return stages


def _kept(layer: Layer, level: Level) -> int:
    return next((option.kept_bytes for option in layer.options if option.level == level), 0)


def known(size_bytes: int | None) -> int:
    """A figure that predictions always have."""
    assert size_bytes is not None
    return size_bytes
