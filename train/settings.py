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

A config file is nanoGPT's, a list of `name = value` lines. It is parsed, never run. A value is an expression that
`expressions.py` reads: of numbers and text, of names assigned further up, and of settings, which have the values that
the command line gave them further left, or their defaults. A name that is no setting helps later lines; what only a
fork of nanoGPT knows is noted and left out. Anything else is refused with its line, so a config file from a stranger
can do no more than set settings. Presets are such files.
"""

import ast
import dataclasses
import difflib
import math
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Any

from train.errors import UserError, one_line, printable, shown
from train.expressions import MODULES, Refused, evaluate
from train.files import read_regular

Value = int | float | bool | str

PRESETS = {path.stem: path for path in sorted(Path(__file__).parent.glob("configs/[!_]*.py"))}
MAX_BYTES = 1 << 20  # a config file is a page long; this only bounds the parser's work
MISSPELLED = 0.85  # a name that nothing reads, and that is so similar to a setting, counts as a misspelling


def setting(
    default: Value,
    help: str,
    *,
    group: str = "",
    choices: tuple[str, ...] = (),
    low: float | None = None,
    below: float | None = None,
    bare: str = "",
    path: bool = False,
) -> Any:
    """A dataclass field; low <= value < below.

    group: heads this field and those after it in `--help`. bare: the value of `--key` alone; empty: it needs one. path:
    it names a file or a folder; a `~` in front is the home folder, which a shell does not see in `--key=~/x`.
    """
    metadata = {"help": help, "group": group, "choices": choices, "low": low, "below": below, "bare": bare}
    metadata["path"] = path
    return field(default=default, metadata=metadata)


def settings_of(cls: type) -> dict[str, Field]:
    """The settings of a dataclass by name, in their order."""
    return {field.name: field for field in dataclasses.fields(cls)}


def typed(setting: Field, value: Any) -> Value:
    """`value` in the setting's type: ints become floats and whole floats ints; anything else must match."""
    name, kind = setting.name, type(setting.default)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
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
    return os.path.expanduser(value) if setting.metadata["path"] else value


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
        elif argument.startswith("-") and argument != "-":
            raise UserError(f"{shown(argument)}: settings are written --key=value, with two dashes")
        elif positional:
            if presets:
                parsed.settings |= read_settings(argument, cls, parsed.settings, parsed.notes)
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
    """One `--key…`. Takes its value from `rest` if it needs one."""
    key, equals, text = argument[2:].partition("=")
    name = key.replace("-", "_")
    negated = name.removeprefix("no_")
    if negated != name and negated in settings and not equals:
        if type(settings[negated].default) is not bool:
            raise UserError(f"{argument}: {negated} is no switch, expected --{negated}=VALUE")
        return negated, False
    if name not in settings:
        raise UserError(f"unknown setting {shown(name)}{nearest(name, settings)}; --help lists them all")
    setting = settings[name]
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


def preset_summary(name: str) -> str:
    """The first line of a preset's docstring."""
    return (ast.get_docstring(ast.parse(PRESETS[name].read_bytes())) or "").partition("\n")[0]


def read_settings(
    name: str, cls: type, above: Mapping[str, Value] | None = None, notes: list[str] | None = None
) -> dict[str, Value]:
    """The settings of the preset or config file `name`. UserError, with the nearest preset, if it is neither.

    above: settings named before, which the file may read. notes: takes a line about names that set nothing.
    """
    path = PRESETS.get(name, Path(name))
    if os.path.isfile(path):
        return load_config_file(path, cls, above, notes)
    if name and os.path.lexists(path):
        raise UserError(f"{shown(name)}: not a regular file, expected a config file or a preset")
    key, equals, _ = name.partition("=")
    if equals and key.isidentifier():
        raise UserError(f"{shown(name)}: settings are written with two dashes: --{name}")
    stem = path.stem.removeprefix("train_")  # nanoGPT's config/train_gpt2.py is the preset gpt2
    hint = nearest(stem, PRESETS) or f"; the presets are {', '.join(PRESETS)}"
    raise UserError(f"{shown(name)}: neither a config file nor a preset{hint}")


def load_config_file(
    path: str | Path, cls: type, above: Mapping[str, Value] | None = None, notes: list[str] | None = None
) -> dict[str, Value]:
    """The settings of dataclass `cls` that a config file assigns. UserError names the file and the line.

    above, notes: as for `read_settings`.
    """
    try:
        source = read_regular(Path(path), MAX_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a config file: {error.strerror}") from None
    found, line = _ConfigFile(cls, above or {}), None
    try:
        with warnings.catch_warnings(action="ignore"):  # an odd backslash in a string is not worth a warning
            tree = ast.parse(source)
        for statement in tree.body:
            line = statement.lineno
            found.read(statement)
        line = None
        if note := found.ended():
            (notes if notes is not None else []).append(one_line(f"{path}: {note}"))
        return found.settings
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


class _ConfigFile:
    """A config file, read statement by statement.

    settings: what the file assigned. A name that is no setting may have any value, even one that is not understood.
    Then only lines that read this name are refused.
    """

    def __init__(self, cls: type, above: Mapping[str, Value]) -> None:
        self.settings: dict[str, Value] = {}
        self._known = settings_of(cls)
        # the value of each name; for a name that is no setting perhaps the error that says why it has none
        self._values: dict[str, Any] = {name: setting.default for name, setting in self._known.items()} | dict(above)
        self._modules = {name: name for name in MODULES}  # nanoGPT's train.py has imported most of them
        self._helpers: dict[str, ast.expr] = {}  # names that are no settings: where they are first assigned
        self._used: set[str] = set()
        self._of_torch: set[str] = set()  # names whose value torch's view of the machine decides

    def read(self, statement: ast.stmt) -> None:
        """Take in the next statement. UserError if it does anything but give names a value."""
        match statement:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._assign(target, value)
            case ast.AnnAssign(target=target, annotation=ast.Name(), value=ast.expr() as value):
                self._assign(target, value)
            case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=value):
                operand = ast.copy_location(ast.Name(name, ast.Load()), target)
                self._assign(target, ast.copy_location(ast.BinOp(operand, op, value), statement))
            case ast.Expr(value=ast.Constant(value=str())):
                pass  # a docstring
            case ast.Import(names=names):  # nothing is imported; a call of what is not known is refused
                for alias in names:
                    top = alias.name.partition(".")[0]
                    self._modules[alias.asname or top] = alias.name if alias.asname else top
            case ast.ImportFrom(module=str() as module, names=names, level=0):
                self._modules |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in names}
            case _:
                raise Refused(statement, "refused: a config file may only hold `name = value` lines")

    def ended(self) -> str:
        """A note about names that set nothing, may be empty. UserError for one that looks like a misspelled setting."""
        unused = [name for name in self._helpers if name not in self._used]
        for name in unused:
            if hint := nearest(name, self._known, MISSPELLED):
                raise Refused(self._helpers[name], f"unknown setting {shown(name)}{hint}")
        said = {"left out": unused, "only read by later lines": [name for name in self._helpers if name in self._used]}
        parts = [f"{what}: {', '.join(map(printable, names))}" for what, names in said.items() if names]
        return f"names that are no settings here, {'; '.join(parts)}" if parts else ""

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            values = [self._evaluate(item) for item in value.elts]  # first all of them: `a, b = b, a`
            for item, result in zip(target.elts, values, strict=True):
                self._give(item, result)
            return
        name = target.id if isinstance(target, ast.Name) else ""
        if self._asks_torch(value):
            self._of_torch.add(name)
        if name == "dtype" and self._is_best_dtype(value):
            self._give(target, "auto")
            return
        try:
            self._give(target, self._evaluate(value))
        except UserError as error:
            if not name or name in self._known:
                raise
            self._give(target, error)  # only lines that read this name are refused

    def _give(self, target: ast.expr, value: Any) -> None:
        if not isinstance(target, ast.Name):
            raise Refused(target, "refused: a config file may only hold `name = value` lines")
        if target.id in self._known:
            value = self.settings[target.id] = typed(self._known[target.id], value)
        else:
            self._helpers.setdefault(target.id, target)
        self._values[target.id] = value

    def _evaluate(self, node: ast.expr) -> Any:
        return evaluate(node, self._named, self._modules)

    def _named(self, node: ast.Name) -> Any:
        """The value of a name."""
        name = node.id
        if name not in self._values:
            hint = nearest(name, self._values)
            raise Refused(node, f"{printable(name)} is not assigned further up in this file{hint}")
        value = self._values[name]
        if isinstance(value, UserError):
            raise Refused(node, f"{printable(name)}, assigned in line {self._helpers[name].lineno}: {value}")
        self._used.add(name)
        return value

    def _asks_torch(self, node: ast.expr) -> bool:
        """Whether an expression asks torch for the machine, itself or by a name assigned further up."""
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        return any(self._modules.get(name, "").startswith("torch") or name in self._of_torch for name in names)

    def _is_best_dtype(self, node: ast.expr) -> bool:
        """Whether this is nanoGPT's own line, `'bfloat16' if torch.cuda... else 'float16'`. It means the best dtype of
        the GPU, as `auto` does. Without a GPU nanoGPT ignores it; `auto` is then the best that the CPU has."""
        match node:
            case ast.IfExp(body=ast.Constant(value=one), orelse=ast.Constant(value=other), test=test):
                return {one, other} == {"bfloat16", "float16"} and self._asks_torch(test)
        return False
