"""Deep copies of models of thousands of modules."""

import copy
from collections import OrderedDict
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def duplicate(model: Module) -> Module:
    """`copy.deepcopy(model)`, sooner: half its time goes to the dozen empty dictionaries of hooks in every module."""
    values = (value for module in model.modules() for value in vars(module).values())
    empty = (value for value in values if type(value) in (OrderedDict, dict, set) and not value)
    return copy.deepcopy(model, {id(value): type(value)() for value in empty})
