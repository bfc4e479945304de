"""The laws of direction, as import-linter reads them from pyproject.toml."""

import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_import_points_downwards_and_the_light_zone_stays_light():
    command = [Path(sysconfig.get_path("scripts")) / "lint-imports", "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "downwards only KEPT" in done.stdout
    assert "the light zone imports nothing heavy KEPT" in done.stdout
