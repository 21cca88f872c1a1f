"""A longer search for silent differences than CI makes: generated models, side effects among them.

    python -m tests.property.long_run --models 1000 --seed 20261126
    python -m tests.property.long_run --recheck    # only what the last run found different

Writes what it did and what it found to tests/property/results/long_run.json. Exit status 1 if anything differed.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import memopt
from tests.bench.provenance import commit
from tests.property.models import HARMLESS
from tests.property.recipes import random_recipe
from tests.property.side_by_side import differences, eager_repeats_itself

UNREPEATED = "models that eager itself does not repeat under autocast"
RESULT = Path(__file__).parent / "results" / "long_run.json"


def main() -> int:
    """Run the search and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=20261126)
    parser.add_argument("--recheck", action="store_true")
    options = parser.parse_args()
    if options.recheck:
        return _recheck()
    tally: Counter[str] = Counter()
    effects: Counter[str] = Counter()
    different: list[str] = []
    started = time.monotonic()

    generator = random.Random(options.seed)
    for _ in range(options.models):
        recipe = random_recipe(generator)
        differing, explanation = differences(recipe)
        tally["models"] += 1
        tally["chains found"] += len(explanation.chains)
        tally["chains rewritten"] += len(explanation.rewritten)
        tally["models rewritten"] += bool(explanation.rewritten)
        tally["models with an effect that must be refused"] += recipe.effect not in HARMLESS
        effects[recipe.effect] += 1
        if recipe.effect not in HARMLESS and not any(_names_a_line(note) for note in explanation.notes):
            different.append(f"{recipe}: the effect was not refused ({explanation.notes})")
        if differing and recipe.amp and not eager_repeats_itself(recipe):
            tally[UNREPEATED] += 1
        elif differing:
            different.append(f"{recipe}: {differing[:3]}")
    document = {
        "seed": options.seed,
        "torch": torch.__version__,
        "commit": commit(),
        "memopt": memopt.__version__,
        **tally,
        "effects": dict(sorted(effects.items())),
        "different": different,
        "seconds": round(time.monotonic() - started),
    }
    return _written(document)


def _recheck() -> int:
    """Try again what differed: whether it still does, and whether eager repeats itself there."""
    document = json.loads(RESULT.read_text(encoding="utf-8"))
    generator = random.Random(document["seed"])
    drawn = [random_recipe(generator) for _ in range(document["models"])]
    suspects = [r for r in drawn if any(entry.startswith(f"{r}: ") for entry in document["different"])]
    unrepeated = [r for r in suspects if r.amp and not eager_repeats_itself(r)]
    document[UNREPEATED] = document.get(UNREPEATED, 0) + len(unrepeated)
    document["rechecked at commit"] = commit()
    document["different"] = [
        f"{r}: {found[:3]}" for r in suspects if r not in unrepeated and (found := differences(r)[0])
    ]
    return _written(document)


def _written(document: dict[str, Any]) -> int:
    RESULT.parent.mkdir(exist_ok=True)
    text = json.dumps(document, indent=2, ensure_ascii=False)
    RESULT.write_text(f"{text}\n", encoding="utf-8")
    print(text)
    return 1 if document["different"] else 0


def _names_a_line(note: str) -> bool:
    return ".py:" in note


if __name__ == "__main__":
    sys.exit(main())
