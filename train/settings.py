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

A config file is nanoGPT's, a list of `name = value` lines. It is parsed, never run: a value may be a literal,
arithmetic on literals, strings joined by `+`, and settings assigned further up in the same file. Anything else is
refused with its line, so a config file from a stranger can do no more than set settings. Presets are such files.
"""

import ast
import dataclasses
import difflib
import math
import operator
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Any

from train.errors import UserError

Value = int | float | bool | str

PRESETS = {path.stem: path for path in sorted(Path(__file__).parent.glob("configs/[!_]*.py"))}
MAX_BYTES = 1 << 20  # a config file is a page long; this only bounds the parser's work
MAX_TEXT = 4096  # bounds what `out_dir = out_dir + out_dir`, repeated, can cost; `typed` does it for numbers
OPERATORS = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


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


# The command line


@dataclass
class Parsed:
    """What a command line said."""

    settings: dict[str, Value] = field(default_factory=dict)  # only what was named; typed, not validated
    sources: list[str] = field(default_factory=list)  # presets and config files, or the command's own files, as named


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
        elif argument.startswith("-") and argument != "-":
            raise UserError(f"{shown(argument)}: settings are written --key=value, with two dashes")
        elif positional:
            if presets:
                parsed.settings |= read_settings(argument, cls)
            parsed.sources.append(argument)
        else:
            raise UserError(f"{shown(argument)}: not a setting; settings are written --key=value")
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


def help_text(cls: type, prog: str, about: str, positional: str, presets: bool) -> str:
    """The text of `--help`. positional: as the usage line shows it, "[FILE ...]". presets: list them too."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for name, setting in settings_of(cls).items():
        limits, default = setting.metadata, str(setting.default)
        if limits["group"] or not rows:
            section = rows.setdefault(limits["group"] or "settings", [])
        choices = f" ({'|'.join(limits['choices'])})" if limits["choices"] else ""
        section.append((f"--{name}={default if default.isprintable() else repr(default)}", limits["help"] + choices))
    if presets:
        rows["presets"] = [(name, preset_summary(name)) for name in PRESETS]
    width = max(len(left) for section in rows.values() for left, _ in section)
    lines = [f"usage: {prog} {positional} [--key=value ...]".replace("  ", " "), "", about]
    for heading, section in rows.items():
        lines += ["", f"{heading}:", *(f"  {left:<{width}}  {right}" for left, right in section)]
    last = "A switch may also be written --key or --no-key, and any setting --key value. The last mention wins."
    return "\n".join([*lines, "", last])


# Config files


class _Refused(UserError):
    def __init__(self, node: ast.AST, reason: str) -> None:
        super().__init__(reason)
        self.line = node.lineno


def preset_summary(name: str) -> str:
    """The first line of a preset's docstring."""
    return (ast.get_docstring(ast.parse(PRESETS[name].read_bytes())) or "").partition("\n")[0]


def read_settings(name: str, cls: type) -> dict[str, Value]:
    """The settings of a preset, or else of the config file `name`; UserError with the nearest preset for neither."""
    path = PRESETS.get(name, Path(name))
    if path.is_file():
        return load_config_file(path, cls)
    if name and path.exists():
        raise UserError(f"{shown(name)}: not a regular file, expected a config file or a preset")
    key, equals, _ = name.partition("=")
    if equals and key.isidentifier():
        raise UserError(f"{shown(name)}: settings are written with two dashes: --{name}")
    stem = path.stem.removeprefix("train_")  # nanoGPT's config/train_gpt2.py is the preset gpt2
    hint = nearest(stem, PRESETS) or f"; the presets are {', '.join(PRESETS)}"
    raise UserError(f"{shown(name)}: neither a config file nor a preset{hint}")


def load_config_file(path: str | Path, cls: type) -> dict[str, Value]:
    """The settings of dataclass `cls` that a config file assigns. UserError names the file and the line."""
    try:
        with open(path, "rb") as file:
            source = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a config file: {error.strerror}") from None
    if len(source) > MAX_BYTES:
        raise UserError(f"{path}: more than {MAX_BYTES} bytes, expected a config file")
    settings, values, line = settings_of(cls), {}, None
    try:
        with warnings.catch_warnings(action="ignore"):  # an odd backslash in a string is not worth a warning
            tree = ast.parse(source)
        for statement in tree.body:
            line = statement.lineno
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    values[name] = typed(lookup(settings, name), _evaluate(value, values))
                case ast.Expr(value=ast.Constant(value=str())):
                    pass  # a docstring
                case ast.Import() if ast.unparse(statement) == "import time":
                    pass  # see _evaluate
                case _:
                    raise _Refused(statement, "refused: a config file may only hold `name = value` lines")
        return values
    except UserError as error:
        line, reason = getattr(error, "line", line), str(error)
    except SyntaxError as error:
        line, reason = error.lineno, f"not Python: {error.msg}"
    except (RecursionError, MemoryError):  # the parser's two ways to say it
        reason = "refused: nested too deeply"
    except ValueError as error:  # early releases of 3.11 raise it for a zero byte
        reason = f"not Python: {error}"
    lines = source.splitlines()  # of bytes: breaks where Python's own line numbers do, and nowhere else
    if not line or line > len(lines):
        raise UserError(f"{path}: {reason}")
    text = lines[line - 1].strip().decode("utf-8", "replace")
    raise UserError(f"{path}:{line}: {reason}" + (f", in {shown(text)}" if text else ""))


def _evaluate(node: ast.expr, values: dict[str, Value]) -> Value:
    """The value of an expression, of which `values` are the names. Anything but arithmetic is refused."""
    match node:
        case ast.Constant(value=int() | float() | str() as result):  # bool is an int; None, bytes, complex are not
            pass
        case ast.Name(id=name):
            if name not in values:
                raise _Refused(node, f"{name} is not assigned further up in this file")
            result = values[name]
        case ast.UnaryOp() | ast.BinOp() if type(node.op) in OPERATORS:
            operands = (child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr))
            result = _apply(node, *(_evaluate(operand, values) for operand in operands))
        case ast.Call() if ast.unparse(node) == "str(time.time())":
            result = str(time.time())  # nanoGPT's finetune_shakespeare.py names its run so; no other call is read
        case _:
            raise _Refused(node, "refused: expected a literal or arithmetic on literals")
    if type(result) is str and len(result) > MAX_TEXT:
        raise _Refused(node, f"refused: text of more than {MAX_TEXT} characters")
    return result


def _apply(node: ast.UnaryOp | ast.BinOp, *operands: Value) -> Value:
    op, kinds = type(node.op), {type(operand) for operand in operands}
    if not kinds <= {int, float} and (kinds != {str} or op is not ast.Add):
        raise _Refused(node, "refused: arithmetic is for numbers, and + for two strings")
    if op is ast.Pow and kinds == {int}:
        base, exponent = operands
        if abs(base) > 1 and base.bit_length() * exponent > 128:  # before the work is done: 9**9**9 would never end
            raise _Refused(node, "refused: a whole number of more than 64 bits")
    try:
        result = OPERATORS[op](*operands)
    except (ArithmeticError, ValueError) as error:
        raise _Refused(node, f"cannot be computed: {error.args[-1]}") from None
    if type(result) not in (int, float, str):  # a root of a negative number is complex
        raise _Refused(node, f"cannot be computed: the result is {type(result).__name__}")
    return result
