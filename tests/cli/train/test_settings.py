import argparse

import pytest
from memopt_cli.errors import CommandError
from memopt_cli.options import parse
from memopt_cli.train.settings import DEFAULTS, new_settings, resumed_settings


def parsed(*argv: str) -> argparse.Namespace:
    return parse(["train", *argv])


def test_what_is_not_given_has_its_default() -> None:
    assert new_settings(parsed()) == DEFAULTS
    settings = new_settings(parsed("--depth", "22", "--epochs", "3", "--amp", "bf16", "--arg", "drop_rate=0.2"))
    assert (settings.depth, settings.epochs, settings.amp, settings.arg) == (22, 3, "bf16", ("drop_rate=0.2",))
    assert settings.growth_rate == DEFAULTS.growth_rate


def test_defaults_are_those_of_the_original() -> None:
    """But for the batch, which was 256: the digits would make five steps an epoch of it."""
    assert (DEFAULTS.depth, DEFAULTS.growth_rate, DEFAULTS.epochs, DEFAULTS.lr) == (40, 12, 300, 0.1)


def test_help_names_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    text = " ".join(capsys.readouterr().out.split())
    for default in ("default: 40", "default: 12", "default: 300", "default: 64", "default: 0.1", "default: 0.9"):
        assert default in text


def test_a_path_is_kept_absolute() -> None:
    assert str(new_settings(parsed("--data", "somewhere")).data).startswith("/")


@pytest.mark.parametrize("option", ["--depth", "--growth-rate"])
def test_options_of_the_default_model_are_refused_with_another(option: str) -> None:
    with pytest.raises(CommandError, match=f"{option} is of the default model"):
        new_settings(parsed("--model", "a.py:B", option, "40"))


@pytest.mark.parametrize(
    "argv",
    [
        ("--epochs", "0"),
        ("--batch-size", "some"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--momentum", "1"),
        ("--weight-decay", "-1"),
        ("--seed", "-1"),
        ("--augment", "perhaps"),
        ("--save", "a", "--resume", "b"),
        ("--efficient", "--naive"),
    ],
)
def test_values_that_cannot_be_are_refused(argv: tuple[str, ...]) -> None:
    with pytest.raises(CommandError, match=argv[0]):
        parsed(*argv)


def test_resuming_takes_what_was_stored() -> None:
    stored = new_settings(parsed("--depth", "22", "--arg", "drop_rate=0.1"))
    assert resumed_settings(parsed(), stored.as_dict(), "runs/1") == stored
    same = parsed("--depth", "22", "--batch-size", "auto")
    assert resumed_settings(same, stored.as_dict(), "runs/1") == stored
    longer = resumed_settings(parsed("--epochs", "400"), stored.as_dict(), "runs/1")
    assert longer.epochs == 400


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--depth", "40", "runs/1 was trained with --depth 22, not 40. Leave --depth out"),
        ("--batch-size", "32", "--batch-size 64, not 32"),
        ("--amp", "bf16", "--amp left out, not bf16"),
        ("--arg", "drop_rate=0.5", "not drop_rate=0.5"),
    ],
)
def test_resuming_refuses_another_run(option: str, value: str, message: str) -> None:
    stored = new_settings(parsed("--depth", "22")).as_dict()
    with pytest.raises(CommandError, match=message):
        resumed_settings(parsed(option, value), stored, "runs/1")


@pytest.mark.parametrize("change", [{"unknown": 1}, {"arg": None}])
def test_settings_of_another_version_are_a_line(change: dict[str, object]) -> None:
    with pytest.raises(CommandError, match="written by another version"):
        resumed_settings(parsed(), {**DEFAULTS.as_dict(), **change}, "runs/1")
