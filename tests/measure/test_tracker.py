import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from memopt.measure import StorageTracker


def test_counts_each_storage_once_however_many_views() -> None:
    with StorageTracker() as tracker:
        x = torch.empty(10, 10)
        views = [x[1:], x.t(), x.reshape(-1), x.detach()]
    assert tracker.current_bytes == 400
    del x
    assert tracker.current_bytes == 400
    del views
    assert tracker.current_bytes == 0


def test_counts_tensors_that_only_autograd_holds() -> None:
    weight = torch.ones(1, requires_grad=True)
    x = torch.ones(1000)
    with StorageTracker() as tracker:
        loss = (weight * x).exp().sum()
        # exp keeps its result for backward; nothing in Python refers to it.
        assert tracker.current_bytes == 4000 + 4
        loss.backward()
        assert tracker.current_bytes == 4 + 4
    assert tracker.peak_bytes > 8000


def test_counts_temporaries_inside_backward() -> None:
    x = torch.ones(1000, requires_grad=True)
    with StorageTracker() as tracker:
        loss = (x.sin() + x.cos()).sum()
        after_forward_bytes = tracker.current_bytes
        tracker.reset_peak()
        loss.backward()
    # The gradients of both branches live at once: one is kept until the other is added to it.
    assert tracker.peak_bytes >= after_forward_bytes + 2 * 4000


def test_freeing_is_seen_after_the_mode_was_left() -> None:
    with StorageTracker() as tracker:
        x = torch.empty(100)
    assert tracker.current_bytes == 400
    del x
    assert tracker.current_bytes == 0


@pytest.mark.parametrize(("rounding", "expected"), [(1, 4 + 2052), (512, 512 + 2560)])
def test_rounds_each_storage_up(rounding: int, expected: int) -> None:
    with StorageTracker(rounding) as tracker:
        kept = torch.empty(1), torch.empty(513), torch.empty(0)
    assert tracker.current_bytes == expected
    assert len(kept) == 3


def test_peak_starts_again_from_what_is_live() -> None:
    with StorageTracker() as tracker:
        kept = torch.empty(10)
        del_me = torch.empty(1000)
        del del_me
        assert tracker.peak_bytes == 4040
        tracker.reset_peak()
        assert tracker.peak_bytes == kept.nbytes


def test_follows_resizing_by_operators_and_by_the_storage_itself() -> None:
    before = torch.UntypedStorage.resize_
    with StorageTracker() as tracker:
        x = torch.empty(10)
        x.resize_(100)
        assert tracker.current_bytes == 400
        x.untyped_storage().resize_(0)
        assert tracker.current_bytes == 0
        x.untyped_storage().resize_(800)
        assert tracker.current_bytes == 800
    assert torch.UntypedStorage.resize_ is before


def test_tracks_what_existed_before() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    parameters_bytes = 4 * (16 + 4 + 4 + 4)
    buffers_bytes = 4 * (4 + 4) + 8
    tracker = StorageTracker()
    tracker.track(model)
    assert tracker.current_bytes == 2 * parameters_bytes + buffers_bytes
    tracker.track(optimizer, {"inputs": [torch.empty(0)]}, None)
    assert tracker.current_bytes == 3 * parameters_bytes + buffers_bytes


def test_counts_fake_tensors_of_its_mode_only() -> None:
    mode, other = FakeTensorMode(), FakeTensorMode()
    with StorageTracker() as real, StorageTracker(fake_mode=mode) as fake:
        with mode:
            mine = torch.empty(10)
        with other:
            theirs = torch.empty(100)
        genuine = torch.empty(1000)
    assert (fake.current_bytes, real.current_bytes) == (40, 4000)
    assert mine.shape[0] + theirs.shape[0] + genuine.shape[0] == 1110


def test_fake_training_step_has_the_bytes_of_the_real_one(make_tiny, images) -> None:
    def peak_bytes(tracker: StorageTracker, model: nn.Module, x: torch.Tensor) -> int:
        tracker.track(model, x)
        with tracker:
            model(x).sum().backward()
        return tracker.peak_bytes

    mode = FakeTensorMode()
    fake_model = make_tiny()
    for module in fake_model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: mode.from_tensor(t) for name, t in tensors.items() if t is not None})
    with mode:
        predicted = peak_bytes(StorageTracker(fake_mode=mode), fake_model, torch.empty(4, 3, 8, 8))
    assert predicted == peak_bytes(StorageTracker(), make_tiny(), *images)


def test_agrees_with_the_tracker_of_torch(make_tiny, images) -> None:
    def step(tracker: StorageTracker | MemTracker, model: nn.Module) -> None:
        with tracker:
            model(*images).sum().backward()

    model = make_tiny()
    ours = StorageTracker()
    ours.track(model, images)
    step(ours, model)
    model.zero_grad()
    gc.collect()
    theirs = MemTracker()
    theirs.track_external(model, *images)
    step(theirs, model)
    assert ours.peak_bytes == theirs.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
