"""From the options to a run that is ready to begin or to go on."""

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import memopt
from densenet_models.train import Trainer

from ..errors import CommandError
from ..inputs import channels_of
from ..job import choose_device
from .batch_size import free_bytes, largest_batch, predicted_peak
from .batches import Batches, Share
from .data import DataSet, Part, load_data, split
from .grey import GREY, GreyBatches
from .group import Wrapping, launched, on_first_rank, require_possible, wrapped
from .network import Network, find_network, require_classifier
from .run_folder import Notes, RunFolder, next_free
from .settings import AUTO, Settings, new_settings, resumed_settings

RUNS = Path("runs")
COLOURS = 3
READERS = 2
"""Processes that read image files, unless the user says how many."""


@dataclass(frozen=True, slots=True)
class Run:
    """Everything of one run in this process.

    Attributes:
        settings: what defines it.
        data: all images.
        train: to train on.
        valid: to choose the best weights by.
        batches: makes batches of them.
        network: makes the plain model.
        trainer: trains it.
        folder: keeps results.
        notes: of the epochs that are done, beside what the trainer knows of them.
    """

    settings: Settings
    data: DataSet
    train: Part
    valid: Part
    batches: Batches
    network: Network
    trainer: Trainer
    folder: RunFolder
    notes: Notes


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and how a run is computed; it may change when the run is resumed.

    Attributes:
        device: of this process.
        wrapping: over processes and devices.
        share: this process's share of each batch.
        config: how memopt is applied; None if it is not.
        channels_last: memory format of weights and images.
        workers: processes that read image files; None for the default.
    """

    device: torch.device
    wrapping: Wrapping
    share: Share
    config: memopt.Config | None
    channels_last: bool
    workers: int | None


def this_device(options: argparse.Namespace) -> torch.device:
    """The device of this process, one GPU each."""
    if launched() and torch.cuda.is_available() and options.device != "cpu":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return choose_device(options.device)


def make_machine(options: argparse.Namespace, device: torch.device, share: Share) -> Machine:
    """What the options say of it.

    Raises:
        CommandError: this machine cannot do that.
        ConfigError: `--numerics` or `--recompute` asks for what there is not.
    """
    wrapping = Wrapping(options.fsdp, options.data_parallel, options.sync_batchnorm, options.compile)
    require_possible(wrapping, device, options.amp)
    config = None if options.naive else memopt.Config(numerics=options.numerics, recompute=options.recompute)
    return Machine(device, wrapping, share, config, options.channels_last, options.workers)


def prepare(options: argparse.Namespace, machine: Machine) -> Run:
    """Check everything that the user gave, in the order of what it costs, and make the run.

    Raises:
        CommandError: something cannot be used.
    """
    resumed = options.resume is not None
    if resumed:
        folder = RunFolder(Path(options.resume))
        settings = resumed_settings(options, folder.settings(), options.resume)
    else:
        folder = RunFolder(Path(options.save) if options.save else _agreed_path())
        settings = new_settings(options)
    data = load_data(settings.data, settings.image_size)
    network = find_network(settings, data)
    train, valid = split(data.train, settings.valid_size, settings.seed)
    # The digits are grey, and come in as many channels as the model takes.
    channels = GREY if settings.data is None and channels_of(network.make()) == GREY else COLOURS
    require_classifier(network, data, channels)
    if options.batch_size == AUTO and not resumed:
        shape = (channels, data.size, data.size)
        settings = replace(settings, batch_size=_largest_batch(settings, network, shape, len(train), machine))
    _require_batch(settings.batch_size, machine.share, len(train))
    if not resumed:
        on_first_rank(lambda: folder.begin(settings.as_dict()))
    trainer = _make_trainer(settings, network, machine)
    notes = folder.load_state(trainer) if resumed else []
    batches = _batches(settings, data, machine, GreyBatches if channels == GREY else Batches)
    return Run(settings, data, train, valid, batches, network, trainer, folder, notes)


def _agreed_path() -> Path:
    chosen: list[Path] = [next_free(RUNS)]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen, 0)
    return chosen[0]


def _make_trainer(settings: Settings, network: Network, machine: Machine) -> Trainer:
    model: nn.Module = network.make().to(machine.device)
    if machine.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if machine.wrapping.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    if machine.config is not None:
        memopt.apply(model, config=machine.config)
    forward = wrapped(model, machine.wrapping)
    return Trainer(model, settings.recipe, forward)


def _batches(settings: Settings, data: DataSet, machine: Machine, kind: type[Batches]) -> Batches:
    return kind(
        data=data,
        size=settings.batch_size,
        share=machine.share,
        seed=settings.seed,
        augment=settings.augment == "yes",
        device=machine.device,
        channels_last=machine.channels_last,
        workers=READERS * data.lazy if machine.workers is None else machine.workers,
    )


def _largest_batch(settings: Settings, network: Network, shape: tuple[int, ...], images: int, machine: Machine) -> int:
    device, ranks = machine.device, machine.share.ranks
    peak_bytes = predicted_peak(network.make, shape, device.type, settings.recipe.amp, machine.config)
    free = torch.tensor(free_bytes(device), device=device)
    if dist.is_initialized():
        dist.all_reduce(free, dist.ReduceOp.MIN)
    # Several processes on a CPU share its memory.
    each = int(free) // (ranks if device.type == "cpu" else 1)
    batch = largest_batch(peak_bytes, each, images // ranks)
    if batch is None:
        raise CommandError("--batch-size auto: not even one image fits into the free memory. Use a smaller model.")
    return batch * ranks


def _require_batch(size: int, share: Share, images: int) -> None:
    if size % share.ranks:
        raise CommandError(
            f"--batch-size {size} does not divide among {share.ranks} processes. Choose a multiple of {share.ranks}."
        )
    if size > images:
        raise CommandError(f"--batch-size {size} is more than the {images} training images. Choose a smaller one.")
