"""Which models memopt was tried on, and what came of it: the README's table, made from rows that a run writes.

python tests/wild/models_table.py --run      # train each for two steps, write results/models.csv
python tests/wild/models_table.py --write    # put the rows into README.md between their markers
"""

import argparse
import copy
import csv
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "models.csv"
FIELDS = (
    "model",
    "input",
    "found",
    "rewritten",
    "saved_before",
    "saved_after",
    "equivalent",
    "torch",
    "commit",
    "date",
)
MARK = re.compile(r"(<!-- models -->\n).*?(<!-- /models -->)", re.DOTALL)

Row = dict[str, str]
Subject = tuple[str, Callable[[], nn.Module], tuple[int, ...]]


def subjects() -> Iterator[Subject]:
    """Every model of the table: name, how to make it, the shape of its input."""
    from tests.wild import libraries, models

    image = (2, 3, 64, 64)
    yield "torchvision densenet121", lambda: libraries.torchvision_models.densenet121(num_classes=5), image
    yield "timm densenet121", lambda: libraries.timm.create_model("densenet121", num_classes=5), image
    for name, (make, shape, _) in libraries.DENSE.items():
        yield name, make, shape
    for name in ("dense U-Net", "gated features", "gated concats", "two norms on one concat"):
        yield f"{name} (tests/wild)", models.FORMS[name][0], (2, 3, 16, 16)
    for name, (make, shape) in libraries.LOOK_ALIKES.items():
        yield name, make, shape
    for name, plain in models.LOOK_ALIKES.items():
        yield f"{name} (tests/wild)", plain, (2, 3, 16, 16)


def run() -> None:
    """Try every model and write the rows."""
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for subject in subjects():
            row = _tried(*subject)
            print(*row.values(), sep="\t", flush=True)
            writer.writerow(row)


def _tried(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Row:
    import memopt
    from memopt.capture import through_checkpoints
    from memopt.measure.equivalence import check_equivalence
    from tests.bench.provenance import software
    from tests.helpers import counted_saves

    torch.manual_seed(0)
    naive = make()
    rewritten = memopt.apply(copy.deepcopy(naive))
    batch = torch.randn(shape)
    saved = []
    for model in (copy.deepcopy(naive), copy.deepcopy(rewritten)):
        sizes: list[int] = []
        with counted_saves(sizes):
            result = model(batch)
        saved.append(str(sum(sizes)))
        del result
    with through_checkpoints():
        result = check_equivalence(naive, rewritten, [(batch,)], steps=2)
    explanation = memopt.explain(rewritten)
    return {
        "model": name,
        "input": "×".join(map(str, shape)),
        "found": str(len(explanation.chains)),
        "rewritten": str(len(explanation.rewritten)),
        "saved_before": saved[0],
        "saved_after": saved[1],
        "equivalent": "bit-identical" if result.passed else "NO",
        **software(),
    }


def load(path: Path = RESULTS) -> list[Row]:
    """Every committed row."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def render(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | input | chains found | rewritten | saved for backward, × naive | training steps |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = f"{float(row['saved_after']) / float(row['saved_before']):.3f}" if int(row["rewritten"]) else "—"
        cells = (row["model"], row["input"], row["found"], row["rewritten"], ratio, row["equivalent"])
        lines.append(f"| {' | '.join(cells)} |")
    origin = sorted({f"torch {row['torch']}, commit {row['commit']}, {row['date']}" for row in rows})
    return "\n".join([*lines, "", f"On a CPU, {'; '.join(origin)}.", ""])


def written(text: str, table: str) -> str:
    """The README's text with the table in its place."""
    return MARK.sub(lambda match: f"{match[1]}\n{table}\n{match[2]}", text)


def main() -> None:
    """Try the models, write the table, or print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.run:
        sys.path.insert(0, str(ROOT))
        run()
    table = render(load())
    if options.write:
        readme = ROOT / "README.md"
        readme.write_text(written(readme.read_text(encoding="utf-8"), table), encoding="utf-8")
    elif not options.run:
        print(table)


if __name__ == "__main__":
    main()
