"""Lengths of training as a person writes them: `300ep`, `5000st`, `30min`.

| unit | means |
|---|---|
| `ep` | epochs: passes over the training split, fractions allowed |
| `st` | optimizer steps |
| `min` | minutes of wall time |
"""

import re
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, PlainSerializer

Unit = Literal["ep", "st", "min"]

_TEXT = re.compile(r"(?P<value>[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\s*(?P<unit>ep|st|min)")

_LONGEST = 1e9
"""More epochs, steps or minutes than anyone can mean."""


@dataclass(frozen=True)
class Duration:
    """A positive length with its unit."""

    value: float
    unit: Unit

    def __str__(self) -> str:
        value = int(self.value) if float(self.value).is_integer() else self.value
        return f"{value}{self.unit}"

    def to_steps(self, *, steps_per_epoch: int) -> int | None:
        """Optimizer steps, rounded to the nearest one; None for wall time."""
        match self.unit:
            case "ep":
                return round(self.value * steps_per_epoch)
            case "st":
                return round(self.value)
            case "min":
                return None


def parse_duration(text: object) -> Duration:
    """Read `300ep`, `5000st` or `30min`.

    Raises:
        ValueError: The text has no unit, another unit, is not positive, or beyond all bounds.
    """
    if isinstance(text, Duration):
        return text
    match = _TEXT.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or float(match["value"]) == 0:
        units = ", ".join(get_args(Unit))
        raise ValueError(f"a length with its unit ({units}) is wanted, such as 300ep or 5000st")
    value = float(match["value"])
    if value > _LONGEST:
        raise ValueError(f"at most {_LONGEST:,.0f} epochs, steps or minutes are possible")
    unit = next(unit for unit in get_args(Unit) if unit == match["unit"])
    if unit == "st" and not value.is_integer():
        raise ValueError("steps are whole numbers")
    return Duration(value, unit)


AnyDuration = Annotated[Duration, BeforeValidator(parse_duration), PlainSerializer(str)]
"""Epochs, steps or wall time."""


def _parse_steps(text: object) -> Duration:
    duration = parse_duration(text)
    if duration.unit == "min":
        raise ValueError("epochs (ep) or steps (st) are wanted here, not wall time")
    return duration


StepDuration = Annotated[Duration, BeforeValidator(_parse_steps), PlainSerializer(str)]
"""Epochs or steps."""


def render_duration(seconds: float) -> str:
    """Seconds in their two largest units: `1 d 02 h`, `3 h 07 min`, `12 min 05 s` or `9 s`."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    if minutes:
        return f"{minutes} min {left:02} s"
    return f"{left} s"
