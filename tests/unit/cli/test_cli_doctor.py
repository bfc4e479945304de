"""`convnext doctor`: a numbered list on stderr, JSON on stdout, 2 if something must be mended."""

import json
import re


def test_people_read_a_numbered_list(run_cli, tiny_shards):
    done = run_cli("doctor", "--data", str(tiny_shards), "--images", "4")

    lines = done.stderr.splitlines()
    numbers = [
        int(line[:2]) for line in lines[:-1] if re.match(r" ?\d+ (ok|warning|problem)", line)
    ]
    assert done.stdout == ""
    assert numbers == list(range(1, len(numbers) + 1))
    assert any("shards: train: 4 of " in line for line in lines)
    assert "\x1b[" not in done.stderr
    assert re.fullmatch(r"\d+ problems, \d+ warnings, \d+ in order", lines[-1])


def test_json_holds_the_same_and_damage_ends_with_2(run_cli, tmp_path):
    done = run_cli("doctor", "--data", str(tmp_path), "--json")

    report = json.loads(done.stdout)
    (shards,) = (row for row in report["findings"] if row["topic"] == "shards")
    assert (done.exit_code, done.stderr, report["worst"]) == (2, "", "problem")
    assert shards["level"] == "problem"
    assert shards["advice"]
