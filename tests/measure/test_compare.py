import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch
from torch import nn

import memopt
from memopt.ir import Explanation
from memopt.measure import GPU, Comparison, Equivalence, StepFigures
from memopt.measure.compare import compare

CPU = torch.device("cpu")
NOTHING_FOUND = Explanation(False, False, False, (), ())


def with_memopt(make_model: Callable[[], nn.Module], inputs: tuple[torch.Tensor], **options) -> Comparison:
    return compare(
        make_model,
        inputs,
        apply=lambda model, example: memopt.apply(model, example, config=memopt.Config(verify=False)),
        remove=memopt.remove,
        explain=memopt.explain,
        **{"device": CPU, "steps": 1, **options},
    )


def with_nothing(make_model: Callable[[], nn.Module], inputs: tuple[torch.Tensor], **options) -> Comparison:
    return compare(
        make_model,
        inputs,
        **{
            "apply": lambda model, example: model,
            "remove": lambda model: model,
            "explain": lambda model: NOTHING_FOUND,
            "device": CPU,
            "steps": 1,
            **options,
        },
    )


def test_before_and_after_measured_and_predicted(make_tiny, images) -> None:
    stages: list[str] = []
    result = with_memopt(make_tiny, images, on_stage=stages.append)
    assert stages == [
        "checking that the numbers stay the same",
        "predicting GPU memory before",
        "predicting GPU memory after",
        "measuring training steps before",
        "measuring training steps after",
    ]
    assert result.equivalence.passed
    assert result.after.activation_peak_bytes < result.before.activation_peak_bytes
    assert result.predicted_after.activation_peak_bytes < result.predicted_before.activation_peak_bytes
    assert result.before.step_seconds is not None
    assert result.predicted_before.step_seconds is None
    assert len(result.explanation.rewritten) == len(result.explanation.chains) > 0
    assert (result.device, result.device_name, result.dtype, result.amp) == (
        "cpu",
        "the CPU",
        torch.float32,
        None,
    )
    assert (result.input_shapes, result.checked_shapes) == (((4, 3, 8, 8),), ((2, 3, 8, 8),))
    assert result.target == GPU
    assert result.notes == ()


def test_a_buffer_kept_between_steps_cannot_hide(make_tiny, images, keeper) -> None:
    def apply(model: nn.Module, example_inputs: tuple[object, ...] | None) -> nn.Module:
        return keeper.apply(model)

    result = with_nothing(make_tiny, images, apply=apply, remove=keeper.remove)
    assert result.before.retained_bytes == 0
    assert result.after.retained_bytes == keeper.kept_bytes
    risen_bytes = result.after.activation_peak_bytes - result.before.activation_peak_bytes
    assert risen_bytes == keeper.kept_bytes


def test_what_not_even_removing_frees_is_a_note(make_tiny, images) -> None:
    leaked: list[list[torch.Tensor]] = []

    def apply(model: nn.Module, example_inputs: tuple[object, ...] | None) -> nn.Module:
        kept: list[torch.Tensor] = []
        leaked.append(kept)

        def keep(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if not kept:
                kept.append(torch.empty(2 << 20, dtype=torch.uint8))

        model.register_forward_pre_hook(keep)
        return model

    result = with_nothing(make_tiny, images, apply=apply)
    assert [note.split(" more ")[0] for note in result.notes] == [
        f"{source}: beside what memopt keeps, 2.00 MiB" for source in ("Predicted", "Measured")
    ]
    assert result.after.retained_bytes == 0, "of which the report's row speaks"


def test_without_measuring(make_tiny, images) -> None:
    result = with_nothing(make_tiny, images, measure=False)
    assert (result.before, result.after) == (None, None)
    assert result.predicted_before is not None
    assert result.predicted_before == result.predicted_after


def test_nothing_is_predicted_or_measured_when_the_equivalence_fails(make_tiny, images) -> None:
    def spoil(model: nn.Module, example_inputs: object) -> nn.Module:
        model.register_forward_hook(lambda module, args, output: output * 2)
        return model

    result = with_nothing(make_tiny, images, apply=spoil)
    assert not result.equivalence.passed
    assert {result.before, result.after, result.predicted_before, result.predicted_after} == {None}


def test_a_prediction_that_fails_is_a_note(images) -> None:
    class Reading(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * (1 + x.max().item()))

    result = with_nothing(lambda: Reading(3, 4, 3), images)
    assert (result.predicted_before, result.predicted_after) == (None, None)
    assert "cannot be predicted" in result.notes[0]
    assert result.before.saved_bytes


def test_a_step_that_would_not_fit_is_not_started(make_tiny, images, monkeypatch) -> None:
    monkeypatch.setattr(compare_module(), "available_bytes", lambda: 10)
    result = with_nothing(make_tiny, images)
    assert result.before == result.after == StepFigures(out_of_memory=True)
    assert result.predicted_before.activation_peak_bytes


def test_running_out_of_memory_before_still_measures_after(make_tiny, images) -> None:
    def exhaust(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        # Not in the check, which takes two samples, and not under fake tensors.
        if type(args[0]) is torch.Tensor and args[0].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def make() -> nn.Module:
        model = make_tiny()
        model.exhaust = model.register_forward_pre_hook(exhaust)
        return model

    def relieve(model: nn.Module, example_inputs: object) -> nn.Module:
        model.exhaust.remove()
        return model

    result = with_nothing(make, images, apply=relieve)
    assert result.before == StepFigures(out_of_memory=True)
    assert result.after.activation_peak_bytes


def test_inputs_that_are_no_samples_are_not_cut(make_tiny) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_tiny()

        def forward(self, x: torch.Tensor, options: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.inner(x) * options["scale"]

    inputs = (torch.randn(4, 3, 8, 8), {"scale": torch.ones(10)})
    result = with_nothing(Scaled, inputs, measure=False)
    assert result.checked_shapes == ((2, 3, 8, 8), (10,))


def test_under_autocast_it_is_recorded_under_autocast(make_tiny, images) -> None:
    states: list[bool] = []

    def apply(model: nn.Module, example_inputs: object) -> nn.Module:
        if example_inputs is not None:
            states.append(torch.is_autocast_enabled("cpu"))
        return model

    with_nothing(make_tiny, images, apply=apply, amp=torch.bfloat16, measure=False)
    assert states == [True]


def test_on_a_gpu_two_samples_are_checked_when_the_batch_does_not_fit(make_tiny, images, monkeypatch) -> None:
    module, checked = compare_module(), []
    equivalence = Equivalence("exact", True, True, True, 0.0, False, (), 1)
    small = with_nothing(make_tiny, images, measure=False)

    def check(subject: object, inputs: tuple[torch.Tensor], *rest: object) -> Comparison:
        checked.append(inputs[0].shape[0])
        if inputs[0].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return replace(small, equivalence=equivalence)

    monkeypatch.setattr(module, "_check", check)
    monkeypatch.setattr(module, "clean", lambda device: None)
    with_nothing(make_tiny, images, device=torch.device("cuda"))
    assert checked == [4, 2]


def compare_module() -> ModuleType:
    # The package exports the function under the module's name.
    return sys.modules["memopt.measure.compare"]
