"""Ranks held against each other."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from convnext_cli.errors import UserError
from convnext_cli.runs.layout import RunDir
from convnext_cli.training.agreement import RankTime
from convnext_cli.training.ranks import RankStart, check_same_start, checksum, find_straggler

STEPS = 50


@pytest.mark.parametrize(
    ("odd", "sentence", "hint"),
    [
        ({"step": 0, "unlocked": True}, "rank 0 on a has locked runs/x, which is", "--runs-dir"),
        ({"step": 0}, "go on from step 0, and rank 0 on a from step 8: they", "again"),
        ({"step": 4}, "go on from step 4, and rank 0 on a from step 8: they", "again"),
        ({"fingerprint": "cd"}, "has another data set than rank 0 on a: cd, not ab", "--data"),
        ({"recipe": {"optim.lr": 0.2}}, "has optim.lr=0.2, and rank 0 on a has 0.1", "command"),
    ],
)
def test_ranks_that_would_not_train_one_model_together_are_refused(odd, sentence, hint):
    first = RankStart("a", 8, "ab", {"optim.lr": 0.1})
    starts = [first, replace(first, host="b"), replace(first, host="b", **odd)]

    check_same_start(starts[:2], run=RunDir(Path("runs/x")))
    with pytest.raises(UserError, match=f"^rank 2 on b .*{sentence}") as caught:
        check_same_start(starts, run=RunDir(Path("runs/x")))
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([(0.0, 0.1), (0.0, 0.1), (0.0, 0.16)], 2),
        ([(0.2, 0.1), (0.0, 0.1), (0.0, 0.1)], 0),
        ([(0.0, 0.1), (0.0, 0.16)], 1),
        ([(0.0, 0.1), (0.0, 0.1), (0.0, 0.14)], None),  # not half as much again
        ([(0.0, 0.001), (0.0, 0.001), (0.0, 0.004)], None),  # milliseconds
    ],
)
def test_the_rank_that_takes_half_as_long_again_is_found(times, expected):
    steps = [tuple(RankTime(*own) for own in times)] * STEPS

    found = find_straggler(steps)

    assert (None if found is None else found[0]) == expected


def test_one_slow_step_makes_no_straggler():
    even, slow = (RankTime(0.0, 0.1),) * 2, (RankTime(0.0, 0.1), RankTime(0.0, 9.0))

    assert find_straggler([*[even] * STEPS, slow]) is None


def test_the_times_of_the_others_are_their_median():
    steps = [(RankTime(0.5, 0.1), RankTime(0.01, 0.1), RankTime(0.03, 0.1))] * STEPS

    assert find_straggler(steps) == (0, RankTime(0.5, 0.1), RankTime(0.02, 0.1))


@pytest.mark.parametrize("place", [0, 7, 19])
def test_any_bit_of_any_weight_changes_the_checksum(place):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before = checksum(network)
    weights = [weight.data.view(torch.int32).view(-1) for weight in network.parameters()]
    weight, at = [(w, i) for w in weights for i in range(len(w))][place]
    weight[at] ^= 1 << (place % 31)

    assert not torch.equal(checksum(network), before)


def test_two_weights_that_change_places_change_the_checksum():
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    before = checksum(network)
    network[0].weight.data, network[1].weight.data = (
        network[1].weight.data,
        network[0].weight.data,
    )

    assert not torch.equal(checksum(network), before)
