"""Starting several processes that form a group, as torchrun would, so that a test can kill one of them."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import memopt

ROOT = Path(__file__).parents[2]


def environment(home: Path) -> dict[str, str]:
    """For processes that use the tree, the command under the name it is installed by."""
    link = home / "memopt_cli"
    if not link.exists():
        link.symlink_to(ROOT / "cli")
    path = os.pathsep.join((str(home), str(Path(memopt.__file__).parents[1])))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def start(ranks: int, argv: Sequence[str], home: Path) -> list["subprocess.Popen[str]"]:
    """Start `python ARGV` once for each rank, in the folder `home`."""
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return [
        subprocess.Popen(
            [sys.executable, *argv],
            cwd=home,
            env={**environment(home), **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: Sequence["subprocess.Popen[str]"], timeout: float = 120.0) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each; none is left running."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, outputs, strict=True)]


def run(ranks: int, argv: Sequence[str], home: Path) -> list[str]:
    """Run to the end; the stdout of each rank. All must succeed."""
    results = finish(start(ranks, argv, home))
    for status, out, err in results:
        assert status == 0, f"{out}\n{err}"
    return [out for _, out, _ in results]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
