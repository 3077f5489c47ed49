"""Settings are the fields of a dataclass. The command line, `--help` and config files are made from them.

    @dataclass(frozen=True)
    class SampleConfig:
        num_samples: int = setting(10, "samples to draw", group="sampling", low=1)

The default's type is the setting's type: int, float, bool or str. A command line is read from left to right, as
nanoGPT's is, and the last mention wins:

    --batch_size=32  --batch-size=32  --batch_size 32     a value
    --compile  --no-compile  --compile=False              a switch
    gpt2  my_config.py                                    a preset or config file, where the command takes them

argparse cannot read this: it loses the order of options and config files, and takes the preset in
`--compile gpt2` for the switch's value. Nothing here imports torch, so that --help is quick.
"""

import ast
import dataclasses
import difflib
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field
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
    """A dataclass field; low <= value < below.

    group: heads this field and those after it in `--help`. bare: the value of `--key` alone; empty: it needs one.
    """
    metadata = {"help": help, "group": group, "choices": choices, "low": low, "below": below, "bare": bare}
    return field(default=default, metadata=metadata)


def settings_of(cls: type) -> dict[str, Field]:
    """The settings of a dataclass by name, in their order."""
    return {field.name: field for field in dataclasses.fields(cls)}


def lookup(settings: dict[str, Field], name: str) -> Field:
    """The setting called `name`; UserError with the nearest name when there is none."""
    if name not in settings:
        raise UserError(f"unknown setting {shown(name)}{nearest(name, settings)}; --help lists them all")
    return settings[name]


def typed(setting: Field, value: Any) -> Value:
    """`value` in the setting's type: an int becomes a float where one is due, anything else must match."""
    name, kind = setting.name, type(setting.default)
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{name}: got {shown(value)}, too large for a float") from None
    if type(value) is not kind:
        raise UserError(f"{name}: got {shown(value)} ({type(value).__name__}), expected {kind.__name__}")
    if kind is int and not -(2**63) <= value < 2**63:
        raise UserError(f"{name}: got {shown(value)}, expected a whole number that fits 64 bits")
    if kind is str and "\0" in value:  # every path call would fail on it later, with a ValueError
        raise UserError(f"{name}: got {shown(value)}, expected text without a zero byte")
    return value


def check_values(config: Any) -> None:
    """UserError unless every setting of a dataclass instance has its type, its choices and its bounds."""
    for name, setting in settings_of(type(config)).items():
        value, limits = typed(setting, getattr(config, name)), setting.metadata
        if limits["choices"] and value not in limits["choices"]:
            hint = nearest(value, limits["choices"])
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


@dataclass
class Parsed:
    """What a command line said."""

    settings: dict[str, Value] = field(default_factory=dict)  # only what was named; typed, not validated
    sources: list[str] = field(default_factory=list)  # presets and config files, as named
    files: list[str] = field(default_factory=list)  # arguments of a command that takes files
    help: bool = False  # --help was met: print help_text() and stop; what follows it was not read


def parse_settings(
    cls: type, argv: list[str], *, presets: Callable[[str], dict[str, Value]] | None = None, files: bool = False
) -> Parsed:
    """Read `argv` (without the program's name) as settings of dataclass `cls`.

    presets: reads the settings of the preset or config file that an argument without dashes names; they are applied
    where it stands. files: such an argument is the command's own. With neither, it is refused.
    UserError for an unknown setting, a value of another type, or a config file that is refused.
    """
    parsed, settings, rest = Parsed(), settings_of(cls), list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            parsed.help = True
            return parsed
        if argument.startswith("--"):
            name, value = _option(settings, argument, rest)
            parsed.settings[name] = value
        elif argument.startswith("-") and argument != "-":
            raise UserError(f"{shown(argument)}: settings are written --key=value, with two dashes")
        elif presets:
            parsed.settings.update(presets(argument))
            parsed.sources.append(argument)
        elif files:
            parsed.files.append(argument)
        else:
            raise UserError(f"{shown(argument)}: not a setting; settings are written --key=value")
    return parsed


def command_line(
    cls: type, argv: list[str] | None, prog: str, about: str, *, positional: str = ""
) -> tuple[Any, list[str]]:
    """The settings of a command, an instance of `cls`, checked; and its files, if `positional` says that it takes any.

    argv: None for the program's own. Prints the help and raises SystemExit for --help. UserError as in `parse_settings`
    and `check_values`.
    """
    parsed = parse_settings(cls, sys.argv[1:] if argv is None else argv, files=bool(positional))
    if parsed.help:
        print(help_text(cls, prog, about, positional=positional))
        raise SystemExit(0)
    config = cls(**parsed.settings)
    check_values(config)
    return config, parsed.files


def _option(settings: dict[str, Field], argument: str, rest: list[str]) -> tuple[str, Value]:
    """One `--key…`, taking its value off `rest` where it has to."""
    key, equals, text = argument[2:].partition("=")
    name = key.replace("-", "_")
    negated = name.removeprefix("no_")
    if negated != name and negated in settings and not equals:
        if type(settings[negated].default) is not bool:
            raise UserError(f"{argument}: {negated} is no switch, expected --{negated}=VALUE")
        return negated, False
    setting = lookup(settings, name)
    if equals:
        return name, _value(setting, text)
    if type(setting.default) is bool:
        return name, _value(setting, rest.pop(0)) if rest and rest[0].lower() in ("true", "false") else True
    if setting.metadata["bare"] and (not rest or rest[0] not in setting.metadata["choices"]):
        return name, setting.metadata["bare"]
    if not rest or rest[0].startswith("--"):
        raise UserError(f"{name}: got no value, expected --{name}={setting.default}, for example")
    return name, _value(setting, rest.pop(0))


def _value(setting: Field, text: str) -> Value:
    """The value that `text` spells: a Python literal, or for a str setting any text, in quotes or not."""
    kind = type(setting.default)
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is str and text[:1] not in ("'", '"'):
        return typed(setting, text)
    try:
        with warnings.catch_warnings(action="ignore"):
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    return typed(setting, text if kind is str and type(value) is not str else value)


def help_text(
    cls: type, prog: str, about: str, *, positional: str = "", presets: Mapping[str, str] | None = None
) -> str:
    """The text of `--help`. positional: as the usage line shows it, "[FILE ...]". presets: a line on each, by name."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for name, setting in settings_of(cls).items():
        limits, default = setting.metadata, str(setting.default)
        if limits["group"] or not rows:
            section = rows.setdefault(limits["group"] or "settings", [])
        choices = f" ({'|'.join(limits['choices'])})" if limits["choices"] else ""
        section.append((f"--{name}={default if default.isprintable() else repr(default)}", limits["help"] + choices))
    if presets:
        rows["presets"] = list(presets.items())
    width = max(len(left) for section in rows.values() for left, _ in section)
    lines = [f"usage: {prog} {positional} [--key=value ...]".replace("  ", " "), "", about]
    for heading, section in rows.items():
        lines += ["", f"{heading}:", *(f"  {left:<{width}}  {right}" for left, right in section)]
    last = "A switch may also be written --key or --no-key, and any setting --key value. The last mention wins."
    return "\n".join([*lines, "", last])
