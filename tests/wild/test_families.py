"""Each family of form has tests for what is rewritten and for what is left alone, and they still say so."""

import warnings

import pytest
import torch
from torch import nn

import memopt
from tests.helpers import images, reasons, rewritten_copy, train_step
from tests.wild import libraries, models
from tests.wild.families import FAMILIES

REWRITTEN = sorted({name for family in FAMILIES.values() for name in family.rewritten})
LEFT_ALONE = sorted({name for family in FAMILIES.values() for name in family.left_alone})


def _image(name: str) -> torch.Tensor:
    table = libraries.DENSE if name in libraries.DENSE else libraries.LOOK_ALIKES
    return torch.randn(table[name][1], generator=torch.Generator().manual_seed(1))


def test_there_are_fifteen_families_with_tests_of_both_kinds() -> None:
    assert list(FAMILIES) == list(range(1, 16))
    for family in FAMILIES.values():
        assert family.rewritten, family.title
        assert family.left_alone, family.title


def test_every_form_belongs_to_a_family() -> None:
    apart = {"autograd function of its own"}
    assert models.FORMS.keys() - set(REWRITTEN) == apart
    assert (models.REFUSED | models.REJECTED | models.NOT_APPLICABLE | models.LOOK_ALIKES).keys() <= set(LEFT_ALONE)


@pytest.mark.parametrize("name", REWRITTEN)
def test_what_is_said_to_be_rewritten_is(name: str) -> None:
    torch.manual_seed(0)
    if name in models.FORMS:
        make, chains = models.FORMS[name]
        image = images(size=12)
    else:
        make, _, chains = libraries.DENSE[name]
        image = _image(name)
    model = rewritten_copy(make())
    train_step(model, (image,))

    assert memopt.explain(model).ran
    assert len(memopt.explain(model).rewritten) >= chains
    assert not memopt.explain(model).rejected


def _make_left_alone(name: str) -> tuple[nn.Module, str]:
    """A model and what the reason says; "" for look-alikes, of which nothing need be said."""
    for table in (models.REFUSED, models.REJECTED, models.NOT_APPLICABLE):
        if name in table:
            return table[name][0](), table[name][1]
    return (models.LOOK_ALIKES[name]() if name in models.LOOK_ALIKES else libraries.LOOK_ALIKES[name][0]()), ""


@pytest.mark.parametrize("name", LEFT_ALONE)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_is_said_to_be_left_alone_is(name: str) -> None:
    torch.manual_seed(0)
    model, reason = _make_left_alone(name)
    if name in models.NOT_APPLICABLE:
        with pytest.raises(memopt.CaptureError, match=reason):
            memopt.apply(model)
        return
    rewritten = rewritten_copy(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "memopt left .* as it is", UserWarning)
        train_step(rewritten, (_image(name) if name in libraries.LOOK_ALIKES else images(size=12),))
    explanation = memopt.explain(rewritten)
    assert reason in reasons(rewritten)
    assert explanation.rejected if name in models.REJECTED else not explanation.rewritten
