"""From the options to what a command needs: a model that can be made, inputs it takes, where and how."""

import argparse
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

import memopt
from memopt.ir import parse_size
from memopt.measure.step import autocast, seeded

from .errors import CommandError, describe
from .inputs import make_inputs, missing_sizes
from .options import AMP_DTYPES, DTYPES
from .target import Target, load_target, parse_arguments

# Samples fed to the model to see whether it takes the shape.
PROBE_SAMPLES = 2


@dataclass(frozen=True, slots=True)
class Job:
    """A model and what to run it with.

    Attributes:
        target: what the user named.
        inputs: positional arguments of forward, on the CPU.
        device: where to run.
        dtype: of model and inputs.
        amp: autocast dtype or None.
        config: how to apply memopt.
    """

    target: Target
    inputs: tuple[torch.Tensor, ...]
    device: torch.device
    dtype: torch.dtype
    amp: torch.dtype | None
    config: memopt.Config

    def make_model(self) -> nn.Module:
        """A fresh model on the CPU in the job's dtype."""
        return self.target.make().to(self.dtype)


def make_job(options: argparse.Namespace) -> Job:
    """Check everything the user gave, in the order of what it costs.

    Raises:
        CommandError: something cannot be used.
        ConfigError: `--numerics`, `--recompute` or `--budget` asks for what there is not.
    """
    budget = getattr(options, "budget", None)
    if budget is not None and options.recompute != "auto":
        raise CommandError(
            f"--budget chooses the levels, and --recompute {options.recompute} asks for one. Give one of them."
        )
    config = memopt.Config(
        numerics=options.numerics,
        recompute=options.recompute,
        memory_budget=None if budget is None else parse_size(budget, "--budget"),
        verify=False,
    )
    device = choose_device(options.device)
    if options.amp and options.dtype != "fp32":
        raise CommandError(f"--amp casts an fp32 model, not --dtype {options.dtype}. Leave one of them out.")
    dtype = DTYPES[options.dtype]
    target = load_target(options.target, parse_arguments(options.arg))
    model = target.make().to(dtype)
    if next(model.parameters(), None) is None:
        raise CommandError(f"{target.text} has no parameters, so there is nothing to train. Name a model that has.")
    inputs = make_inputs(model, options.input, options.batch_size, dtype, device.type)
    job = Job(target, inputs, device, dtype, AMP_DTYPES.get(options.amp), config)
    _probe(job, model)
    return job


def choose_device(name: str) -> torch.device:
    """The device that --device names; "auto" is the GPU if torch sees one.

    Raises:
        CommandError: there is no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise CommandError(
            f"--device cuda: torch {torch.__version__} sees no CUDA device here. Use --device cpu, or "
            "install a torch built for CUDA on a machine that has one."
        )
    on_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")


def _probe(job: Job, model: nn.Module) -> None:
    samples = [tensor[:PROBE_SAMPLES].to(job.device) for tensor in job.inputs]
    model = model.to(job.device)
    _require_an_input_for_each_argument(job, model)
    try:
        _run(job, model, samples)
    except Exception as error:
        if _takes_integers(job, model, samples):
            raise CommandError(
                f"{job.target.name} takes integer inputs, which the command does not make. Use memopt.apply or "
                "memopt.compare in Python with inputs of your own."
            ) from error
        shapes = ", ".join("x".join(map(str, sample.shape)) for sample in samples)
        dtype = str(job.dtype).removeprefix("torch.")
        missing = missing_sizes(model, samples[0].shape) if len(samples) == 1 else ""
        raise CommandError(
            f"{job.target.name} refuses {dtype} input of shape {shapes}: {describe(error, job.target.file)}. {missing}"
            "Give the shape it takes with --input (tried on few samples), or use memopt.apply in Python if it takes "
            "something other than tensors."
        ) from error


def _require_an_input_for_each_argument(job: Job, model: nn.Module) -> None:
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*job.inputs)
    except TypeError as error:
        inputs = f"{len(job.inputs)} input" + ("s" if len(job.inputs) > 1 else "")
        raise CommandError(
            f"{job.target.name}.forward({', '.join(signature.parameters)}) does not fit {inputs}: {error}. "
            "Give one --input for each argument of forward."
        ) from error


def _run(job: Job, model: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    with seeded(0, job.device), torch.no_grad(), autocast(model, job.amp):
        model(*inputs)


def _takes_integers(job: Job, model: nn.Module, samples: Sequence[torch.Tensor]) -> bool:
    """Whether the model runs once some of its inputs are integers: class numbers, tokens."""
    *choices, _as_they_are = product((True, False), repeat=len(samples))
    for choice in choices:
        mixed = [
            sample.new_zeros(sample.shape, dtype=torch.int64) if c else sample
            for sample, c in zip(samples, choice, strict=True)
        ]
        try:
            _run(job, model, mixed)
        except Exception:
            continue
        return True
    return False
