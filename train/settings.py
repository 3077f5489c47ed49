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

A config file is nanoGPT's, a list of `name = value` lines. It is parsed, never run. A value is an expression, read by
`expressions.py`, of numbers and text, of names assigned further up, and of settings: as the command line gave them
further left, or their defaults (not `auto`, which is no value yet). A name that is no setting helps later lines; one
that no line reads is noted and left out. Anything else is refused with its line. So a stranger's config file can only
set settings. Presets are such files.
"""

import ast
import dataclasses
import difflib
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Any

from train.errors import UserError, first_line, one_line, shown
from train.expressions import evaluate
from train.files import read_regular

Value = int | float | bool | str

PRESETS = {path.stem: path for path in sorted(Path(__file__).parent.glob("configs/[!_]*.py"))}
MAX_BYTES = 1 << 16  # a config file is a page long; this only bounds the work of reading it
MISSPELLED = 0.85  # a name that nothing reads, and that is so similar to a setting, counts as a misspelling
# nanoGPT's own line means the best dtype of the GPU, as `auto` does. Without a GPU nanoGPT ignores it.
BEST_DTYPE = re.compile(r"'b?float16' if .*torch\..* else 'b?float16'")


def setting(
    default: Value,
    help: str,
    *,
    group: str = "",
    choices: tuple[str, ...] = (),
    low: float = -(2**63),
    below: float = 2**63,
    bare: str = "",
    path: bool = False,
) -> Any:
    """A dataclass field; low <= value < below.

    group: heads this field and those after it in `--help`. bare: the value of `--key` alone; empty: it needs one. path:
    it names a file or a folder; a `~` in front is the home folder, which a shell does not see in `--key=~/x`.
    """
    metadata = {"help": help, "group": group, "choices": choices, "low": low, "below": below, "bare": bare}
    return field(default=default, metadata=metadata | {"path": path})


def settings_of(cls: type) -> dict[str, Field]:
    """The settings of a dataclass by name, in their order."""
    return {field.name: field for field in dataclasses.fields(cls)}


def typed(setting: Field, value: Any) -> Value:
    """`value` in the setting's type: ints become floats and whole floats ints; anything else must match."""
    kind = type(setting.default)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if kind is float and type(value) is int:
        value = float(value) if value.bit_length() < 1024 else math.inf
    if type(value) is not kind:
        raise UserError(f"{setting.name}: got {shown(value)} ({type(value).__name__}), expected {kind.__name__}")
    return os.path.expanduser(value) if setting.metadata["path"] else value


def check_values(config: Any) -> None:
    """UserError unless every setting of a dataclass instance has its type, its choices and its bounds."""
    for name, setting in settings_of(type(config)).items():
        value, limits = typed(setting, getattr(config, name)), setting.metadata
        choices, low, below = limits["choices"], limits["low"], limits["below"]
        if choices and value not in choices:
            expected = " | ".join(filter(None, choices)) + nearest(value, choices)
            raise UserError(f"{name}: got {shown(value)}, expected {expected}")
        if not isinstance(value, str) and not low <= value < below:  # nor is nan
            expected = f"at least {low}" if value < low else f"below {below}"
            raise UserError(f"{name}: got {shown(value)}, expected {expected}")


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """` (did you mean X?)` for the closest of `names`, or nothing when none is close."""
    close = difflib.get_close_matches(name[:100], list(names), n=1, cutoff=cutoff)
    return f" (did you mean {close[0]}?)" if close else ""


# The command line


@dataclass
class Parsed:
    """What a command line said."""

    settings: dict[str, Value] = field(default_factory=dict)  # only what was named; typed, not validated
    sources: list[str] = field(default_factory=list)  # presets and config files, or the command's own files, as named
    notes: list[str] = field(default_factory=list)  # lines for the user: what config files hold that sets nothing


def parse_settings(
    cls: type, argv: list[str], prog: str, about: str, *, positional: str = "", presets: bool = False
) -> Parsed:
    """Read `argv` (without the program's name) as settings of dataclass `cls`.

    positional: what arguments without dashes are, as the help shows it; without it they are refused. presets: they are
    presets or config files, whose settings are applied where they stand. Prints the help and raises SystemExit for
    --help. UserError for an unknown setting, a value of another type, or a config file that is refused.
    """
    parsed, settings, rest = Parsed(), settings_of(cls), list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            print(help_text(cls, prog, about, positional, presets))
            raise SystemExit(0)
        if argument.startswith("--"):
            name, value = _option(settings, argument, rest)
            parsed.settings[name] = value
        elif positional and not argument.startswith("-"):
            if presets:
                read_config_file(argument, settings, parsed)
            parsed.sources.append(argument)
        else:
            raise UserError(f"{shown(argument)}: not a setting; settings are written --key=value, with two dashes")
    return parsed


def command_line(
    cls: type, argv: list[str] | None, prog: str, about: str, *, positional: str = ""
) -> tuple[Any, list[str]]:
    """The settings of a command, an instance of `cls`, checked; and its files, if `positional` says that it takes any.

    argv: None for the program's own. Raises as `parse_settings` and `check_values` do.
    """
    parsed = parse_settings(cls, sys.argv[1:] if argv is None else argv, prog, about, positional=positional)
    config = cls(**parsed.settings)
    check_values(config)
    return config, parsed.sources


def _option(settings: dict[str, Field], argument: str, rest: list[str]) -> tuple[str, Value]:
    """One `--key…`. Takes its value from `rest` if it needs one."""
    key, equals, text = argument[2:].partition("=")
    name = key.replace("-", "_")
    switch = name.removeprefix("no_")
    if switch != name and switch in settings and type(settings[switch].default) is bool and not equals:
        return switch, False
    if name not in settings:
        raise UserError(f"unknown setting {shown(name)}{nearest(name, settings)}; --help lists them all")
    setting = settings[name]
    bare, values = setting.metadata["bare"], setting.metadata["choices"]
    if type(setting.default) is bool:
        bare, values = True, ("true", "false")
    if not equals:
        if bare and not (rest and rest[0].lower() in values):
            return name, bare
        if not rest or rest[0].startswith("--"):
            raise UserError(f"{name}: got no value, expected --{name}={setting.default}, for example")
        text = rest.pop(0)
    return name, _value(setting, text)


def _value(setting: Field, text: str) -> Value:
    """The value that `text` spells: a Python literal, or for a str setting any text, in quotes or not."""
    kind = type(setting.default)
    try:
        with warnings.catch_warnings(action="ignore"):  # of an odd backslash, for example
            value = ast.literal_eval(text.capitalize() if kind is bool else text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    return typed(setting, text if kind is str and type(value) is not str else value)


def help_text(cls: type, prog: str, about: str, positional: str, presets: bool) -> str:
    """The text of `--help`. positional: as the usage line shows it, "[FILE ...]". presets: list them too."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for name, setting in settings_of(cls).items():
        limits, default = setting.metadata, str(setting.default)
        if limits["group"] or not rows:
            section = rows.setdefault(limits["group"] or "settings", [])
        choices = f" ({'|'.join(limits['choices'])})" if limits["choices"] else ""
        section.append((f"--{name}={default if default.isprintable() else repr(default)}", limits["help"] + choices))
    for name, path in PRESETS.items() if presets else ():  # with the first line of its docstring
        about_it = ast.get_docstring(ast.parse(path.read_bytes())).partition("\n")[0]
        rows.setdefault("presets", []).append((name, about_it))
    width = max(len(left) for section in rows.values() for left, _ in section)
    lines = [f"usage: {prog} {positional} [--key=value ...]".replace("  ", " "), "", about]
    for heading, section in rows.items():
        lines += ["", f"{heading}:", *(f"  {left:<{width}}  {right}" for left, right in section)]
    last = "A switch may also be written --key or --no-key, and any setting --key value. The last mention wins."
    return "\n".join([*lines, "", last])


# Config files


def read_config_file(name: str, known: Mapping[str, Field], parsed: Parsed) -> None:
    """Put the settings of the preset or config file `name` over those of `parsed`, which it may read. Note what sets
    nothing. UserError, with the line, for a file that is refused, and with the nearest preset for neither."""
    path = PRESETS.get(name, Path(name))
    if not os.path.lexists(path):
        stem = path.stem.removeprefix("train_")  # nanoGPT's config/train_gpt2.py is the preset gpt2
        hint = nearest(stem, PRESETS) or f"; the presets are {', '.join(PRESETS)}"
        raise UserError(f"{shown(name)}: neither a config file nor a preset{hint}; settings are written --key=value")
    try:
        source = read_regular(path, MAX_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a config file: {error.strerror}") from None
    # without `auto`: `compile = device == "cuda"` would be False on a GPU
    defaults = {key: setting.default for key, setting in known.items() if setting.default != "auto"}
    values: dict[str, Any] = defaults | parsed.settings
    line, others = 0, []
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
        read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        for statement in tree.body:
            line = statement.lineno
            above = dict(values)  # `a, b = b, a` reads both before it assigns one
            for key, expression in _assigned(statement, known):
                if key in known:
                    best = key == "dtype" and BEST_DTYPE.fullmatch(ast.unparse(expression))
                    value = typed(known[key], "auto" if best else evaluate(expression, above))
                    parsed.settings[key] = values[key] = value
                    continue
                try:
                    values[key] = evaluate(expression, above)
                except UserError:  # a fork's own may have any value; only lines that read it are refused
                    values.pop(key, None)
                if key not in {*read, *others}:
                    others.append(key)
                    if hint := nearest(key, known, MISSPELLED):
                        raise UserError(f"unknown setting {shown(key)}{hint}")
    except UserError as error:
        raise UserError(f"{path}:{line}: {error}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # all of them Python's parser raises
        line = getattr(error, "lineno", None) or line
        raise UserError(f"{path}:{line}: not Python: {getattr(error, 'msg', first_line(error))}") from None
    if others:
        parsed.notes.append(one_line(f"{path}: names that are no settings here, left out: {', '.join(others)}"))


def _assigned(statement: ast.stmt, known: Mapping[str, Field]) -> list[tuple[str, ast.expr]]:
    """The names that a statement assigns, with their expression. UserError if it does anything else."""
    match statement:
        case ast.Assign(targets=targets, value=value) if all(isinstance(target, ast.Name) for target in targets):
            return [(target.id, value) for target in targets]
        case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)) if all(
            isinstance(target, ast.Name) for target in targets
        ) and len(targets) == len(values):
            return [(target.id, value) for target, value in zip(targets, values, strict=True)]
        case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=value):
            return [(name, ast.BinOp(target, op, value))]
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            return [(name, value)]
        case ast.Expr(value=ast.Constant(value=str())):
            return []  # a docstring
        case ast.Import(names=names) | ast.ImportFrom(names=names) if not (
            {alias.asname or alias.name for alias in names} & {"*", *known}
        ):
            return []  # nothing is imported; a call of what is not known is refused
    raise UserError("refused: a config file may only hold `name = value` lines")
