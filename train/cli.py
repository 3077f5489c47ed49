"""A command line made from a dataclass of settings, applied in argv order as nanoGPT's is.

    --batch_size=32  --batch-size=32  --batch_size 32     a value
    --compile  --no-compile  --compile=False              a switch
    gpt2  my_config.py                                    a preset or config file, where one is taken

Written by hand rather than bent out of argparse: a config file must override what stands before it and yield
to what stands after it, and a wrong name or value gets one line that says what was expected.
"""

import ast
import os
import warnings
from dataclasses import Field, dataclass, field

from train.configfile import load_config_file, preset_names, preset_path, preset_summary
from train.errors import UserError
from train.settings import Value, lookup, settings_of, shown, typed


@dataclass
class Parsed:
    """What a command line said."""

    settings: dict[str, Value] = field(default_factory=dict)  # only what was named; typed, not validated
    sources: list[str] = field(default_factory=list)  # presets and config files, as named, in argv order
    files: list[str] = field(default_factory=list)  # positional arguments of a command that takes its own
    help: bool = False  # --help was met: print help_text() and stop; what follows it was not read


def parse_settings(cls: type, argv: list[str], *, presets: bool, files: bool = False) -> Parsed:
    """Read `argv` (without the program's name) as settings of dataclass `cls`.

    presets: a positional argument is a preset or a config file, and its settings are applied where it stands.
    files: a positional argument is the command's own, kept in Parsed.files. With neither, it is refused.
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
            path = preset_path(argument) if argument in preset_names() else _config_file(argument)
            parsed.settings.update(load_config_file(path, cls))
            parsed.sources.append(argument)
        elif files:
            parsed.files.append(argument)
        else:
            raise UserError(f"{shown(argument)}: not a setting; settings are written --key=value")
    return parsed


def help_text(cls: type, prog: str, about: str, *, positional: str = "", presets: bool = False) -> str:
    """The text of `--help`. `positional`: those arguments as the usage line shows them, "[FILE ...]"."""
    lines = [f"usage: {prog} {positional} [--key=value ...]".replace("  ", " "), "", about]
    rows = {}
    for name, setting in settings_of(cls).items():
        if setting.metadata["group"] or not rows:
            section = rows.setdefault(setting.metadata["group"] or "settings", [])
        choices = "|".join(setting.metadata["choices"])
        default = setting.default if str(setting.default).isprintable() else repr(setting.default)
        section.append((f"--{name}={default}", setting.metadata["help"] + f" ({choices})" * bool(choices)))
    if presets:
        rows["presets"] = [(name, preset_summary(name)) for name in preset_names()]
    width = max(len(left) for section in rows.values() for left, _ in section)
    for heading, section in rows.items():
        lines += ["", f"{heading}:", *(f"  {left:<{width}}  {right}" for left, right in section)]
    lines += [
        "",
        "A switch may also be written --key or --no-key, and any setting --key value. The last mention wins.",
    ]
    return "\n".join(lines)


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    return typed(setting, text if kind is str and type(value) is not str else value)


def _config_file(argument: str) -> str:
    if os.path.isfile(argument):
        return argument
    if os.path.exists(argument):
        raise UserError(f"{shown(argument)}: not a regular file, expected a config file or a preset")
    key = argument.partition("=")[0]
    if key != argument and key.isidentifier():
        raise UserError(f"{shown(argument)}: settings are written with two dashes: --{argument}")
    return str(preset_path(argument))
