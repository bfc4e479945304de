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


def test_ranks_that_do_not_reach_each_other_are_a_finding_beside_the_others(run_cli, monkeypatch):
    def refuse(*, local_rank):
        raise RuntimeError("Timed out waiting for clients.\nmore")

    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    for name, value in (told | {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("convnext_cli.doctor.traffic.join_ranks", refuse)

    done = run_cli("doctor", "--json")

    report = json.loads(done.stdout)
    assert done.exit_code == 2
    (network,) = (row for row in report["findings"] if row["topic"] == "all-reduce")
    assert network["found"] == "the ranks do not reach each other: Timed out waiting for clients."
    assert "node1:29500" in network["advice"]
    assert "software" in {row["topic"] for row in report["findings"]}
