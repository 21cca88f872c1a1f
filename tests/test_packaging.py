"""The built wheel holds what it should, and works where nothing but its dependencies is installed."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Folder in the tree → name it is imported by.
PACKAGES = {"memopt": "memopt", "densenet_models": "densenet_models", "cli": "memopt_cli"}


def run(*command: str | Path, cwd: Path) -> str:
    # Outside of pytest's import path: only what the environment installed may be found.
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools would leave a folder `build`, and pack what lies in it."""
    source = tmp_path_factory.mktemp("source")
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # Something that must not be packed.
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").touch()
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel, which borrows its dependencies from this one."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=os.name != "nt", with_pip=False)
    scheme = sysconfig.get_preferred_scheme("prefix")
    places = {"base": str(home), "platbase": str(home)}
    interpreter = Path(sysconfig.get_path("scripts", scheme, vars=places)) / Path(sys.executable).name
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps", wheel, cwd=home)
    # A folder named in a .pth file is searched after the environment's own, and .pth files in it are not
    # read: an editable install of memopt there stays out of sight.
    borrowed = Path(sysconfig.get_path("purelib", scheme, vars=places)) / "borrowed.pth"
    borrowed.write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) + "\n")
    return interpreter


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        roots = {name.partition("/")[0] for name in archive.namelist()}
    assert {root for root in roots if not root.endswith(".dist-info")} == set(PACKAGES.values())


@pytest.mark.parametrize("folder", PACKAGES)
def test_wheel_holds_every_file_of(folder: str, wheel: Path) -> None:
    tree = {
        f"{PACKAGES[folder]}/{path.relative_to(ROOT / folder).as_posix()}"
        for path in (ROOT / folder).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith(f"{PACKAGES[folder]}/")}
    missing = sorted(tree - packed)
    assert not missing, "list the package under [tool.setuptools] packages in pyproject.toml"
    assert {name for name in packed - tree if name.endswith(".py")} == set()


@pytest.mark.parametrize("package", ["memopt", "densenet_models"])
def test_types_are_published(package: str, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert f"{package}/py.typed" in archive.namelist()


def test_installed_copy_is_the_one_that_runs(python: Path, tmp_path: Path) -> None:
    names = [*PACKAGES.values()]
    script = f"import json, {', '.join(names)}; print(json.dumps([m.__file__ for m in ({', '.join(names)})]))"
    environment = python.parents[1].resolve()
    for file in json.loads(run(python, "-c", script, cwd=tmp_path)):
        assert Path(file).resolve().is_relative_to(environment)


def test_no_module_called_cli(python: Path, tmp_path: Path) -> None:
    found = run(python, "-c", "import importlib.util as u; print(u.find_spec('cli'))", cwd=tmp_path)
    assert found.strip() == "None"


def test_command_prints_its_version(python: Path, tmp_path: Path) -> None:
    version = run(python, "-c", "import memopt; print(memopt.__version__)", cwd=tmp_path).strip()
    assert version in run(python.with_name("memopt"), "--version", cwd=tmp_path)


def test_command_optimizes_a_shipped_model(python: Path, tmp_path: Path) -> None:
    model = ("densenet_models.bc:DenseNet", "--arg", "depth=10")
    printed = run(python.with_name("memopt"), "optimize", *model, "--quiet", "--json", "-", cwd=tmp_path)
    assert json.loads(printed)


def test_command_trains_on_the_digits_it_brings(python: Path, tmp_path: Path) -> None:
    tiny = ("--depth", "10", "--growth-rate", "2", "--valid-size", "1400", "--device", "cpu")
    printed = run(python.with_name("memopt"), "train", "--epochs", "1", *tiny, cwd=tmp_path)
    assert "test error" in printed


def test_extras_are_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = {_name(line) for line in [*project["dependencies"], *chain(*extras.values())]}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {_name(line) for line in lines if "==" in line and not line.startswith("#")}
    assert wanted - pinned == {"memopt"}


def _name(requirement: str) -> str:
    """Name at the head of a requirement such as "memopt[plot]" or "torch>=2.11", normalised."""
    end = next((i for i, char in enumerate(requirement) if char in "[<>=!~ ;"), len(requirement))
    return requirement[:end].lower().replace("_", "-")
