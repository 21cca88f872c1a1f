"""Fake stand-ins for a module's parameters and buffers while its forward is recorded."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from memopt.capture.places import OF_RNNS, tensor_stores, where_used
from memopt.errors import CaptureError
from memopt.fake import make_fake
from memopt.ir import is_in_pieces, sharding_policy


def fake_of(
    tensor: torch.Tensor, mode: FakeTensorMode, whole_dtype: torch.dtype | None = None, *, alone: bool = False
) -> torch.Tensor:
    """A fake tensor of `mode` with the metadata of `tensor` (itself if it is one already).

    Of a parameter that is in pieces: of the whole, in `whole_dtype` if that is given. Of what lies `alone` in its
    memory it is made directly, for a deep network has many; else torch sees to it that fakes share theirs as well.
    """
    if isinstance(tensor, FakeTensor):
        return tensor
    if alone:
        made = make_fake(mode, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
        made.requires_grad_(tensor.requires_grad)
        if isinstance(tensor, nn.Parameter):
            made._is_param = True  # all that nn.Parameter does besides a detach
        return made
    if is_in_pieces(tensor):
        with mode:
            fake = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=whole_dtype or tensor.dtype, device=tensor.device
            )
    else:
        # Detached: making a fake of a tensor inside a graph would look at its `.grad`, which warns.
        fake = mode.from_tensor(tensor.detach(), static_shapes=True)
    fake.requires_grad_(tensor.requires_grad)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


@contextmanager
def fake_state(root: nn.Module, mode: FakeTensorMode, inputs: list[Any]) -> Iterator[dict[int, str]]:
    """Swap every parameter and buffer of `root` for a fake one; yields {id of fake tensor: dotted name}.

    A buffer that is written by forward is written on the fake: the user's state never changes. What is to be handed
    in, in `inputs`, may lie in the same memory.

    Raises:
        CaptureError: forward rebinds a buffer or parameter (`self.x = …`), an effect that a graph cannot carry.
    """
    names: dict[int, str] = {}
    swapped: list[tuple[_Store, str, torch.Tensor, torch.Tensor, str]] = []
    attributes: list[tuple[_Store, str]] = []
    seen: set[int] = set()
    fakes: dict[int, torch.Tensor] = {}  # what is shared stays shared
    dtypes = _whole_dtypes(root)
    together = _storages_of_several(
        [t for module in root.modules() for store in tensor_stores(module) for t in store.values()] + inputs
    )
    for path, module in root.named_modules():
        attributes.append((vars(module), path))
        for store in tensor_stores(module):
            if id(store) in seen:  # a replica can share its dictionaries with the original
                continue
            seen.add(id(store))
            for name, tensor in store.items():
                if isinstance(tensor, torch.Tensor):
                    if is_lazy(tensor):
                        raise CaptureError(
                            f"Parameters of {path} get their shapes at the first forward. Run one before."
                        )
                    if id(tensor) not in fakes:
                        alone = _is_whole(tensor) and tensor.untyped_storage()._cdata not in together
                        fakes[id(tensor)] = fake_of(tensor, mode, dtypes[path], alone=alone)
                    fake = fakes[id(tensor)]
                    full = f"{path}.{name}" if path else name
                    names.setdefault(id(fake), full)
                    swapped.append((store, name, tensor, fake, full))
    rnns = [vars(module) for module in root.modules() if isinstance(module, nn.RNNBase)]
    known = [{name: store[name] for name in OF_RNNS if name in store} for store in rnns]
    cached, parametrize._cache = parametrize._cache, {}  # of `parametrize.cached()`: weights made of real parameters
    try:
        for store, name, _, fake, _ in swapped:
            store[name] = fake
        yield names
        rebound = [full for store, name, _, fake, full in swapped if store.get(name) is not fake]
        rebound += _new_tensors(attributes, names)
        if rebound:
            raise CaptureError(
                f"{where_used(root, rebound[0])}: forward assigns to self.{rebound[0]}, which a recording cannot "
                "carry. Write a buffer in place (copy_, add_ …); hand anything else out as a result."
            )
    finally:
        parametrize._cache = cached
        for store, path in attributes:
            for full in _new_tensors([(store, path)], names):
                del store[full.rpartition(".")[2]]
        for store, name, tensor, _, _ in swapped:
            store[name] = tensor
        for store, lists in zip(rnns, known, strict=True):
            store.update(lists)


def _storages_of_several(values: list[Any]) -> set[int]:
    """The memory in which more than one of the tensors among `values` lies."""
    tensors = {id(value): value for value in values if isinstance(value, torch.Tensor) and _is_ordinary(value)}
    counts = Counter(tensor.untyped_storage()._cdata for tensor in tensors.values())
    return {storage for storage, count in counts.items() if count > 1}


def _is_ordinary(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor is ordinary, lies in order and takes up all of its memory."""
    return (
        _is_ordinary(tensor)
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_meta)
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    )


def _whole_dtypes(root: nn.Module) -> dict[str, torch.dtype | None]:
    """For each module by path: the dtype in which FSDP2 makes its parameters whole, which a parent may decide."""
    dtypes: dict[str, torch.dtype | None] = {}
    for path, module in root.named_modules():
        policy = sharding_policy(module)
        dtypes[path] = dtypes.get(path.rpartition(".")[0]) if policy is None else policy.parameters
    return dtypes


_Store = dict[str, Any]


def _new_tensors(attributes: list[tuple[_Store, str]], names: dict[int, str]) -> list[str]:
    """Tensors that forward left in plain attributes."""
    return [
        f"{path}.{name}" if path else name
        for store, path in attributes
        for name, value in store.items()
        if isinstance(value, torch.Tensor) and id(value) not in names
    ]
