"""What people write is rewritten to the bit or left alone with a true reason; what only looks like it is left alone."""

import copy
import random
from contextlib import nullcontext

import pytest
import torch
from torch.utils import checkpoint

import memopt
from tests.helpers import (
    assert_everything_stays,
    assert_exact,
    assert_same,
    counted_saves,
    images,
    reasons,
    rewritten_copy,
    train_step,
)
from tests.wild import models
from tests.wild.models import CHAINS, FORMS, LOOK_ALIKES, REFUSED, REJECTED, Checkpointed


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_rewritten_exactly(name: str) -> None:
    make, chains = FORMS[name]
    torch.manual_seed(0)
    assert_exact(make(), images(size=12), at_least=chains)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_in_eval_mode(name: str) -> None:
    make, chains = FORMS[name]
    torch.manual_seed(0)
    assert_exact(make().eval(), images(size=12), at_least=chains)


@pytest.mark.parametrize("name", [*FORMS, *REFUSED, *REJECTED, *LOOK_ALIKES])
@pytest.mark.filterwarnings("ignore:memopt left .* as it is:UserWarning")
def test_everything_about_the_object_stays(name: str) -> None:
    made = {**FORMS, **REFUSED, **REJECTED}
    make = made[name][0] if name in made else LOOK_ALIKES[name]
    assert_everything_stays(make(), images(size=12))


NOT_LINEAR = {
    "skips and lists": "returns every concat",
    "cropped": "has no more than three layers",
    "lists in every spelling": "has no more than three layers",
    "autocast around every layer": "switches modes between layers",
    "dropout between": "keeps a mask as large as every concat",
    "random channels": "every concat is read outside of its chain",
    "overwritten concats": "every concat is made of the one before, activated",
}
"""Forms of which linear memory cannot be asked, and why."""
DEEP = [name for name in FORMS if name not in NOT_LINEAR]


@pytest.mark.parametrize("name", DEEP)
def test_every_form_saves_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "LAYERS", 8)
    torch.manual_seed(0)
    naive = FORMS[name][0]()
    saved = []
    for model in (naive, rewritten_copy(naive)):
        sizes: list[int] = []
        with counted_saves(sizes):
            result = model(images(size=12))
        saved.append(sum(sizes))
        del result

    assert saved[1] < 0.4 * saved[0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_recording_would_freeze_is_left_alone(name: str) -> None:
    make, reason = REFUSED[name]
    torch.manual_seed(0)
    naive = make()
    rewritten = rewritten_copy(naive)
    for step in range(3):
        random.seed(step)
        expected = train_step(naive, (images(size=12),))
        random.seed(step)
        with pytest.warns(UserWarning, match="left .* as it is") if step == 0 else nullcontext():
            actual = train_step(rewritten, (images(size=12),))
        assert_same(expected, actual)
    assert not memopt.explain(rewritten).rewritten
    assert reason in reasons(rewritten)


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_left_alone(name: str) -> None:
    torch.manual_seed(0)
    naive = LOOK_ALIKES[name]()
    rewritten = rewritten_copy(naive)
    assert_same(train_step(naive, (images(size=12),)), train_step(rewritten, (images(size=12),)))
    assert not memopt.explain(rewritten).rewritten


@pytest.mark.parametrize("name", REJECTED)
def test_chains_that_cannot_be_computed_again_are_left_alone(name: str) -> None:
    make, reason = REJECTED[name]
    torch.manual_seed(0)
    naive = make()
    rewritten = rewritten_copy(naive)
    for _ in range(2):
        assert_same(train_step(naive, (images(size=12),)), train_step(rewritten, (images(size=12),)))
    rejected = memopt.explain(rewritten).rejected
    assert rejected
    assert all(reason in str(chain.reason) and "models.py:" in chain.source for chain in rejected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_in_the_way_is_replaced(use_reentrant: bool) -> None:
    """The original updates running statistics twice a step, in forward and again in recomputing; memopt does not."""
    torch.manual_seed(0)
    naive = Checkpointed(use_reentrant)
    rewritten = rewritten_copy(naive)
    expected, actual = (train_step(copy.deepcopy(model), (images(size=12),)) for model in (naive, rewritten))
    statistics = {name for name in expected if "norm1.running" in name or "norm1.num_batches" in name}
    assert_same(
        {name: value for name, value in expected.items() if name not in statistics},
        {name: value for name, value in actual.items() if name not in statistics},
    )
    train_step(rewritten, (images(size=12),))
    assert len(memopt.explain(rewritten).rewritten) == CHAINS
    assert rewritten.layers[1].norm1.num_batches_tracked == 1
    assert checkpoint.CheckpointFunction.__module__ == checkpoint.__name__  # put back
