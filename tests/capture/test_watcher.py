"""What is noted beneath a recorded call, by shape rules as by torch."""

from typing import Any

import pytest
import torch
from torch import nn

from memopt.capture import capture, watcher
from tests.fake.described import described


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.relu, self.conv = nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(self.relu(self.norm(torch.cat([x, x], 1))))
        return torch.cat([x, torch.relu(y)], 1)


def _recorded(layer: nn.Module) -> list[tuple[Any, ...]]:
    nodes = [
        node for node in capture(layer, layer.forward, (torch.randn(2, 3, 4, 4),), {}).order if node.op != "output"
    ]
    storages = [node.meta["val"].untyped_storage()._cdata for node in nodes]
    return [
        (
            str(node),
            *described(node.meta["val"])[1:],
            type(node.meta["val"].grad_fn).__name__,
            storages.index(storage),
            {storages.index(written) for written in node.meta.get("writes", ()) if written in storages},
            [str(node.meta.get(key)) for key in ("reads_once", "random", "overwrites", "autocast")],
        )
        for node, storage in zip(nodes, storages, strict=True)
    ]


def test_a_recording_is_the_same_with_torchs_own_fake_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, known = _Layer(), watcher._known
    by_rules = _recorded(layer)
    monkeypatch.setattr(watcher, "_known", lambda func: known(func)._replace(rule=None))

    assert by_rules == _recorded(layer)
