import gc
import weakref

from memopt.garbage import quick_collections


class Node:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.itself = self


def test_everything_is_as_before_afterwards() -> None:
    threshold, frozen = gc.get_threshold(), gc.get_freeze_count()
    with quick_collections():
        assert gc.get_threshold()[0] > threshold[0]
        with quick_collections():
            pass
        assert gc.get_freeze_count() > frozen
    assert gc.get_threshold() == threshold
    assert gc.get_freeze_count() <= frozen


def test_garbage_is_found_inside() -> None:
    with quick_collections():
        gone = weakref.ref(Node())
        gc.collect()
        assert gone() is None


def test_collections_that_are_switched_off_stay_so() -> None:
    before = gc.get_threshold()
    gc.set_threshold(0)
    try:
        with quick_collections():
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)
