"""A training step on several GPUs: DDP and FSDP2, BatchNorm and SyncBatchNorm, naive, checkpointed and memopt.

    PYTHONPATH=. torchrun --standalone --nproc-per-node=2 tests/bench/ddp_step.py --out tests/bench/results/ddp_step.csv

One row per case, the figures of its worst GPU: memory of one step, time of a step (median and quickest of some runs of
several; a host that others share only ever makes a run slower), and the loss after some steps with deterministic cuDNN,
averaged over the ranks, which must not depend on the variant.
`activation_peak_bytes` is what a step allocates beyond what is there between steps with gradients None: DDP's buckets
are there, as gradients are. With one rank, rank 0 works alone in a group of its own. The run stops by itself before
`--seconds` and keeps the rows that it has; rows already in the file are not measured again. On a machine without GPUs
it runs on the CPU over gloo, to try it out (`--works tiny`).
"""

import argparse
import csv
import datetime
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rivals
import torch
from provenance import provenance
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import memopt
from densenet_models import bc
from memopt.measure.memory import CudaLedger, clean, leave, observe_step
from memopt.measure.step import TrainingStep, seeded
from memopt.measure.tracker import StorageTracker

LOSS_STEPS, WARMUP = 5, 3
RUNS, STEPS = 8, 5
"""Steps are timed several in a row, as a training loop makes them: the processor may run ahead of the GPU."""
GRACE_SECONDS = 30.0
"""After the deadline: the case in hand may end, a hung one is left."""


@dataclass(frozen=True, slots=True)
class Work:
    """A model and the images of one GPU. `parallel`: how it is spread over ranks."""

    make: Callable[[], nn.Module]
    image: tuple[int, ...]
    batch: int
    parallel: tuple[str, ...]


WORKS: dict[str, Work] = {
    "bc100": Work(bc.DenseNet, (3, 32, 32), 64, ("ddp",)),
    "densenet121": Work(bc.densenet121, (3, 224, 224), 64, ("ddp",)),
    "densenet264": Work(bc.densenet264, (3, 224, 224), 32, ("fsdp2",)),
    "tiny": Work(lambda: bc.DenseNet(depth=10, growth_rate=4), (3, 8, 8), 4, ("ddp", "fsdp2")),
}
Change = Callable[[nn.Module], nn.Module]


def _memopt(numerics: str) -> Change:
    return lambda model: memopt.apply(model, config=memopt.Config(numerics=numerics, recompute="layer"))


VARIANTS: dict[str, Change] = {
    "naive": leave,
    "checkpointed": rivals.checkpointed,
    "memopt exact layer": _memopt("exact"),
    "memopt fast layer": _memopt("fast"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """What one row measures."""

    work: str
    parallel: str
    norm: str
    variant: str
    ranks: int
    batch: int


FIELDS = (
    "work", "parallel", "norm", "variant", "ranks", "batch", "activation_peak_bytes", "peak_allocated_bytes",
    "peak_reserved_bytes", "retained_bytes", "step_seconds", "quickest_step_seconds", "final_loss", "gpu", "torch",
    "commit", "date",
)  # fmt: skip


def cases(works: list[str], world_size: int, with_sync: bool) -> list[Case]:
    """Every case: each variant on one rank, then on all, with each GPU's batch fixed and with that of all together."""
    found: dict[Case, None] = {}
    for name in works:
        work = WORKS[name]
        for parallel in work.parallel:
            sizes = [(1, work.batch), (world_size, work.batch), (world_size, work.batch // world_size)]
            for variant in VARIANTS:  # one after another what is compared: a host changes its pace
                for ranks, batch in sizes if parallel == "ddp" else sizes[1:2]:
                    found[Case(name, parallel, "batch", variant, ranks, batch)] = None
    # With SyncBatchNorm fused kernels leave the blocks to the exact runtime: nothing new to measure.
    for name in works if with_sync and world_size > 1 else ():
        for variant in ("naive", "checkpointed", "memopt exact layer"):
            if "ddp" in WORKS[name].parallel:
                found[Case(name, "ddp", "sync", variant, world_size, WORKS[name].batch)] = None
    return list(found)


class Bench:
    """The ranks, and the groups in which they work and talk.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = distributed.get_rank()
        self.world_size = distributed.get_world_size()
        self._alone = distributed.new_group([0])
        self._talk = distributed.new_group(backend="gloo")

    def run(self, todo: list[Case], deadline: float) -> Iterator[dict[str, Any]]:
        """The figures of each case, at rank 0; nothing after the deadline, which is rank 0's."""
        for case in todo:
            if self._all_told(time.monotonic() > deadline):
                if self.rank == 0:
                    print(f"stopped before {case}: out of time", flush=True)
                return
            own = self._measure(case) if self.rank < case.ranks else None
            everybodys: list[Any] = [None] * self.world_size
            distributed.all_gather_object(everybodys, own, group=self._talk)
            if self.rank == 0:
                yield asdict(case) | _worst([figures for figures in everybodys if figures is not None])

    def _all_told(self, answer: bool) -> bool:
        box = [answer]
        distributed.broadcast_object_list(box, src=0, group=self._talk)
        return box[0]

    def _measure(self, case: Case) -> dict[str, Any]:
        clean(self.device)
        on_cuda = self.device.type == "cuda"
        tracker: AbstractContextManager[Any] = nullcontext(CudaLedger(self.device)) if on_cuda else StorageTracker()
        with tracker as ledger, seeded(0, self.device):
            step = self._step(case)
            if not on_cuda:
                ledger.track(step.model, step.inputs, step.optimizer)
            with _deterministic():
                losses = [_run(step) for _ in range(LOSS_STEPS)]
            self._forget_reserved()  # what deterministic kernels took is not the step's
            for _ in range(WARMUP):
                step.run()
            seconds = [self._seconds(step, case) for _ in range(RUNS)]
            figures = observe_step(step, ledger, memopt.remove if case.variant.startswith("memopt") else leave)
            reserved = ledger.peak_reserved_bytes if on_cuda else None
        del step
        gc.collect()
        return {
            "activation_peak_bytes": figures.activation_peak_bytes,
            "peak_allocated_bytes": figures.peak_allocated_bytes,
            "peak_reserved_bytes": reserved,
            "retained_bytes": figures.retained_bytes,
            "step_seconds": statistics.median(seconds),
            "quickest_step_seconds": min(seconds),
            "final_loss": losses[-1],
        }

    def _forget_reserved(self) -> None:
        """Give cached memory back, but not cuBLAS's workspaces, which memopt has placed."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _step(self, case: Case) -> TrainingStep:
        work = WORKS[case.work]
        group = self._alone if case.ranks == 1 else distributed.group.WORLD
        model = work.make().to(self.device)
        if case.norm == "sync":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
        model = VARIANTS[case.variant](model)
        if case.parallel == "ddp":
            model = DistributedDataParallel(model, process_group=group)
        else:
            mesh = init_device_mesh(self.device.type, (self.world_size,))
            parts = [m for m in model.modules() if isinstance(m, (bc.DenseBlock, bc.Transition))]
            for part in (*parts, model):
                fully_shard(part, mesh=mesh)
        generator = torch.Generator().manual_seed(self.rank)
        images = torch.randn(case.batch, *work.image, generator=generator).to(self.device)
        return TrainingStep(model, (images,))

    def _seconds(self, step: TrainingStep, case: Case) -> float:
        """Wall time of a step, of several in a row that all ranks begin together."""
        if case.ranks > 1:
            distributed.barrier(group=self._talk)
        start = time.perf_counter()
        for _ in range(STEPS):
            step.run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / STEPS


def _run(step: TrainingStep) -> float:
    """One step; its loss."""
    loss = step.forward()
    loss.backward()
    step.update()
    step.clear()
    return loss.item()


def _worst(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the worst rank; of the loss the mean."""
    result = {key: None if value is None else max(rank[key] for rank in figures) for key, value in figures[0].items()}
    return result | {"final_loss": statistics.fmean(rank["final_loss"] for rank in figures)}


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def measured_already(path: Path) -> set[Case]:
    """The cases of the rows in a file."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {
            Case(r["work"], r["parallel"], r["norm"], r["variant"], int(r["ranks"]), int(r["batch"]))
            for r in csv.DictReader(file)
        }


def write(rows: Iterator[dict[str, Any]], path: Path, origin: dict[str, str]) -> None:
    """Append rows to a file as they come."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        for row in rows:
            writer.writerow(row | origin)
            file.flush()
            print(_line(row), flush=True)


def _line(row: dict[str, Any]) -> str:
    reserved = "-" if row["peak_reserved_bytes"] is None else f"{row['peak_reserved_bytes'] / 2**20:.0f}"
    return (
        f"{row['work']:12s} {row['parallel']:6s} {row['norm']:6s} {row['variant']:20s} "
        f"{row['ranks']} x {row['batch']:<4d} activation {row['activation_peak_bytes'] / 2**20:8.1f} MiB  "
        f"reserved {reserved:>6s} MiB  step {row['step_seconds'] * 1e3:8.1f} ms  loss {row['final_loss']:.6f}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=[name for name in WORKS if name != "tiny"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seconds", type=float, default=420.0, help="no case is begun after that many")
    return parser.parse_args()


def _end_at_once() -> None:
    """A collective that never returns cannot be told to; the rows are in the file already."""
    print("ended in the middle of a case: out of time", flush=True)
    os._exit(1)


def main() -> None:
    """Measure the works named on the command line and append their rows to a CSV file."""
    started = time.monotonic()
    options = _arguments()
    watchdog = threading.Timer(options.seconds + GRACE_SECONDS, _end_at_once)
    watchdog.daemon = True
    watchdog.start()
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # NVLink multicast stays off
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=options.seconds + GRACE_SECONDS)
    distributed.init_process_group("nccl" if on_cuda else "gloo", timeout=timeout)
    done = measured_already(options.out)
    todo = [case for case in cases(options.works, distributed.get_world_size(), with_sync=on_cuda) if case not in done]
    bench = Bench(device)
    rows = bench.run([case for case in todo if case.variant in options.variants], started + options.seconds)
    if bench.rank == 0:
        write(rows, options.out, provenance())
    else:
        for _ in rows:
            pass
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
