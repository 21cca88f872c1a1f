import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from memopt_cli import limits
from memopt_cli.main import main

from memopt.measure import StepFigures
from memopt.measure.predict import predict
from memopt.measure.steady import reserved_within

DEEP = """
import torch
from torch import nn


class Deep(nn.Module):
    def __init__(self, depth=6, width=64):
        super().__init__()
        if depth % 3:
            raise ValueError("depth is a multiple of 3")
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x
"""


TWO = """
import torch
from torch import nn


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 3)

    def forward(self, x, y):
        return self.layer(torch.cat([x.mean(2), y], 1))
"""


def answers(text: str) -> dict[tuple[str, str], str]:
    """Size by question and variant."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["largest"]:
            question = "batch size" if words[1] == "batch" else words[1]
            variant = next(v for v in ("naive", "memopt concat", "memopt layer") if v in line)
            found[question, variant] = line.partition(variant)[2].split()[0].replace(",", "")
    return found


def test_the_largest_batch_and_depth_fit_and_the_next_do_not(
    write: Callable[[str, str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("deep.py", DEEP)
    command = ["limits", f"{path}:Deep", "--batch-size", "4096", "--memory", "100MiB", "--recompute", "layer"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "depths at batch 4096" in text
    found = answers(text)
    namespace: dict[str, type[torch.nn.Module]] = {}
    exec(DEEP, namespace)

    def reserved(batch: int, depth: int) -> int:
        x = (torch.empty(batch, 64, device="meta"),)
        return reserved_within(predict(lambda: namespace["Deep"](depth), x).trace, 100 * 2**20, False)

    batch, depth = int(found["batch size", "naive"]), int(found["depth", "naive"])
    assert reserved(batch, 6) <= 100 * 2**20 < reserved(batch + 1, 6)
    assert depth % 3 == 0
    assert reserved(4096, depth) <= 100 * 2**20 < reserved(4096, depth + 3)


def test_memopt_allows_a_larger_batch(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["limits", f"{tiny}:Tiny", "--arg", "layers=8", "--memory", "200MiB"]) == 0
    text = capsys.readouterr().out
    assert "depth" not in text, "which is no argument of this model"
    found = {variant: int(size) for (_, variant), size in answers(text).items()}
    assert found["memopt layer"] > 1.5 * found["naive"]


def test_an_answer_is_printed_as_soon_as_it_is_found(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large model takes minutes, and nothing tells of progress where there is no terminal."""
    found = limits.predicted_within

    def interrupted(job: limits.Job, variant: limits.Variant, memory_bytes: int) -> tuple[StepFigures, int | None]:
        if variant.label == "memopt layer":
            raise KeyboardInterrupt
        return found(job, variant, memory_bytes)

    monkeypatch.setattr(limits, "predicted_within", interrupted)
    assert main(["limits", f"{tiny}:Tiny", "--memory", "100MiB"]) == 130
    assert {variant for _, variant in answers(capsys.readouterr().out)} == {"naive", "memopt concat"}


def test_the_answers_as_json(tiny: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["limits", f"{tiny}:Tiny", "--memory", "100MiB", "--recompute", "layer"]
    assert main([*command, "--json", str(tmp_path / "limits.json")]) == 0
    shown = answers(capsys.readouterr().out)
    document = json.loads((tmp_path / "limits.json").read_text())
    assert document["memory_bytes"] == 100 * 2**20
    assert document["target"] == f"{tiny}:Tiny"
    found = {(one["largest"], one["variant"]): one for one in document["limits"]}
    assert {key: str(one["size"]) for key, one in found.items()} == shown
    for one in found.values():
        assert one["peak_allocated_bytes"] <= one["peak_reserved_bytes"] <= 100 * 2**20
        assert one["trained"] is None
    assert main([*command, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == document


def test_a_batch_that_fits_beyond_ones_that_do_not_is_found(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def predicted(job: limits.Job, variant: limits.Variant, memory_bytes: int) -> tuple[StepFigures, int | None]:
        batch = job.inputs[0].shape[0]
        allocated_bytes = (20 + batch) * 2**20
        reserved_bytes = allocated_bytes if batch <= 40 or batch == 60 else 2**30
        return StepFigures(peak_allocated_bytes=allocated_bytes, peak_reserved_bytes=reserved_bytes), None

    monkeypatch.setattr(limits, "predicted_within", predicted)
    assert main(["limits", f"{tiny}:Tiny", "--memory", "100MiB"]) == 0
    found = answers(capsys.readouterr().out)
    assert {size for (name, _), size in found.items() if name == "batch size"} == {"60"}


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """As on a machine with a GPU on which no more than 40 images train; what is tried there."""
    tried: list[tuple[str, int]] = []

    def trains(job: limits.Job, variant: limits.Variant, memory_bytes: int, device: torch.device) -> bool:
        tried.append((variant.label, job.inputs[0].shape[0]))
        return job.inputs[0].shape[0] <= 40

    make_job = limits.make_job
    monkeypatch.setattr(limits, "make_job", lambda options: replace(make_job(options), device=torch.device("cuda")))
    monkeypatch.setattr(limits, "trains", trains)
    return tried


def test_what_does_not_train_on_the_gpu_is_made_smaller_until_it_does(
    tiny: str, on_gpu: list[tuple[str, int]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["limits", f"{tiny}:Tiny", "--memory", "100MiB", "--recompute", "layer"]
    assert main([*command, "--json", str(tmp_path / "limits.json")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for one in json.loads((tmp_path / "limits.json").read_text())["limits"]:
        sizes = [size for label, size in on_gpu if label == one["variant"]]
        assert sizes[0] == one["predicted_size"] > 40
        assert sizes[1] == round(0.98 * sizes[0])
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] == one["size"] <= 40 < sizes[-2]
        assert one["trained"] is True
        assert one["peak_reserved_bytes"] <= 100 * 2**20
        assert (
            f"{one['predicted_size']} (largest batch size, {one['variant']})" in text.partition("on the GPU here: ")[2]
        )


def test_it_says_whose_kernels_and_what_estimates_may_come_to(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for numerics in ("auto", "exact"):
        command = ["limits", f"{tiny}:Tiny", "--memory", "72MiB", "--recompute", "layer", "--numerics", numerics]
        assert main(command) == 0
        texts.append(" ".join(capsys.readouterr().out.split()))
    assert 'memopt with numerics "auto" (fused kernels, where a model has some)' in texts[0]
    assert 'memopt with numerics "exact" (eager\'s kernels)' in texts[1]
    assert "MiB (largest batch size, naive)" in texts[0].partition("more than the memory is allocated: ")[2]


def test_every_input_is_named(
    write: Callable[[str, str], str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["limits", f"{write('two.py', TWO)}:Two", "--input", "8x4x50", "--input", "8x3", "--memory", "100MiB"]
    assert main([*command, "--recompute", "layer", "--json", str(tmp_path / "limits.json")]) == 0
    assert "input 4x50 and 3" in capsys.readouterr().out
    assert json.loads((tmp_path / "limits.json").read_text())["input_shapes"] == [[8, 4, 50], [8, 3]]


def test_an_answer_file_that_cannot_be_written_is_found_first(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(limits, "make_job", lambda options: pytest.fail("the work began"))
    assert main(["limits", f"{tiny}:Tiny", "--memory", "1GiB", "--json", str(tmp_path / "none" / "a.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_where_nothing_fits(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["limits", f"{tiny}:Tiny", "--memory", "10MiB", "--recompute", "layer"]) == 0
    out = capsys.readouterr().out
    assert answers(out)["batch size", "naive"] == "none"
    assert "none: the smallest takes more already" in out


def test_the_memory_must_be_a_size(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["limits", f"{tiny}:Tiny", "--memory", "much"]) == 2
    assert "is not a size" in capsys.readouterr().err
