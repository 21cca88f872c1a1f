import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import memopt_cli.main
import pytest
import torch
from memopt_cli.main import main

import memopt
from memopt.measure import StepFigures

Run = Callable[..., tuple[int, str, str]]

SCHEMA_KEYS = {
    "schema",
    "target",
    "device",
    "input_shape",
    "dtype",
    "chains",
    "before",
    "after",
    "predicted",
    "equivalence",
}

PARTLY = """
import torch
from torch import nn
from tiny import Tiny


class Partly(Tiny):
    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        total = features[-1].mul_(2.0).mean()
        return self.classifier(torch.cat(features, 1).mean((2, 3))) + total
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command; its exit status, stdout and stderr."""

    def run(*argv: str) -> tuple[int, str, str]:
        status = main(list(argv))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def small() -> tuple[str, ...]:
    return "--input", "4x3x8x8", "--device", "cpu"


def assert_one_line(status: int, out: str, err: str) -> None:
    assert (status, out) == (2, "")
    assert err.startswith("memopt: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_optimize_predicts_and_checks(run: Run, tiny: str, small) -> None:
    status, out, err = run("optimize", f"{tiny}:Tiny", *small)
    assert (status, err) == (0, "")
    assert "3 chains found, 3 rewritten" in out
    assert "Equivalent: outputs, gradients and buffers are bit-identical" in out
    assert "predicted for a GPU" in out
    assert "measured on" not in out


def test_report_measures_too_and_writes_the_document(run: Run, tiny: str, small, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    status, out, err = run("optimize", f"{tiny}:Tiny", "--report", "--json", str(path), *small)
    assert (status, err) == (0, "")
    assert "measured on the CPU" in out
    assert "step time, median of 2" in out
    document = json.loads(path.read_text())
    assert document.keys() >= SCHEMA_KEYS
    assert document["target"] == f"{tiny}:Tiny"
    assert document["input_shape"] == [4, 3, 8, 8]
    assert document["chains"]["found"] == document["chains"]["rewritten"] == 3
    assert document["after"]["activation_peak_bytes"] < document["before"]["activation_peak_bytes"]
    assert document["before"]["step_seconds"] > 0
    assert document["equivalence"]["passed"] is True


def test_json_to_stdout_is_alone_there(run: Run, write, tiny: str, small) -> None:
    path = write(
        "noisy.py", "from tiny import Tiny\nprint('importing')\ndef noisy():\n    print('making')\n    return Tiny()\n"
    )
    status, out, err = run("optimize", f"{path}:noisy", "--json", "-", *small)
    assert status == 0
    document = json.loads(out)
    assert document["before"]["activation_peak_bytes"] is None
    assert document["predicted"]["before"]["activation_peak_bytes"] > 0
    assert "importing" in err
    assert "making" in err


def test_quiet_prints_nothing(run: Run, tiny: str, small, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert run("optimize", f"{tiny}:Tiny", "--quiet", "--json", str(path), *small) == (0, "", "")
    assert json.loads(path.read_text())["schema"] == 1


def test_explain_lists_chains_and_reasons(run: Run, tiny: str, small) -> None:
    status, out, err = run("explain", f"{tiny}:Tiny", *small)
    assert (status, err) == (0, "")
    assert "3 chains found, 3 rewritten, 0 left alone" in out
    size = small[small.index("--input") + 1]
    assert f":Tiny,input{size}3chainsfound" in "".join(out.split())  # wherever the line was broken
    assert "dense block" in out
    assert "Note" not in out


@pytest.mark.parametrize(("command", "numerics"), [("optimize", "fast"), ("explain", "exact")])
def test_a_budget_says_what_it_is_planned_for(run: Run, tiny: str, small, command: str, numerics: str) -> None:
    """`optimize` predicts a GPU; `explain` says what happens on the machine it runs on."""
    status, out, _ = run(command, f"{tiny}:Tiny", *small, "--budget", "1GiB")
    assert status == 0
    assert f"Budget 1,024 MiB on a GPU, numerics {numerics}: " in " ".join(out.split())
    status, _, err = run(command, f"{tiny}:Tiny", *small, "--budget", "1MiB")
    assert status == 2
    assert f"(predicted for a GPU, numerics {numerics}, " in err


@pytest.mark.parametrize("to_file", [True, False])
def test_explain_writes_every_chain_as_json(run: Run, write, tiny: str, small, tmp_path: Path, to_file: bool) -> None:
    """With line, what was done and what that saves; the reason where nothing was."""
    model = write("partly.py", PARTLY)
    path = tmp_path / "explain.json"
    status, out, err = run("explain", f"{model}:Partly", "--json", str(path) if to_file else "-", *small)
    assert (status, err) == (0, "")
    document = json.loads(path.read_text() if to_file else out)

    assert document["target"] == f"{model}:Partly"
    assert (document["chains"]["found"], document["chains"]["rewritten"]) == (3, 2)
    (block,) = document["blocks"]
    assert [chain["module"] for chain in block["chains"]] == [f"layers.{i}.0" for i in range(3)]
    assert {chain["source"] for chain in block["chains"]} == {f"{model}:11"}
    assert [chain["action"] for chain in block["chains"]] == ["rewritten", "rewritten", "rejected"]
    assert sum(chain["saved_bytes"] for chain in block["chains"]) == document["chains"]["saved_bytes"] > 0
    assert [chain["reason"] is None for chain in block["chains"]] == [True, True, False]
    assert "overwrites" in block["chains"][2]["reason"]


def test_options_reach_model_and_inputs(run: Run, tiny: str) -> None:
    argv = ("optimize", f"{tiny}:Tiny", "--arg", "layers=2", "--batch-size", "3", "--device", "cpu", "--json", "-")
    document = json.loads(run(*argv, "--amp", "bf16")[1])
    assert document["input_shape"] == [3, 3, 32, 32]
    assert (document["dtype"], document["amp"]) == ("float32", "bfloat16")
    assert document["chains"]["found"] == 2
    assert json.loads(run(*argv, "--dtype", "fp64")[1])["dtype"] == "float64"


def test_recompute_level_is_passed_on(run: Run, tiny: str, small) -> None:
    document = json.loads(run("optimize", f"{tiny}:Tiny", "--recompute", "concat", "--json", "-", *small)[1])
    assert document["chains"]["blocks"][0]["levels"] == ["concat"]


def test_a_model_with_nothing_to_rewrite_is_no_error(run: Run, write, small) -> None:
    path = write("plain.py", "from torch import nn\ndef net(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n")
    status, out, err = run("optimize", f"{path}:net", *small)
    assert (status, err) == (0, "")
    assert "0 chains found" in out
    assert "Nothing was rewritten" in out
    assert "Equivalent" not in out


def test_a_model_that_cannot_be_predicted_is_told_so_once(run: Run, write, tiny: str, small) -> None:
    path = write(
        "reading.py",
        "from torch import nn\nfrom tiny import Tiny\n"
        "class Reading(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.inner = Tiny()\n"
        "    def forward(self, x):\n        y = self.inner(x)\n        return y * (1 + y.sum().item())\n",
    )
    status, out, err = run("optimize", f"{path}:Reading", *small)
    assert (status, err) == (0, "")
    notes = [note for note in out.split("Note: ") if "cannot be predicted" in note]
    assert len(notes) == 1
    assert "Exception" not in notes[0]
    assert "training step" not in out


@pytest.mark.parametrize("options", [("--json", "-"), ("--quiet",), ()])
def test_a_failed_equivalence_is_status_1_and_nothing_is_claimed(
    run: Run, tiny: str, small, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    def spoil(model: torch.nn.Module, *others: object) -> torch.nn.Module:
        model.register_forward_hook(lambda module, args, output: output * 1.5)
        return model

    monkeypatch.setattr("memopt.api._apply", spoil)
    status, out, err = run("optimize", f"{tiny}:Tiny", "--report", *options, *small)
    assert status == 1
    assert "NOT EQUIVALENT: outputs and gradients" in out + err
    assert "×" not in out
    if options == ("--json", "-"):
        document = json.loads(out)
        assert document["equivalence"]["passed"] is False
        assert document["before"]["activation_peak_bytes"] is None


def test_out_of_memory_before_is_no_error(run: Run, tiny: str, small, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = memopt.compare

    def short_of_memory(*args: object, **options: object) -> object:
        return replace(compare(*args, **options), before=StepFigures(out_of_memory=True))

    monkeypatch.setattr(memopt, "compare", short_of_memory)
    status, out, _ = run("optimize", f"{tiny}:Tiny", "--report", *small)
    assert status == 0
    assert "out of memory" in out


BAD_INPUT = {
    "no such file": (("{folder}/absent.py:Tiny",), "There is no file"),
    "no such name": (("{tiny}:Tinny",), "has no Tinny. It has Tiny"),
    "no name at all": (("{tiny}",), "names no model"),
    "import error": (("{broken}:Net",), "Importing"),
    "constructor needs arguments": (("{tiny}:factory",), "--arg growth=VALUE"),
    "constructor fails": (("{tiny}:Tiny", "--arg", "growth=x"), "Mend the model or its --arg"),
    "argument does not parse": (("{tiny}:Tiny", "--arg", "growth"), "does not parse"),
    "shape is refused": (("{tiny}:Tiny", "--input", "4x5x8x8"), "Tiny refuses float32 input of shape 2x5x8x8"),
    "a size is missing": (
        ("{tiny}:Tiny", "--input", "4x3x8"),
        "By its first layer it takes batch x channels x height x width, for example 64x3x32x32.",
    ),
    "a negative size": (("{tiny}:Tiny", "--input", "-4x3x8x8"), "--input '-4x3x8x8': sizes must be positive"),
    "a negative budget": (
        ("{tiny}:Tiny", "--budget", "-1GiB"),
        "--budget '-1GiB' is not a size. Write a number and a unit",
    ),
    "integers are embedded": (
        ("{embedding}:Net", "--input", "4x7"),
        "Net takes integer inputs, which the command does not make. Use memopt.apply or memopt.compare in Python "
        "with inputs of your own.",
    ),
    "integers beside floats": (("{embedding}:Mixed", "--input", "4x7", "--input", "4x4"), "takes integer inputs"),
    "an argument too few": (
        ("{two}:Net", "--input", "4x3"),
        "Net.forward(x, age) does not fit 1 input: missing a required argument: 'age'. Give one --input for each "
        "argument of forward.",
    ),
    "an argument too few, inferred": (("{two}:Net",), "does not fit 1 input"),
    "an argument too many": (
        ("{tiny}:Tiny", "--input", "2x3x8x8", "--input", "2x1"),
        "forward(x) does not fit 2 inputs",
    ),
    "unequal batches": (("{two}:Net", "--input", "4x3", "--input", "3x1"), "Give every --input the same first size"),
    "a size of nothing": (("{tiny}:Tiny", "--input", "0x3x8x8"), "sizes must be positive"),
    "shape does not parse": (("{tiny}:Tiny", "--input", "4,3"), "is not a shape"),
    "cannot be captured": (("{branching}:Net",), "Move"),
    "no CUDA": (("{tiny}:Tiny", "--device", "cuda"), "sees no CUDA device here. Use --device cpu"),
    "no parameters": (("{empty}:Net", "--input", "2x3"), "has no parameters, so there is nothing to train"),
    "frozen": (("{frozen}:net",), "Unfreeze at least one"),
    "no loss": (("{lossless}:Net",), "no loss can be made"),
    "unwritable document": (("{tiny}:Tiny", "--json", "{folder}/absent/x.json"), "cannot be written"),
    "numerics that do not exist": (("{tiny}:Tiny", "--numerics", "bold"), "invalid choice"),
    "autocast of another dtype": (("{tiny}:Tiny", "--amp", "bf16", "--dtype", "fp16"), "Leave one of them out"),
    "batch of nothing": (("{tiny}:Tiny", "--batch-size", "0"), "not a whole number above 0"),
    "unknown option": (("{tiny}:Tiny", "--bogus"), "memopt optimize has no --bogus. See memopt optimize --help"),
    "a budget and a level": (
        ("{tiny}:Tiny", "--budget", "1GiB", "--recompute", "layer"),
        "--recompute layer asks for one. Give one of them",
    ),
    "unknown choice": (("{tiny}:Tiny", "--device", "tpu"), "invalid choice: 'tpu'"),
    "no target": ((), "The following arguments are required: TARGET. See memopt optimize --help"),
}

SOURCES = {
    "broken": "import user_absent_library\n",
    "branching": (
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Conv2d):\n"
        "    def __init__(self): super().__init__(3, 4, 3)\n"
        "    def forward(self, x):\n"
        "        y = super().forward(x)\n"
        "        return y if y.sum() > 0 else -y\n"
    ),
    "embedding": (
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)\n"
        "    def forward(self, x): return self.head(self.table(x)).mean(1)\n"
        "class Mixed(Net):\n"
        "    def forward(self, x, y): return super().forward(x) + self.head(y)\n"
    ),
    "empty": "from torch import nn\nNet = nn.ReLU\n",
    "frozen": "from torch import nn\ndef net(): return nn.Linear(3, 3).requires_grad_(False)\n",
    "two": (
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self): super().__init__(3, 3)\n"
        "    def forward(self, x, age): return super().forward(x) + age\n"
    ),
    "lossless": (
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self): super().__init__(3, 3)\n"
        "    def forward(self, x): return super().forward(x).argmax(1)\n"
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_with_a_remedy(
    run: Run, write, tiny: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments, message = BAD_INPUT[case]
    places = {name: write(f"{name}.py", source) for name, source in SOURCES.items()}
    places |= {"tiny": tiny, "folder": str(Path(tiny).parent)}
    result = run("optimize", *(argument.format(**places) for argument in arguments))
    assert_one_line(*result)
    assert message in result[2]


def test_an_unwritable_document_is_reported_before_the_work(run: Run, tiny: str, monkeypatch) -> None:
    monkeypatch.setattr(memopt_cli.main, "make_job", lambda options: pytest.fail("the work began"))
    assert_one_line(*run("optimize", f"{tiny}:Tiny", "--json", f"{Path(tiny).parent}/absent/x.json"))


def test_running_out_of_memory_altogether_is_a_line(run: Run, tiny: str, small, monkeypatch) -> None:
    def exhaust(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB")

    monkeypatch.setattr(memopt, "compare", exhaust)
    result = run("optimize", f"{tiny}:Tiny", *small)
    assert_one_line(*result)
    assert "not enough memory even for a few samples" in result[2]


def test_a_fault_of_ours_is_a_line_too(run: Run, tiny: str, small, monkeypatch) -> None:
    monkeypatch.setattr(memopt, "compare", lambda *args, **options: {}["lost"])
    result = run("optimize", f"{tiny}:Tiny", *small)
    assert_one_line(*result)
    assert "Run again with --debug for the traceback; report it" in result[2]


def test_debug_shows_the_traceback(run: Run, tiny: str) -> None:
    status, out, err = run("optimize", f"{tiny}:Tinny", "--debug")
    assert (status, out) == (2, "")
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("memopt: ")


def test_interrupting_is_quiet(run: Run, tiny: str, monkeypatch) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(memopt_cli.main, "make_job", interrupt)
    assert run("optimize", f"{tiny}:Tiny") == (130, "", "")


@pytest.mark.parametrize(("argv", "text"), [(["--version"], memopt.__version__), (["optimize", "--help"], "--report")])
def test_version_and_help(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0
    assert text in capsys.readouterr().out


WITHOUT_NUMPY = """
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] == "numpy" else find_spec(name, *rest)
from memopt_cli.main import main

import warnings
warnings.warn("Failed to initialize something else")
sys.exit(main(sys.argv[1:]))
"""


def test_absent_numpy_is_not_worth_a_word(tiny: str, small, tmp_path: Path) -> None:
    root = Path(memopt.__file__).parents[1]
    (tmp_path / "memopt_cli").symlink_to(Path(memopt_cli.main.__file__).parent)
    argv = [sys.executable, "-c", WITHOUT_NUMPY, "explain", f"{tiny}:Tiny", *small]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(root)))}
    result = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert result.returncode == 0
    assert "NumPy" not in result.stderr
    assert "Failed to initialize something else" in result.stderr


def test_the_processs_own_arguments_are_taken(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["memopt"])
    assert main() == 2
    assert "required: COMMAND" in capsys.readouterr().err
