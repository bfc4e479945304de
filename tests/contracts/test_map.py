"""ARCHITECTURE.md is a map of the modules that there are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "convnext_cli"


def read_map() -> dict[str, str]:
    """What the table of rooms says of each module and room."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = {}
    for line in text.splitlines():
        if row := re.match(r"^\| (?P<names>[*`][^|]*) \| (?P<words>.+?) \|$", line):
            for name in re.findall(r"`([^`]+)`", row["names"]):
                rows[name] = row["words"].strip()
    return rows


def rooms() -> set[str]:
    return {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}


def test_every_module_has_a_row_in_the_map():
    """Commands are one file each, so the row of their room stands for them."""
    modules = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" and path.parent.name != "cli"
    }

    assert modules - read_map().keys() == set()


def test_every_row_of_the_map_names_a_module_or_a_room_that_is_there():
    gone = {name for name in read_map() if not (PACKAGE / name).exists()}

    assert gone == set()
    assert rooms() <= read_map().keys()


def test_rooms_are_two_levels_deep_and_their_init_holds_a_docstring_only():
    deep = [path for path in PACKAGE.rglob("*.py") if len(path.relative_to(PACKAGE).parts) > 2]
    assert deep == []

    for path in PACKAGE.glob("*/__init__.py"):
        if path.parent.name != "cli":  # it mounts the commands
            assert re.fullmatch(r'"""[^"]+"""\n', path.read_text()), path


def test_folder_of_each_unit_test_is_a_room():
    folders = {f"{path.name}/" for path in (ROOT / "tests" / "unit").iterdir() if path.is_dir()}

    assert folders - {"__pycache__/"} <= rooms()
