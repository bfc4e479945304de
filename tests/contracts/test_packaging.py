"""The wheel holds what an installation needs: the package, its types, its recipes, its licence."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from convnext_cli import __version__
from convnext_cli.recipe.files import list_recipes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the build backend itself: no download, no second environment."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_every_recipe_and_the_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())

    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "convnext_cli").rglob("*.py")}
    assert modules <= names
    assert {f"convnext_cli/_recipes/{name}.yaml" for name in list_recipes()} <= names
    assert "convnext_cli/py.typed" in names
    assert f"convnext-{__version__}.dist-info/licenses/LICENSE" in names
    assert {name.partition("/")[0] for name in names} == {
        "convnext_cli",
        f"convnext-{__version__}.dist-info",
    }


def test_the_installed_package_finds_its_recipes_from_any_folder(wheel, tmp_path):
    installed = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(installed)
    command = [sys.executable, "-m", "convnext_cli", "recipes", "list", "--json"]

    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert [name for name in list_recipes() if f'"{name}"' not in done.stdout] == []


def test_the_script_and_the_python_versions_are_named(wheel):
    files = zipfile.ZipFile(wheel)
    folder = f"convnext-{__version__}.dist-info"

    assert "convnext = convnext_cli.__main__:main" in files.read(
        f"{folder}/entry_points.txt"
    ).decode("utf-8")
    metadata = files.read(f"{folder}/METADATA").decode("utf-8")
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
