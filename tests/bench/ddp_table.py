"""The README's table of several GPUs, made from the committed CSV rows of ddp_step.py.

python tests/bench/ddp_table.py            # print it, and what the rows do not keep of what is promised
python tests/bench/ddp_table.py --write    # put it into README.md between its markers
"""

import argparse
import re
from pathlib import Path

from rows_table import RESULTS, Row, load, markdown, mib, milliseconds, number

ROOT = Path(__file__).parents[2]
TITLES = {
    ("bc100", "ddp", "batch"): "DenseNet-BC-100 (k = 12), 3×32×32, fp32, DistributedDataParallel",
    ("bc100", "ddp", "sync"): "DenseNet-BC-100 with SyncBatchNorm, DistributedDataParallel",
    ("densenet121", "ddp", "batch"): "densenet121, 3×224×224, fp32, DistributedDataParallel",
    ("densenet121", "ddp", "sync"): "densenet121 with SyncBatchNorm, DistributedDataParallel",
    ("densenet264", "fsdp2", "batch"): "densenet264, 3×224×224, fp32, FSDP2 (`fully_shard` of each block)",
}
FAST_LIMITS = {"bc100": 0.12, "densenet121": 0.22}
"""Activation peak per GPU, × naive."""
QUICKEST = "quickest_step_seconds"
HEADINGS = (
    "GPUs × images",
    "variant",
    "activation peak per GPU",
    "× naive",
    "reserved per GPU",
    "step",
    "efficiency",
    "loss",
)
LEGEND = (
    "*Efficiency*: images per second and GPU, × those of the same variant on one GPU, from the quickest of some "
    "runs of several steps where rows have it: on a host that others share, medians differ by up to a half from run to "
    "run.\n"
)
MARK = re.compile(r"(<!-- several gpus -->\n).*?(<!-- /several gpus -->)", re.DOTALL)


def render(rows: list[Row]) -> str:
    """All tables as Markdown."""
    parts = []
    for key, title in TITLES.items():
        chosen = [row for row in rows if (row["work"], row["parallel"], row["norm"]) == key]
        if chosen:
            parts.append(_table(title, chosen))
    return "\n\n".join([*parts, LEGEND]) if parts else ""


def _table(title: str, rows: list[Row]) -> str:
    def cells(row: Row) -> tuple[str, ...]:
        return (
            f"{row['ranks']} × {row['batch']}",
            row["variant"],
            mib(row["activation_peak_bytes"]),
            number(ratio_of(row, rows), 3),
            mib(row["peak_reserved_bytes"]),
            milliseconds(row["step_seconds"]),
            number(efficiency(row, rows), 2),
            number(float(row["final_loss"]), 5),
        )

    in_order = sorted(rows, key=lambda row: (int(row["ranks"]), -int(row["batch"])))
    return markdown(f"{title}**", rows, HEADINGS, map(cells, in_order))


def naive_of(row: Row, rows: list[Row]) -> Row | None:
    """The row of the untouched model in the same case."""
    case = ("work", "parallel", "norm", "ranks", "batch")
    same = (r for r in rows if all(r[key] == row[key] for key in case) and r["variant"] == "naive")
    return next(same, None)


def ratio_of(row: Row, rows: list[Row]) -> float | None:
    """Activation peak × naive's."""
    naive = naive_of(row, rows)
    return None if naive is None else float(row["activation_peak_bytes"]) / float(naive["activation_peak_bytes"])


def efficiency(row: Row, rows: list[Row]) -> float | None:
    """Images per second and GPU, × those of one GPU by itself."""
    alone = _alone(row, rows)
    if alone is None or row["ranks"] == "1":
        return None
    speed, speed_alone = (int(r["batch"]) / float(r.get(QUICKEST) or r["step_seconds"]) for r in (row, alone))
    return speed / speed_alone


def broken_promises(rows: list[Row]) -> list[str]:
    """What the rows do not keep: memory on several GPUs beside naive's and beside one GPU's, and equal losses."""
    broken = []
    for row in rows:
        naive, ratio = naive_of(row, rows), ratio_of(row, rows)
        if naive is None or ratio is None:
            continue
        case = f"{row['work']} {row['parallel']} {row['norm']} {row['ranks']} × {row['batch']} {row['variant']}"
        loss, naive_loss = float(row["final_loss"]), float(naive["final_loss"])
        is_fast = "fast" in row["variant"]
        # Of more than two ranks' gradients the order of summation depends on the layout of DDP's buckets.
        tolerance = 0.01 if is_fast else 1e-4 if int(row["ranks"]) > 2 else 0.0
        if abs(loss - naive_loss) > tolerance * abs(naive_loss):
            broken.append(f"{case}: loss {loss} is not naive's {naive_loss}")
        alone = _alone(row, rows)
        if alone is None or row["batch"] != alone["batch"] or row["ranks"] == "1":
            continue
        if is_fast and ratio > FAST_LIMITS.get(row["work"], 1.0):
            broken.append(f"{case}: activation peak {ratio:.3f} × naive")
        ratio_alone = ratio_of(alone, rows)
        if "exact" in row["variant"] and ratio_alone is not None and abs(ratio - ratio_alone) > 0.02:
            broken.append(f"{case}: activation peak {ratio:.3f} × naive, on one GPU {ratio_alone:.3f} ×")
    return broken


def _alone(row: Row, rows: list[Row]) -> Row | None:
    """The same variant on one GPU."""
    kind = ("work", "parallel", "norm", "variant")
    return next((r for r in rows if all(r[key] == row[key] for key in kind) and r["ranks"] == "1"), None)


def written(text: str, tables: str) -> str:
    """The README's text with the tables in their place."""
    return MARK.sub(lambda match: f"{match[1]}\n{tables}\n{match[2]}" if tables else f"{match[1]}{match[2]}", text)


def main() -> None:
    """Print the tables, or write them into the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    rows = load(RESULTS / "ddp_step.csv")
    if parser.parse_args().write:
        readme = ROOT / "README.md"
        readme.write_text(written(readme.read_text(), render(rows)))
    else:
        print("\n".join([render(rows), *broken_promises(rows)]))


if __name__ == "__main__":
    main()
