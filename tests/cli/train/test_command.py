import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from memopt_cli.main import main
from memopt_cli.train import command

import memopt
from densenet_models import bc
from densenet_models.train import EpochResult, Score, Trainer

ROOT = Path(__file__).parents[3]
TINY_NET = ("--depth", "10", "--growth-rate", "2", "--arg", "num_init_features=4", "--device", "cpu")
TINY = (*TINY_NET, "--epochs", "2", "--batch-size", "100", "--valid-size", "1100")
"""Four steps an epoch."""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `memopt train` in a folder of its own; its exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[int, str, str]:
        status = main(["train", *argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def weights(folder: str) -> dict[str, torch.Tensor]:
    return torch.load(Path(folder) / "best.pt", weights_only=True)


def same(first: str, second: str) -> bool:
    pairs = zip(weights(first).values(), weights(second).values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_trains_says_so_and_keeps_results(run: Run) -> None:
    status, out, err = run(*TINY)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("DenseNet-BC-10 (k = 2), ")
    assert lines[0].endswith("on the CPU")
    assert "handwritten digits: 400 to train on, 1,100 to validate, 297 to test; batches of 100" in out
    assert "memopt rewrote 6 of 6 chains" in out
    assert sum(line.startswith("epoch ") for line in lines) == 2
    assert "peak resident" in out
    assert "test error" in out
    kept = {path.name for path in Path("runs/1").iterdir()}
    assert kept == {"best.pt", "curves.png", "curves.svg", "log.csv", "settings.json", "state-00002-000000"}
    assert len(Path("runs/1/log.csv").read_text().splitlines()) == 3


def test_the_naive_model_loads_the_weights(run: Run) -> None:
    run(*TINY, "--save", "a")
    model = bc.DenseNet(depth=10, growth_rate=2, num_init_features=4)
    model.load_state_dict(weights("a"))


def test_naive_and_exact_end_with_the_same_weights(run: Run) -> None:
    assert run(*TINY, "--save", "naive", "--naive")[0] == 0
    status, out, _ = run(*TINY, "--save", "exact", "--efficient", "--numerics", "exact")
    assert status == 0
    assert "rewrote" in out
    assert same("naive", "exact")
    run(*TINY, "--save", "other", "--seed", "1")
    assert not same("naive", "other")


def test_a_second_run_gets_the_next_folder(run: Run) -> None:
    for _ in range(2):
        assert run(*TINY, "--epochs", "1")[0] == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["1", "2"]


def test_quiet(run: Run) -> None:
    assert run(*TINY, "--epochs", "1", "--quiet") == (0, "", "")


@pytest.mark.parametrize("step", [2, 4, 5])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_is_never_interrupted(
    run: Run, monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals
) -> None:
    options = (*TINY, "--arg", "drop_rate=0.2")
    run(*options, "--save", "whole")
    steps = [0]
    take = Trainer._step

    def interrupted(self: Trainer, *batch: torch.Tensor) -> None:
        take(self, *batch)
        steps[0] += 1
        if steps[0] == step:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        status, out, _ = run(*options, "--save", "halves")
    assert status == 128 + number
    assert "Interrupted, and saved. Go on with: memopt train --resume halves" in out
    status, out, _ = run("--resume", "halves", "--device", "cpu")
    assert status == 0
    assert f"going on from epoch {1 + step // 4}, batch {1 + step % 4}" in out or step == 4
    assert same("whole", "halves")
    logs = [
        [line.split(",")[:6] for line in Path(f"{n}/log.csv").read_text().splitlines()] for n in ("whole", "halves")
    ]
    assert logs[0] == logs[1]


def test_a_finished_run_has_nothing_left_to_do(run: Run) -> None:
    run(*TINY, "--save", "a")
    before = weights("a")
    status, out, _ = run("--resume", "a", "--device", "cpu")
    assert status == 0
    assert "epoch 2/2" not in out
    assert "this run is finished: all 2 epochs are done" in out
    assert "--resume a --epochs N" in out
    assert "going on" not in out
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights("a").values(), strict=True))


def test_a_finished_run_can_be_made_longer(run: Run) -> None:
    run(*TINY, "--save", "a")
    status, out, _ = run("--resume", "a", "--epochs", "3", "--device", "cpu")
    assert status == 0
    assert "epoch 3/3" in out
    assert len(Path("a/log.csv").read_text().splitlines()) == 4


OTHER_NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes=10, channels=3):
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 3, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(self.norm(torch.cat([x, x], 1))).mean((2, 3)))


def frozen():
    return Net().requires_grad_(False)


def feature_maps():
    return nn.Conv2d(3, 4, 3)
"""


@pytest.fixture
def other(write: Callable[[str, str], str]) -> str:
    return write("other.py", OTHER_NET)


def test_a_model_of_the_users(run: Run, other: str) -> None:
    options = ("--device", "cpu", "--epochs", "1", "--valid-size", "1400", "--save", "a")
    status, out, _ = run("--model", f"{other}:Net", "--arg", "classes=12", *options)
    assert status == 0
    assert "memopt rewrote 1 of 1 chains" in out


def test_a_model_of_one_channel_is_given_grey_digits(run: Run, other: str) -> None:
    net = ("--model", f"{other}:Net", "--device", "cpu", "--valid-size", "1400", "--epochs", "1")
    status, _, err = run(*net, "--arg", "channels=1", "--save", "a", "--batch-size", "auto")
    assert (status, err) == (0, "")
    assert run("--resume", "a", "--epochs", "2", "--device", "cpu")[0] == 0
    status, _, err = run(*net, "--arg", "channels=1", "--data", "absent")
    assert status == 2


@pytest.mark.parametrize("options", [("--channels-last",), ("--amp", "bf16"), ("--amp", "fp16"), ("--augment", "no")])
def test_ways_to_train(run: Run, options: tuple[str, ...]) -> None:
    assert run(*TINY, "--epochs", "1", *options)[0] == 0


def test_data_parallel(run: Run) -> None:
    run(*TINY, "--save", "a")
    assert run(*TINY, "--save", "b", "--data-parallel")[0] == 0
    assert same("a", "b")


def test_batch_size_auto_is_what_fits(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memopt_cli.train.prepare.free_bytes", lambda device: 3 * 2**20)
    status, out, _ = run(*TINY, "--batch-size", "auto", "--epochs", "1", "--save", "a")
    assert status == 0
    small = int(out.split("batches of ")[1].split()[0])
    monkeypatch.setattr("memopt_cli.train.prepare.free_bytes", lambda device: 6 * 2**20)
    status, out, _ = run(*TINY, "--batch-size", "auto", "--epochs", "1", "--save", "b")
    large = int(out.split("batches of ")[1].split()[0])
    assert 1 < small < large < 400


BAD_INPUT = {
    "no such folder": (("--data", "absent"), "absent does not exist. Name the folder"),
    "empty folder": (("--data", "."), "holds neither CIFAR"),
    "more to validate than there is": (("--valid-size", "1500"), "leaves nothing to train on"),
    "a batch larger than the data": (("--batch-size", "500"), "is more than the 400 training images"),
    "nothing to resume": (("--resume", "absent"), "absent holds no run to resume"),
    "no such depth": (("--depth", "41"), "--depth 41 is not 6n + 4 with n ≥ 1 layers a block. Use 40 or 46."),
    "no such argument": (("--arg", "width=3"), "DenseNet has no argument width"),
    "diverged": (("--lr", "1e30"), "Training diverged: the loss is"),
    "one process": (("--fsdp",), "--fsdp shards the model over several processes, and this is one"),
    "one process, synchronised": (("--sync-batchnorm",), "--sync-batchnorm needs several processes"),
    "no CUDA": (("--device", "cuda"), "sees no CUDA device here"),
    "not one image": (("--batch-size", "auto"), "not even one image fits"),
    "save is a file": (("--save", "/dev/null/run"), "cannot be written"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_with_a_remedy(run: Run, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("memopt_cli.train.prepare.free_bytes", lambda device: 2)
    options, message = BAD_INPUT[case]
    argv = options if "--resume" in options else (*TINY, *options)
    status, _, err = run(*argv)
    assert status == 2
    assert err.startswith("memopt: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("Net", ("--arg", "classes=4"), "tells 4 classes apart, and handwritten digits have 10"),
        ("Net", ("--arg", "channels=2"), "refuses images of shape 2x3x32x32"),
        ("frozen", (), "has no parameter that requires a gradient"),
        ("feature_maps", (), "does not return logits"),
    ],
)
def test_a_model_that_does_not_fit_is_one_line(
    run: Run, other: str, target: str, options: tuple[str, ...], message: str
) -> None:
    status, out, err = run("--model", f"{other}:{target}", "--device", "cpu", *options)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_run_of_another_depth_is_refused(run: Run) -> None:
    run(*TINY, "--save", "a")
    status, _, err = run("--resume", "a", "--depth", "16")
    assert status == 2
    assert "a was trained with --depth 10, not 16" in err


def test_no_space_left_is_one_line_and_the_last_good_state_stays(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run(*TINY, "--epochs", "1", "--save", "a")
    before = weights("a")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        status, _, err = run("--resume", "a", "--epochs", "2", "--device", "cpu")
    assert status == 2
    assert err.count("\n") == 1
    assert "cannot be written: No space left on device" in err
    assert sorted(p.name for p in Path("a").iterdir() if "state" in p.name) == ["state-00001-000000"]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights("a").values(), strict=True))
    assert run("--resume", "a", "--epochs", "2", "--device", "cpu")[0] == 0


def test_without_matplotlib_there_are_no_curves(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, _ = run(*TINY, "--epochs", "1", "--save", "a")
    assert status == 0
    assert "no curves drawn: matplotlib is not installed" in out
    assert not list(Path("a").glob("curves*"))


def test_nothing_to_rewrite_is_said(run: Run, write: Callable[[str, str], str]) -> None:
    source = "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))\n"
    path = write("plain.py", source)
    options = ("--device", "cpu", "--epochs", "1", "--valid-size", "1400", "--save", "a")
    status, out, _ = run("--model", f"{path}:net", *options)
    assert status == 0
    assert "memopt rewrote 0 of 0 chains" in out
    assert "nothing to rewrite" in out


def test_the_best_epoch_is_that_of_least_error_and_then_of_least_loss() -> None:
    scores = [(0.5, 1.0), (0.4, 1.0), (0.4, 0.9), (0.4, 0.95), (0.6, 0.1)]
    history = [EpochResult(i + 1, 0.1, Score(0, 0), Score(loss, error)) for i, (error, loss) in enumerate(scores)]
    best = [number for number in range(1, 6) if command._is_best(history[:number])]
    assert best == [1, 2, 3]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """For processes of their own: the command from the tree, under the name it is installed by."""
    (tmp_path / "memopt_cli").symlink_to(ROOT / "cli")
    path = os.pathsep.join((str(tmp_path), str(Path(memopt.__file__).parents[1])))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_killed_and_resumed_is_never_interrupted(run: Run, environment: dict[str, str], tmp_path: Path) -> None:
    """SIGKILL, which no handler sees: it goes on from the last whole epoch."""
    options = (*TINY, "--epochs", "4")
    run(*options, "--save", "whole")
    argv = [sys.executable, "-m", "memopt_cli", "train", *options, "--save", "killed"]
    process = subprocess.Popen(argv, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(line.startswith("epoch 2/4") for line in process.stdout)
    process.kill()
    process.wait()
    process.stdout.close()
    status, out, _ = run("--resume", "killed", "--device", "cpu")
    assert status == 0
    assert "going on from epoch" in out or "test error" in out
    assert same("whole", "killed")


def test_a_signal_stops_a_process(environment: dict[str, str], tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "memopt_cli", "train", *TINY, "--epochs", "10000", "--save", "a"]
    process = subprocess.Popen(argv, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(line.startswith("epoch ") for line in process.stdout)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 30
    assert "Interrupted, and saved." in process.stdout.read()
    process.stdout.close()
