"""Fake stand-ins for parameters and buffers."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memopt.capture.fake_state import fake_of, fake_state
from tests.fake.described import described


def test_fakes_of_state_are_what_torch_makes_of_it() -> None:
    mode = FakeTensorMode()
    for tensor in (
        nn.Parameter(torch.randn(3, 2)),
        torch.randn(4),
        torch.tensor(0),
        nn.Parameter(torch.ones(2), False),
    ):
        alone, made = fake_of(tensor, mode, alone=True), fake_of(tensor, mode)
        assert described(alone) == described(made)
        assert isinstance(alone, nn.Parameter) is isinstance(tensor, nn.Parameter) is isinstance(made, nn.Parameter)


def test_what_shares_memory_shares_it_in_a_recording() -> None:
    root = nn.Module()
    whole = torch.randn(4, 2)
    root.register_buffer("whole", whole)
    root.register_buffer("again", whole.view(2, 4))
    root.register_buffer("row", torch.randn(3, 2)[1])
    root.register_buffer("given", torch.randn(2))
    root.weight = nn.Parameter(torch.randn(2))
    given = root.get_buffer("given").detach()
    with fake_state(root, mode := FakeTensorMode(), [given]):
        fakes = {name: t.untyped_storage()._cdata for name, t in (*root.named_buffers(), *root.named_parameters())}
        assert fakes["whole"] == fakes["again"]
        assert fakes["given"] == fake_of(given, mode).untyped_storage()._cdata
        assert len(set(fakes.values())) == 4
        assert root.get_buffer("row").storage_offset() == 2
