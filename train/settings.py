"""What a setting is: a dataclass field with a default, a line of help and bounds.

The default's type is the setting's type (int, float, bool or str), as in nanoGPT. The command line, config
files, stored configs and `--help` are all made from these fields, so a command declares its settings once:

    @dataclass(frozen=True)
    class SampleConfig:
        num_samples: int = setting(10, "samples to draw", group="sampling", low=1)
        top_k: int = setting(200, "keep the k likeliest tokens; 0 keeps all", low=0)
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any

from train.errors import UserError

Value = int | float | bool | str


def setting(
    default: Value,
    help: str,
    *,
    group: str = "",
    choices: tuple[str, ...] = (),
    low: float | None = None,
    below: float | None = None,
    bare: str = "",
) -> Any:
    """A dataclass field; low <= value < below. `group` heads this field and those after it in `--help`. bare: what the
    setting is where the command line names it without a value."""
    metadata = {"help": help, "group": group, "choices": choices, "low": low, "below": below, "bare": bare}
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(cls: type) -> dict[str, dataclasses.Field]:
    """The settings of a dataclass by name, in their order."""
    return {field.name: field for field in dataclasses.fields(cls)}


def lookup(settings: dict[str, dataclasses.Field], name: str) -> dataclasses.Field:
    """The setting called `name`; UserError with the nearest name when there is none."""
    if name not in settings:
        raise UserError(f"unknown setting {shown(name)}{nearest(name, settings)}; --help lists them all")
    return settings[name]


def typed(field: dataclasses.Field, value: Any) -> Value:
    """`value` in the setting's type: an int becomes a float where one is due, anything else must match."""
    kind = type(field.default)
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{field.name}: got {shown(value)}, too large for a float") from None
    if type(value) is not kind:
        raise UserError(f"{field.name}: got {shown(value)} ({type(value).__name__}), expected {kind.__name__}")
    if kind is int and not -(2**63) <= value < 2**63:
        raise UserError(f"{field.name}: got {shown(value)}, expected a whole number that fits 64 bits")
    if kind is str and "\0" in value:  # every path call would fail on it later, with a ValueError
        raise UserError(f"{field.name}: got {shown(value)}, expected text without a zero byte")
    return value


def check_values(config: Any) -> None:
    """UserError unless every setting of a dataclass instance has its type, its choices and its bounds."""
    for name, field in settings_of(type(config)).items():
        value, limits = typed(field, getattr(config, name)), field.metadata
        if limits["choices"] and value not in limits["choices"]:
            hint = nearest(str(value), limits["choices"])
            raise UserError(f"{name}: got {shown(value)}, expected {' | '.join(filter(None, limits['choices']))}{hint}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}: got {value}, expected a finite number")
        low, below = limits["low"], limits["below"]
        if (low is not None and value < low) or (below is not None and value >= below):
            bounds = [f"at least {low}"] * (low is not None) + [f"below {below}"] * (below is not None)
            raise UserError(f"{name}: got {value}, expected {' and '.join(bounds)}")


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean X?)` for the closest of `names`, or nothing when none is close."""
    close = difflib.get_close_matches(name[:100], list(names), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def shown(value: Any) -> str:
    """repr for a one-line message: never long, and never the ValueError that a huge integer's repr raises."""
    try:
        text = repr(value)
    except ValueError:
        return f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 80 else text[:77] + "..."
