"""Findings of several nodes: what all found once, the rest with its nodes, topic by topic."""

from convnext_cli.doctor.findings import Finding, find_worst, merge_hosts

DISK = Finding("disk", "ok", "800 GB")
FULL = Finding("disk", "problem", "full", "make room")
TORCH = Finding("software", "ok", "torch 2.11")


def test_what_all_nodes_found_alike_is_said_once():
    merged = merge_hosts([("n1", [DISK, TORCH]), ("n2", [DISK, TORCH])])

    assert merged == [DISK, TORCH]


def test_what_one_node_found_names_it_and_stands_with_its_topic():
    merged = merge_hosts([("n1", [DISK, TORCH]), ("n2", [FULL, TORCH]), ("n3", [DISK, TORCH])])

    assert [(f.topic, f.level, f.hosts) for f in merged] == [
        ("disk", "ok", ("n1", "n3")),
        ("disk", "problem", ("n2",)),
        ("software", "ok", ()),
    ]


def test_the_worst_level_counts():
    assert find_worst([]) == "ok"
    assert find_worst([TORCH, Finding("a", "warning", "b")]) == "warning"
    assert find_worst([FULL, TORCH]) == "problem"
