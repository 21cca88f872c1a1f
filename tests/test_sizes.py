import pytest

from memopt.errors import ConfigError
from memopt.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12GiB", 12 * 2**30), ("1.5 MiB", 3 * 2**19), ("16GB", 16 * 10**9), ("512", 512), ("2kib", 2048)],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text, "--memory") == expected


@pytest.mark.parametrize("text", ["", "12 potatoes", "-3GiB", "0GiB", "GiB", "1e3MiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--memory .* is not a size.*12GiB"):
        parse_size(text, "--memory")
