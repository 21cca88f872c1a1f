"""`memopt train` in several processes: the same numbers, states for any number of them, and no waiting for the dead."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.distributed.launch import environment, finish, run, start

TINY = ("--depth", "10", "--growth-rate", "2", "--arg", "num_init_features=4", "--device", "cpu", "--batch-size", "100")
SHORT = (*TINY, "--valid-size", "1100", "--epochs", "2")
"""Four steps an epoch."""


def command(*options: str) -> list[str]:
    return ["-m", "memopt_cli", "train", *options]


def weights(folder: Path) -> list[torch.Tensor]:
    return list(torch.load(folder / "best.pt", weights_only=True).values())


def same(first: Path, second: Path) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


def test_torchrun_starts_it_and_its_state_goes_on_in_any_number_of_processes(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    subprocess.run(
        [*launcher, *command(*SHORT, "--save", "two")], cwd=tmp_path, env=environment(tmp_path), check=True, timeout=120
    )
    out, *others = run(4, command("--resume", "two", "--epochs", "3", "--device", "cpu"), tmp_path)
    assert "in 4 processes" in out
    assert "going on from epoch 3, batch 1" in out
    assert set(others) == {""}, "only one process prints"
    (out,) = run_alone(tmp_path, "--resume", "two", "--epochs", "4", "--device", "cpu")
    assert "going on from epoch 4, batch 1" in out
    assert len((tmp_path / "two" / "log.csv").read_text().splitlines()) == 5


def run_alone(home: Path, *options: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, *command(*options)],
        cwd=home,
        env=environment(home),
        capture_output=True,
        text=True,
        check=True,
    )
    return [done.stdout]


def test_exact_and_naive_end_with_the_same_weights_sharded_too(tmp_path: Path) -> None:
    run(2, command(*SHORT, "--save", "naive", "--naive"), tmp_path)
    run(2, command(*SHORT, "--save", "exact"), tmp_path)
    assert same(tmp_path / "naive", tmp_path / "exact")
    run(2, command(*SHORT, "--save", "sharded", "--fsdp"), tmp_path)
    assert same(tmp_path / "naive", tmp_path / "sharded")


def test_interrupted_together_and_resumed(tmp_path: Path) -> None:
    run(2, command(*SHORT, "--epochs", "4", "--save", "whole"), tmp_path)
    processes = start(2, command(*SHORT, "--epochs", "4", "--save", "halves"), tmp_path)
    assert processes[0].stdout is not None
    assert any(line.startswith("epoch 1/4") for line in processes[0].stdout)
    processes[1].send_signal(signal.SIGTERM)
    results = finish(processes)
    assert results[1][0] == 128 + signal.SIGTERM
    assert "Interrupted, and saved" in results[0][1]
    run(2, command("--resume", "halves", "--device", "cpu"), tmp_path)
    assert same(tmp_path / "whole", tmp_path / "halves")


def test_a_killed_process_is_an_error_of_the_others_not_a_wait(tmp_path: Path) -> None:
    processes = start(2, command(*SHORT, "--epochs", "10000", "--save", "a"), tmp_path)
    assert processes[0].stdout is not None
    assert any(line.startswith("epoch ") for line in processes[0].stdout)
    processes[1].kill()
    begun = time.monotonic()
    (status, _, err), _ = finish(processes)
    assert time.monotonic() - begun < 60
    assert status == 2
    assert err.startswith("memopt: process 0: Another process of the group is gone")
    assert err.count("\n") == 1
    assert list((tmp_path / "a").glob("state-*")), "the last good state is there"


def test_a_batch_that_cannot_be_shared_out_is_a_line(tmp_path: Path) -> None:
    results = finish(start(2, command(*TINY, "--batch-size", "25"), tmp_path))
    for rank, (status, out, err) in enumerate(results):
        assert (status, out) == (2, "")
        assert err.startswith(f"memopt: process {rank}: --batch-size 25 does not divide among 2 processes")
