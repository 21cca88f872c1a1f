"""The public calls: what they leave as it was, what they undo, what they refuse."""

import copy
import io
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memopt
from densenet_models import bc
from memopt.runtime.ops.batch_norm import BatchNorm
from memopt.runtime.ops.convolution import Convolution
from tests.helpers import assert_same, assert_trains_alike, dense_net, images, reasons, rewritten_copy, train_step
from tests.wild.models import CHAINS, Checkpointed


def test_apply_changes_nothing_that_can_be_seen() -> None:
    model = dense_net()
    before = (repr(model), dict(vars(model)), list(model.state_dict()), list(model.parameters()))

    applied = memopt.apply(model)

    assert applied is model
    assert isinstance(model, type(dense_net()))
    assert type(model).__name__ == "DenseNet"
    assert (repr(model), dict(vars(model)), list(model.state_dict())) == before[:3]
    assert all(a is b for a, b in zip(model.parameters(), before[3], strict=True))


def test_remove_restores_the_class() -> None:
    model = dense_net()
    own = type(model)

    memopt.remove(memopt.apply(model))

    assert type(model) is own
    assert not memopt.explain(model).applied


def test_remove_takes_only_our_class_out_of_later_subclasses() -> None:
    class Sharded:
        """Stands for what FSDP2 mixes in."""

    model = memopt.apply(dense_net())
    own = type(dense_net())
    model.__class__ = type("FSDPDenseNet", (Sharded, type(model)), {})
    naive = dense_net()
    assert_trains_alike(naive, model, images())

    memopt.remove(model)

    assert type(model).__bases__ == (Sharded, own)
    assert_trains_alike(naive, model, images(), at_least=0)


def test_apply_again_changes_the_configuration() -> None:
    model = memopt.apply(memopt.apply(dense_net()), config=memopt.Config(recompute="concat"))
    train_step(model, (images(),))

    assert {chain.level for chain in memopt.explain(model).rewritten} == {"concat"}
    assert type(memopt.remove(model)) is type(dense_net())


def test_deep_copies_are_applied_and_independent() -> None:
    model = memopt.apply(dense_net())
    train_step(model, (images(),))

    duplicate = copy.deepcopy(model)

    naive = memopt.remove(copy.deepcopy(model))
    assert_trains_alike(naive, duplicate, images())
    assert all(a is not b for a, b in zip(model.parameters(), duplicate.parameters(), strict=True))


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_pickles_hold_the_plain_model(protocol: int) -> None:
    model = memopt.apply(bc.DenseNet(depth=10))

    data = pickle.dumps(model, protocol)

    assert type(pickle.loads(data)) is bc.DenseNet
    assert b"memopt" not in data


def test_saved_models_load_where_memopt_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(memopt.apply(bc.DenseNet(depth=10)), path)
    code = (
        "import sys; sys.modules['memopt'] = None\n"
        "import torch\n"
        f"model = torch.load({str(path)!r}, weights_only=False)\n"
        "model(torch.zeros(2, 3, 8, 8)).sum().backward()\n"
        "print(type(model).__name__)"
    )

    root = str(Path(__file__).parents[1])
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "DenseNet"


def test_torch_save_and_load_round_trip() -> None:
    model = memopt.apply(bc.DenseNet(depth=10))
    file = io.BytesIO()

    torch.save(model.state_dict(), file)
    file.seek(0)
    naive = bc.DenseNet(depth=10)
    naive.load_state_dict(torch.load(file))

    assert_same(train_step(naive, (images(),)), train_step(model, (images(),)))


def test_example_inputs_record_and_verify_now() -> None:
    model = memopt.apply(dense_net(), example_inputs=(images(4),))

    explanation = memopt.explain(model)

    assert explanation.captured
    assert len(explanation.rewritten) == len(explanation.chains) > 0
    assert not explanation.ran
    assert "The rewritten forward has not run yet." in explanation.notes
    assert_trains_alike(dense_net(), model, images(4))
    assert memopt.explain(model).notes == ()


def test_verification_leaves_the_models_state_alone() -> None:
    model, twin = dense_net(), dense_net()
    torch.manual_seed(3)
    before = torch.get_rng_state()

    memopt.apply(model, example_inputs=images(4))

    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_wrong_runtime_is_found_out_and_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Convolution.backward

    def wrong(self: Convolution, *args: Any, **kwargs: Any) -> Any:
        return tuple(None if g is None else g * 1.0001 for g in honest(self, *args, **kwargs))

    monkeypatch.setattr(Convolution, "backward", wrong)
    model = dense_net()

    with pytest.raises(memopt.EquivalenceError, match="differs from the untouched one, first in") as error:
        memopt.apply(model, example_inputs=images())

    assert "The first chain that differs is cat" in str(error.value)
    assert "block1.layers.0.norm1" in str(error.value)
    assert "helpers.py:" in str(error.value)
    assert type(model) is type(dense_net())


def test_nothing_to_rewrite_leaves_the_model_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    memopt.apply(model, example_inputs=images())

    assert type(model) is nn.Sequential
    explanation = memopt.explain(model)
    assert not explanation.applied
    assert any("nothing to rewrite" in note for note in explanation.notes)


class Branching(nn.Module):
    """Decides by the values of a tensor around a network that does not."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if bool(x.sum() > 0) else self.inner(-x)


def test_what_cannot_be_recorded_is_refused_with_example_inputs() -> None:
    model = Branching(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))

    with pytest.raises(memopt.CaptureError, match=r"test_api\.py:\d+: forward needs the value of a tensor"):
        memopt.apply(model, example_inputs=images())

    assert type(model) is Branching


def test_the_parts_of_a_model_are_rewritten_where_the_whole_cannot_be() -> None:
    naive = Branching(dense_net())
    model = memopt.apply(Branching(dense_net()), example_inputs=images())

    before = memopt.explain(model)
    assert len(before.rewritten) == len(before.chains) == 7
    assert not before.ran
    said = "memopt left Branching as it is but for inner, which memopt rewrites: .* forward needs the value of a tensor"
    with pytest.warns(UserWarning, match=said):
        assert_trains_alike(naive, model, images(), at_least=7)
    assert re.search(said, reasons(model)), "the warning and explain say the same"
    assert {chain.module.split(".")[0] for chain in memopt.explain(model).chains} == {"inner"}
    assert "forward needs the value of a tensor" in reasons(model)
    assert list(model.state_dict()) == list(naive.state_dict())
    memopt.remove(model)
    assert type(model.inner) is type(naive.inner)


def test_a_copy_of_a_model_rewritten_in_parts_is_rewritten_too() -> None:
    naive = Branching(dense_net())
    model = memopt.apply(Branching(dense_net()), example_inputs=images())
    with pytest.warns(UserWarning, match="memopt left Branching as it is"):
        assert_trains_alike(naive, copy.deepcopy(model), images(), at_least=7)


def test_verification_looks_at_eval_mode_and_at_a_second_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[bool, int]] = set()
    honest = BatchNorm.forward

    def watched(self: BatchNorm, x: torch.Tensor, *args: Any) -> Any:
        seen.add((self.training, len(x)))
        return honest(self, x, *args)

    monkeypatch.setattr(BatchNorm, "forward", watched)
    memopt.apply(dense_net(), example_inputs=images(4))

    assert {(True, 2), (True, 3), (False, 2)} <= seen


def test_verification_that_does_not_fit_in_memory_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Convolution, "forward", out_of_memory)
    model = memopt.apply(dense_net(), example_inputs=images())

    assert "Not verified: the comparison" in reasons(model)
    assert memopt.explain(model).applied


def test_a_model_with_checkpoints_is_verified_without_them() -> None:
    model = memopt.apply(Checkpointed(), example_inputs=images())

    assert len(memopt.explain(model).rewritten) == CHAINS


def test_what_cannot_be_recorded_runs_as_it_is_and_warns_once() -> None:
    model = memopt.apply(Branching(dense_net()))

    with pytest.warns(UserWarning, match="memopt left Branching as it is"):
        first = train_step(model, (images(),))
    train_step(model, (images(3),))

    assert_same(train_step(Branching(dense_net()), (images(),)), first)
    (note,) = memopt.explain(model).notes
    assert "forward needs the value of a tensor" in note


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_and_scripted_models_are_refused_with_the_remedy() -> None:
    with pytest.raises(memopt.CaptureError, match=r"memopt\.apply first"):
        memopt.apply(torch.compile(dense_net()))
    with pytest.raises(memopt.CaptureError, match="ScriptModule"):
        memopt.apply(torch.jit.trace(dense_net().eval(), images()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (bc.DenseNet, r"^DenseNet is a class\. Pass an instance: memopt\.apply\(DenseNet\(\)\)\.$"),
        (dense_net, r"^memopt needs a torch\.nn\.Module, not a function\. Pass the model itself\.$"),
        (None, r"^memopt needs a torch\.nn\.Module, not a NoneType\. Pass the model itself\.$"),
    ],
)
def test_what_is_no_module_is_refused_with_the_remedy(given: Any, message: str) -> None:
    for call in (memopt.apply, memopt.remove, memopt.explain):
        with pytest.raises(TypeError, match=message) as caught:
            call(given)
        assert isinstance(caught.value, memopt.MemoptError)


def test_inputs_that_do_not_fit_name_the_model_and_the_remedy() -> None:
    with pytest.raises(
        memopt.CaptureError,
        match=r"^DenseNet: forward fails on tensors without data \(.*\)\. Check the shapes and dtypes of the inputs",
    ):
        memopt.apply(dense_net(), example_inputs=torch.zeros(2, 5, 8, 8))


def test_wrappers_are_looked_into() -> None:
    wrapped = nn.DataParallel(dense_net())

    assert memopt.apply(wrapped) is wrapped

    assert memopt.explain(wrapped).applied
    memopt.remove(wrapped)
    assert not memopt.explain(wrapped).applied


def test_a_forward_replaced_on_the_instance_is_refused_before_and_copied_after() -> None:
    model = dense_net()
    own: Any = model.forward
    model.forward = lambda x: own(x) * 2
    with pytest.raises(memopt.CaptureError, match=r"replaced on the instance.*Call memopt\.apply before"):
        memopt.apply(model)
    del model.forward

    memopt.apply(model)
    ours: Any = model.forward
    model.forward = lambda x: ours(x) * 2
    duplicate = copy.deepcopy(model)
    model(images()).sum().backward()
    assert memopt.explain(model).ran
    assert memopt.explain(duplicate).applied


@pytest.mark.parametrize("field", [{"numerics": "bold"}, {"recompute": "all"}])
def test_bad_configurations_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(memopt.ConfigError, match=f"Config.{next(iter(field))}"):
        memopt.Config(**field)


class Squeezed(nn.Module):
    """A block whose layers scale their features by themselves, which no fused kernel does."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 * n) for n in (1, 2, 3))
        self.convs = nn.ModuleList(nn.Conv2d(4 * n, 4, 3, padding=1) for n in (1, 2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(torch.relu(norm(x)))
            x = torch.cat([x, y * y.mean((2, 3), keepdim=True).sigmoid()], 1)
        return x


@pytest.mark.skipif(torch.cuda.is_available(), reason='there "auto" is what is predicted')
def test_compare_says_what_the_prediction_is_of() -> None:
    fused = memopt.compare(dense_net, images(4), measure=False).notes
    assert any("fused kernels on a GPU, which is what is predicted" in note for note in fused)
    assert not any(note.startswith("On a GPU: ") for note in fused)
    exact = memopt.compare(Squeezed, torch.randn(4, 4, 8, 8), measure=False).notes
    assert any("For this model there are none" in note for note in exact)
    assert any(note.startswith("On a GPU: Dense block 1 runs exactly, not on fused kernels: ") for note in exact)


def test_compare_returns_the_report_as_data() -> None:
    comparison = memopt.compare(dense_net, images(4), measure=False)

    assert comparison.equivalence.passed
    assert comparison.predicted_before is not None
    assert comparison.predicted_after is not None
    assert comparison.before is None
    assert str(comparison).startswith(f"Comparison on {comparison.device_name}: 7 of 7 chains rewritten, equivalent.")


def test_levels_differ_in_what_they_keep() -> None:
    kept: dict[str, int] = {}
    for level in ("concat", "layer"):
        total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        model = rewritten_copy(dense_net(), level)
        model(images())  # recorded
        total = 0
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(images())
        kept[level] = total

    assert kept["layer"] < kept["concat"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"example_inputs": memopt.Config()}, "config=memopt.Config"),
        ({"config": {"recompute": "concat"}}, "config is a dict"),
    ],
)
def test_a_configuration_in_the_wrong_place(arguments: dict[str, Any], message: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(memopt.ConfigError, match=message):
        memopt.apply(model, **arguments)
    assert type(model) is nn.Linear
