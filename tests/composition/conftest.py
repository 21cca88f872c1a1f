"""One pair of processes for every test that needs several ranks."""

from collections.abc import Iterator

import pytest

from tests.composition.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pair = Ranks()
    yield pair
    pair.stop()
