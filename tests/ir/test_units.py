import pytest

from memopt.errors import ConfigError
from memopt.ir import duration, first_names, mebibytes, parse_size, whole_mebibytes

MIB = 2**20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12GiB", 12 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        ("16GB", 16 * 10**9),
        ("2kib", 2048),
        ("12 b", 12),
        ("1048576", 2**20),
        ("6442450944", 6 * 2**30),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text, "--memory") == expected


@pytest.mark.parametrize("text", ["", "12 potatoes", "-3GiB", "0GiB", "GiB", "1e3MiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--memory .* is not a size.*12GiB"):
        parse_size(text, "--memory")


@pytest.mark.parametrize(("text", "number"), [("12", "12"), (" 6 ", "6"), ("1.5", "1.5"), ("1048575", "1048575")])
def test_a_small_number_without_unit_is_not_taken_for_bytes(text: str, number: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text, "--memory")
    assert f"--memory {number} would be {number} bytes" in str(caught.value)
    assert f"for example {number}GiB" in str(caught.value)


@pytest.mark.parametrize(
    ("size_bytes", "text", "whole"),
    [
        (0, "0.0 MiB", "0 MiB"),
        (1, "0.00 MiB", "1 MiB"),
        (MIB // 2, "0.50 MiB", "1 MiB"),
        (10 * MIB, "10.0 MiB", "10 MiB"),
        (12345 * MIB, "12,345.0 MiB", "12,345 MiB"),
    ],
)
def test_a_mebibyte_is_two_to_the_twenty(size_bytes: int, text: str, whole: str) -> None:
    assert mebibytes(size_bytes) == text
    assert whole_mebibytes(size_bytes) == whole


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 ms"),
        (4e-7, "under 1 µs"),
        (5.4e-5, "54 µs"),
        (1e-4, "0.1 ms"),
        (0.0067, "6.7 ms"),
        (0.7312, "731.2 ms"),
        (2.1, "2.10 s"),
    ],
)
def test_times(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lists_are_cut() -> None:
    assert first_names(["a", "b", "c"]) == "a, b, c"
    assert first_names(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
