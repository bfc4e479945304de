"""Lengths with units: what is read, what is refused, and that they are written as they are read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convnext_cli.recipe.durations import Duration, parse_duration


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("300ep", Duration(300, "ep")),
        ("5000st", Duration(5000, "st")),
        ("30min", Duration(30, "min")),
        ("0.5ep", Duration(0.5, "ep")),
        ("1e5st", Duration(100_000, "st")),
        (" 20 ep ", Duration(20, "ep")),
        (Duration(20, "ep"), Duration(20, "ep")),
    ],
)
def test_a_number_with_a_unit_is_a_duration(text, duration):
    assert parse_duration(text) == duration


@pytest.mark.parametrize(
    "text",
    ["300", 300, "ep", "300 epochs", "-1ep", "0st", "0.0ep", "1.5st", "", None, True, "1h", "2e9ep",
     "1e400st", "nanep"],
)  # fmt: skip
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match=r"ep|whole|possible"):
        parse_duration(text)


def test_epochs_become_steps_by_the_steps_of_an_epoch():
    assert Duration(300, "ep").to_steps(steps_per_epoch=312) == 93_600
    assert Duration(0.5, "ep").to_steps(steps_per_epoch=312) == 156
    assert Duration(5000, "st").to_steps(steps_per_epoch=312) == 5000


def test_wall_time_has_no_steps():
    assert Duration(30, "min").to_steps(steps_per_epoch=312) is None


@pytest.mark.parametrize("text", ["300ep", "5000st", "30min", "0.5ep", "1000000st", "999999999st"])
def test_a_duration_is_written_as_it_was_read(text):
    assert str(parse_duration(text)) == text


@given(st.floats(min_value=1e-9, max_value=1e9), st.sampled_from(["ep", "min"]))
def test_every_duration_is_read_back_as_it_was(value, unit):
    duration = Duration(value, unit)

    assert parse_duration(str(duration)) == duration
