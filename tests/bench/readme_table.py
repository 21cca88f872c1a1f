"""The README's tables of measured figures, made from the committed CSV rows.

python tests/bench/readme_table.py            # print them
python tests/bench/readme_table.py --write    # put them into README.md, and earlier ones beside their rows
"""

import argparse
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import ddp_table
from rows_table import NOTHING, RESULTS, Row, load, markdown, mib, milliseconds, number, rivals, runs

ROOT = Path(__file__).parents[2]
EARLIER = RESULTS / "README.md"
EARLIER_TITLE = """# Measured at earlier commits

The runtime has changed since these rows were measured, or, of predictions and budgets, how these are made: they say
what was, each with its commit. Measured again, a table stands in the README of the project. The change at 9ca20c9
left tapes and kernels as they were at dcdcc88 and eb9685a.

One training step (forward, cross-entropy, backward, SGD with momentum). *Activation peak*: peak allocated during the
step minus what was allocated before it with gradients None. *Checkpointed*: the same model with
`torch.utils.checkpoint` around concat, norm, ReLU and bottleneck convolution, as efficient_densenet_pytorch has it.
*GPU time*: all kernels of one step. *Step*: its time in a plain loop.
"""
TITLES = {
    "bc100-64": "DenseNet-BC-100 (k = 12), 64×3×32×32, fp32",
    "bc100-512": "DenseNet-BC-100 (k = 12), 512×3×32×32, fp32",
    "densenet121-64": "densenet121, 64×3×224×224, fp32",
    "densenet121-64-bf16": "densenet121, 64×3×224×224, bf16 autocast",
}
DEPTH = re.compile(r"bc(\d+)-64$")
MARK = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.DOTALL)


def render(rows: list[Row]) -> str:
    """All tables of steps as Markdown."""
    tables = [(title, [r for r in rows if r["table"] == table]) for table, title in TITLES.items()]
    parts = [_step_table(title, run) for title, chosen in tables for run in runs(chosen)]
    depths = runs(row for row in rows if DEPTH.match(row["table"]))
    parts += map(_depth_table, depths)
    return "\n\n".join(part for part in parts if part) + "\n"


def _step_table(title: str, rows: list[Row]) -> str:
    naive = next(row for row in rows if row["variant"] == "naive")
    memory, gpu = "activation_peak_bytes", "gpu_seconds"
    took_turns = any(row["naive_step_seconds"] for row in rows)

    def cells(row: Row) -> tuple[str, ...]:
        return (
            row["variant"],
            mib(row[memory]),
            _ratio(row[memory], naive[memory], 3),
            mib(row["predicted_bytes"]),
            _ratio(row["peak_reserved_bytes"], row["peak_allocated_bytes"], 2),
            milliseconds(row[gpu]),
            _ratio(row[gpu], naive[gpu], 3),
            milliseconds(row["step_seconds"]),
            *((_ratio(row["step_seconds"], row["naive_step_seconds"], 2),) if took_turns else ()),
        )

    headings = (
        "variant",
        "activation peak",
        "× naive",
        "predicted",
        "reserved / allocated",
        "GPU time",
        "× naive",
        "step",
        *(("× naive in turns",) if took_turns else ()),
    )
    return markdown(f"{title}**", rows, headings, map(cells, rows))


def render_convergence(rows: list[Row]) -> str:
    """Whether models end alike, over seeds."""
    models = dict.fromkeys(row["model"] for row in rows)
    return "\n".join(_trained_alike(model, [row for row in rows if row["model"] == model]) for model in models)


def _trained_alike(model: str, rows: list[Row]) -> str:
    naive = {row["seed"]: row["digest"] for row in rows if row["variant"] == "naive"}

    def cells(variant: str) -> tuple[str, ...]:
        own = [row for row in rows if row["variant"] == variant]
        figures = ([float(row[name]) for row in own] for name in ("test_error", "test_loss"))
        spread = [f"{statistics.mean(each):.3f} ± {statistics.stdev(each):.3f}" for each in figures]
        return (variant, *spread, f"{sum(row['digest'] == naive[row['seed']] for row in own)} of {len(own)}")

    title = f"Trained alike?** {model} on handwritten digits, {rows[0]['steps']} steps, mean ± deviation over seeds"
    title += "; rough: naive from weights a rounding off"
    headings = ("variant", "test error", "test loss", "final weights and buffers bit-equal to naive's")
    placed = [row | {"gpu": f"CPU ({row['device']})"} for row in rows]
    variants = dict.fromkeys(row["variant"] for row in rows)
    return markdown(title, placed, headings, map(cells, variants)) + "\n"


def _depth_table(rows: list[Row]) -> str:
    depths = sorted({int(_depth(row)) for row in rows})
    if len(depths) < 2:
        return ""
    variants = [v for v in ("naive", "memopt exact layer", "memopt fast layer") if any(r["variant"] == v for r in rows)]
    title = "Activation peak over depth**, DenseNet-BC (k = 12), 64×3×32×32, fp32"
    cells = ((str(depth), *(_cell(rows, depth, variant) for variant in variants)) for depth in depths)
    return markdown(title, rows, ("layers", *variants), cells)


def render_deepest(rows: list[Row]) -> str:
    """How very deep nets fared within a given memory, and how long the first step of a process takes."""

    def cells(row: Row) -> tuple[str, ...]:
        seconds = (f"{float(row[n]):.3g} s" for n in ("apply_seconds", "first_step_seconds", "step_seconds"))
        peaks = (mib(row[n]) for n in ("peak_allocated_bytes", "peak_reserved_bytes"))
        variant = f"{row['variant']}, applied lazily" if row["lazy"] == "True" else row["variant"]
        return (row["depth"], variant, row["outcome"], *seconds, *peaks)

    gibibytes = f"{float(rows[0]['cap_bytes']) / 2**30:.0f} GiB"
    title = f"Within {gibibytes}**, DenseNet-BC (k = 12), 64×3×32×32, fp32; no kernel compiled before"
    headings = ("layers", "variant", "outcome", "`apply` with example inputs", "first step", "step")
    return markdown(title, rows, (*headings, "peak allocated", "reserved"), map(cells, rows)) + "\n"


def render_predicted(rows: list[Row]) -> str:
    """How far predictions are off, a row a model."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))

    def cells(model: str) -> tuple[str, ...]:
        own = {row["variant"]: row for row in rows if row["model"] == model}
        first = own[variants[0]]
        figures = ("activation_peak_bytes", "peak_allocated_bytes", "peak_reserved_bytes")
        errors = (
            ", ".join(_error(own[variant], figure) for figure in figures) if variant in own else NOTHING
            for variant in variants
        )
        return (
            f"{model} {first['amp']}".strip(),
            first["input"],
            "yes" if first["held_out"] == "True" else "",
            *errors,
        )

    title = "Predicted against measured**: error of the activation peak, of the peak allocated and of the peak reserved"
    return markdown(title, rows, ("model", "input", "never fitted", *variants), map(cells, models)) + "\n"


def render_budgets(rows: list[Row]) -> str:
    """What budgets took: of each model what compares with them, and every third budget down to the least."""
    return "\n".join(_within_budgets(table, rows) for table in dict.fromkeys(row["table"] for row in rows))


def _within_budgets(table: str, rows: list[Row]) -> str:
    budgets = [row for row in rows if row["table"] == table]
    others = [row | {"budget_bytes": "", "predicted_bytes": ""} for row in rivals(table)]
    last = (len(budgets) - 1) % 3

    def cells(row: Row) -> tuple[str, ...]:
        sizes = (mib(row[name]) for name in ("budget_bytes", "predicted_bytes", "peak_allocated_bytes"))
        return (row["variant"], *sizes, milliseconds(row["gpu_seconds"]))

    title = f"Within a memory budget**, {TITLES[table]}, fused kernels"
    headings = ("variant", "budget", "predicted peak allocated", "measured", "GPU time")
    return markdown(title, [*others, *budgets], headings, map(cells, [*others, *budgets[last::3]])) + "\n"


def render_limits(rows: list[Row]) -> str:
    """The largest batch and depth of each variant within a memory, and whether they were trained there."""
    questions = list(dict.fromkeys(row["largest"] for row in rows))
    outcomes = {"True": ", trained", "False": ", out of memory", "": ""}
    sizes = {
        (row["largest"], row["variant"]): f"{int(row['size']):,}{outcomes[row['trained']]}"
        for row in rows
        if row["size"]
    }

    def cells(variant: str) -> tuple[str, ...]:
        return (variant, *(sizes.get((question, variant), NOTHING) for question in questions))

    gib = int(rows[0]["memory_bytes"]) // 2**30
    batch, _, image = rows[0]["input"].partition("x")
    what = f"DenseNet-BC (k = 12), {image}, fp32: batch at 100 layers, depth at batch {batch}"
    title = f"The largest in {gib} GiB**, {what}, predicted by `memopt limits`"
    headings = ("variant", *(f"largest {question}" for question in questions))
    return markdown(title, rows, headings, map(cells, dict.fromkeys(row["variant"] for row in rows))) + "\n"


def render_training(rows: list[Row]) -> str:
    """Training end to end, the loader running."""

    def cells(row: Row) -> tuple[str, ...]:
        memory, step = mib(row["activation_peak_bytes"]), milliseconds(row["step_seconds"])
        ratios = (
            f"{float(row['memory_ratio']):.3f}",
            f"{float(row['step_ratio']):.2f}",
            f"{float(row['gpu_ratio']):.2f}",
        )
        share, gpu = f"{float(row['loading_share']):.1%}", milliseconds(row["gpu_seconds"])
        return (row["variant"], memory, ratios[0], step, ratios[1], share, gpu, ratios[2])

    title = "`memopt train`'s loop**, DenseNet-BC-100, batch 64, its loader running"
    headings = (
        "variant",
        "activation peak",
        "× naive",
        "step",
        "× naive",
        "waiting for batches",
        "GPU time",
        "× naive",
    )
    return markdown(title, rows, headings, map(cells, rows)) + "\n"


def _error(row: Row, figure: str) -> str:
    return f"{float(row[f'predicted_{figure}']) / float(row[f'measured_{figure}']) - 1:+.1%}"


def _cell(rows: list[Row], depth: int, variant: str) -> str:
    found = [r for r in rows if int(_depth(r)) == depth and r["variant"] == variant]
    return mib(found[0]["activation_peak_bytes"]) if found else NOTHING


def _depth(row: Row) -> str:
    match = DEPTH.match(row["table"])
    assert match is not None
    return match[1]


def _ratio(one: str, other: str, digits: int) -> str:
    return number(float(one) / float(other) if one and other else None, digits)


RENDERED: dict[str, Callable[[list[Row]], str]] = {
    "train_step": render,
    "deepest": render_deepest,
    "limits": render_limits,
    "predicted": render_predicted,
    "budget": render_budgets,
    "train_demo": render_training,
    "convergence": render_convergence,
    "ddp_step": ddp_table.render,
}
"""How the rows of each file are shown."""


def everything() -> str:
    """What stands in the README between its markers; several GPUs have markers of their own."""
    return _tables(RESULTS, [name for name in RENDERED if name != "ddp_step"])


def earlier() -> str:
    """Rows of earlier commits, which stand beside the CSV files until they are measured again."""
    return f"{EARLIER_TITLE}\n{_tables(RESULTS / 'earlier', list(RENDERED))}"


def _tables(folder: Path, names: list[str]) -> str:
    loaded = {name: load(folder / f"{name}.csv") for name in names}
    return "\n".join(RENDERED[name](rows) for name, rows in loaded.items() if rows)


def written(text: str, tables: str) -> str:
    """The README's text with the tables in their place."""
    return MARK.sub(lambda match: f"{match[1]}\n{tables}\n{match[2]}", text)


def main() -> None:
    """Print the tables, or write them into the README and beside the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    tables = everything()
    if parser.parse_args().write:
        readme = ROOT / "README.md"
        readme.write_text(written(readme.read_text(), tables))
        EARLIER.write_text(earlier())
    else:
        print(tables)


if __name__ == "__main__":
    main()
