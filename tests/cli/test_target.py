import importlib
import sys
from pathlib import Path

import pytest
import torch
from memopt_cli.errors import CommandError
from memopt_cli.target import load_target, parse_arguments


def test_a_class_in_a_file(tiny: str) -> None:
    target = load_target(f"{tiny}:Tiny", {"growth": 8})
    first, second = target.make(), target.make()
    assert first is not second
    assert first.stem.out_channels == 8
    assert (target.name, target.file) == ("Tiny", tiny)


def test_a_factory(tiny: str) -> None:
    assert load_target(f"{tiny}:factory", {"growth": 5}).make().stem.out_channels == 5


def test_an_instance_is_copied_for_each_use(tiny: str) -> None:
    target = load_target(f"{tiny}:instance", {})
    first, second = target.make(), target.make()
    with torch.no_grad():
        first.stem.weight.zero_()
    assert second.stem.weight.any()


def test_a_module_in_a_package(write, tiny: str, tmp_path: Path, monkeypatch) -> None:
    write("user_package/__init__.py", "")
    write("user_package/net.py", "from .part import Net\nclass Outer:\n    Inner = Net\n")
    write(
        "user_package/part.py",
        "from torch import nn\nclass Net(nn.Linear):\n    def __init__(self): super().__init__(2, 2)\n",
    )
    monkeypatch.chdir(tmp_path)
    assert load_target("user_package.net:Net", {}).make().in_features == 2
    assert load_target("user_package.net:Outer.Inner", {}).make().in_features == 2


def test_a_file_may_import_its_neighbours_and_be_called_like_a_library(write, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    write("user_neighbour.py", "SIZE = 3\n")
    path = write(
        "colorsys.py",
        "from torch import nn\nimport user_neighbour\ndef net(): return nn.Linear(user_neighbour.SIZE, 2)\n",
    )
    assert load_target(f"{path}:net", {}).make().in_features == 3
    assert hasattr(importlib.import_module("colorsys"), "rgb_to_hls")


def test_a_class_can_be_found_again_by_its_module(tiny: str) -> None:
    model = load_target(f"{tiny}:Tiny", {}).make()
    assert sys.modules[type(model).__module__].Tiny is type(model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{tiny}", r"TARGET '.*tiny.py' names no model. Write TARGET as path/file.py:Name"),
        ("{tiny}:", r"names no model"),
        (":Tiny", r"names no model"),
        ("{folder}/absent.py:Tiny", r"There is no file .*absent.py. Write TARGET as"),
        ("{folder}:Tiny", r"There is no file"),
        ("user_absent.module:Net", r"There is no module user_absent.module to import from here. Write TARGET"),
        ("{tiny}:Tinny", r"tiny.py has no Tinny. It has Tiny"),
        ("{tiny}:number", r":number is an int. Name a class, a function"),
        ("{tiny}:missing", r":missing is None. Name a class"),
        ("{tiny}:Tiny.absent", r"has no Tiny.absent"),
    ],
)
def test_what_cannot_be_found(tiny: str, text: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        load_target(text.format(tiny=tiny, folder=Path(tiny).parent), {})


def test_other_names_are_offered_and_imported_ones_are_not(write) -> None:
    path = write(
        "net.py",
        "from torch.nn import Linear, Module\nclass Alpha(Module): pass\ndef beta(): pass\n_c = 1\n",
    )
    with pytest.raises(CommandError, match=r"has no Zzz. It has Alpha, beta\.$"):
        load_target(f"{path}:Zzz", {})
    empty = write("empty.py", "import torch\n")
    with pytest.raises(CommandError, match="It defines no class, function or module"):
        load_target(f"{empty}:Zzz", {})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "import user_absent_library",
            r"ModuleNotFoundError: No module named 'user_absent_library' \(.*broken.py, line 1\). Install what it",
        ),
        ("x = 1\n1 / 0", r"ZeroDivisionError: division by zero \(.*broken.py, line 2\)\. Mend it\.$"),
        ("def f(:\n", r"SyntaxError: .* \(.*broken.py, line 1\).*\. Mend it\.$"),
        (
            "import sys\nsys.exit(3)",
            r"SystemExit: 3 \(.*broken.py, line 2\)\. Put what it runs under if __name__ == '__main__'\.$",
        ),
        ("from .part import Net", r"attempted relative import.*Name it as package.module:Name"),
    ],
)
def test_import_errors_name_the_line(write, source: str, message: str) -> None:
    path = write("broken.py", source)
    with pytest.raises(CommandError, match=message) as caught:
        load_target(f"{path}:Net", {})
    assert str(caught.value).startswith(f"Importing {path} failed: ")


def test_import_errors_inside_a_package(write, tmp_path: Path, monkeypatch) -> None:
    write("user_broken.py", "import user_absent_library\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CommandError, match=r"Importing user_broken failed: ModuleNotFoundError.*user_absent_library"):
        load_target("user_broken:Net", {})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("factory", {}, r"factory needs growth, which has no default. Give --arg growth=VALUE\.$"),
        ("both", {}, r"both needs a, b, which have no default. Give --arg a=VALUE --arg b=VALUE\.$"),
        ("Tiny", {"grwth": 3}, r"Tiny has no argument grwth. It takes: growth, layers, classes\.$"),
        ("instance", {"growth": 3}, r"is a module already and takes no arguments. Leave --arg out"),
        ("Tiny", {"growth": "a"}, r"Tiny\(growth='a'\) raised \w+Error: .*tiny.py, line \d+\). Mend"),
        ("nothing", {}, r"nothing\(\) returned a list, not a torch.nn.Module"),
        ("both", {"a": 1, "b": 2}, r"both\(a=1, b=2\) returned None, not a torch.nn.Module"),
    ],
)
def test_arguments_that_do_not_fit(tiny: str, name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        load_target(f"{tiny}:{name}", arguments).make()


def test_keyword_arguments_of_any_name_are_passed_on(write) -> None:
    path = write("net.py", "from torch import nn\ndef net(*sizes, **rest): return nn.Linear(**rest)\n")
    made = load_target(f"{path}:net", {"in_features": 2, "out_features": 3}).make()
    assert made.out_features == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("depth=40", 40),
        ("rate=0.5", 0.5),
        ("blocks=(2, 3)", (2, 3)),
        ("blocks=6,12", (6, 12)),
        ("name=relu", "relu"),
        ("name='relu'", "relu"),
        ("flag=True", True),
        ("flag=false", False),
        ("norm=none", None),
        ("equation=a=b", "a=b"),
        ("empty=", ""),
        (" spaced = 1 ", 1),
    ],
)
def test_values_are_typed(text: str, expected: object) -> None:
    (value,) = parse_arguments([text]).values()
    assert value == expected
    assert type(value) is type(expected)


def test_several_arguments() -> None:
    assert parse_arguments(["a=1", "b=x", "a=2"]) == {"a": 2, "b": "x"}


@pytest.mark.parametrize("text", ["depth", "=3", "1x=3", "a b=3", "blocks=(2,", "blocks=[1 2]", "name='relu"])
def test_arguments_that_do_not_parse(text: str) -> None:
    with pytest.raises(CommandError, match="does not parse"):
        parse_arguments([text])
