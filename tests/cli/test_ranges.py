import pytest
from memopt_cli.errors import CommandError
from memopt_cli.ranges import is_range, parse_range


def test_ranges() -> None:
    assert parse_range("40:400:120", "--depth") == (40, 160, 280, 400)
    assert parse_range("1:4:2", "--depth") == (1, 3)
    assert is_range("1:2:3")
    assert not is_range("1:2")


@pytest.mark.parametrize("text", ["40", "40:400", "40:400:0", "400:40:60", "40:41:60", "0:10:5", "a:b:c"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(CommandError, match=r"--depth .* is not a range"):
        parse_range(text, "--depth")
