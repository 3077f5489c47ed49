"""nanoGPT's config files, read without being executed.

A config file is a list of `name = value` lines. It is parsed, never run: a value may be a literal, arithmetic
on literals, strings joined by `+`, and settings assigned further up in the same file. Anything else is
refused with its line, so a config file from a stranger can do no more than set settings.
"""

import ast
import operator
import time
import warnings
from pathlib import Path

from train.errors import UserError
from train.settings import Value, lookup, nearest, settings_of, shown, typed

_PRESETS = Path(__file__).parent / "configs"
_MAX_BYTES = 1 << 20  # a config file is a page long; this only bounds the parser's work
_MAX_TEXT = 4096  # bounds what `out_dir = out_dir + out_dir`, repeated, can cost; `typed` does it for numbers

_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}

# nanoGPT's finetune_shakespeare.py names its run by the clock. So that all of its config files load, these
# two pieces of code are understood, to the letter (the second is evaluated here); no other import or call is.
_IMPORT = "import time"
_CLOCK = "str(time.time())"


class _Refused(Exception):
    def __init__(self, node: ast.AST, reason: str):
        super().__init__(reason)
        self.line = node.lineno


def load_config_file(path: str | Path, cls: type) -> dict[str, Value]:
    """The settings of dataclass `cls` that a config file assigns. UserError names the file and the line."""
    source = _read(path)
    lines = source.splitlines()  # of bytes: breaks where Python's own line numbers do, and nowhere else

    def refusal(line: int | None, reason: object) -> UserError:
        if not line or line > len(lines):
            return UserError(f"{path}: {reason}")
        text = lines[line - 1].strip().decode("utf-8", "replace")
        return UserError(f"{path}:{line}: {reason}" + (f", in {shown(text)}" if text else ""))

    settings, values, line = settings_of(cls), {}, None
    try:
        for statement in _parse(source).body:
            line = statement.lineno
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    values[name] = typed(lookup(settings, name), _evaluate(value, values))
                case ast.Expr(value=ast.Constant(value=str())):
                    pass  # a docstring
                case ast.Import() if ast.unparse(statement) == _IMPORT:
                    pass
                case _:
                    raise _Refused(statement, "refused: a config file may only hold `name = value` lines")
    except UserError as error:
        raise refusal(line, error) from None
    except _Refused as error:
        raise refusal(error.line, error) from None
    except SyntaxError as error:
        raise refusal(error.lineno, f"not Python: {error.msg}") from None
    except (RecursionError, MemoryError):  # the parser's two ways to say it
        raise refusal(line, "refused: nested too deeply") from None
    except ValueError as error:  # early releases of 3.11 raise it for a zero byte
        raise refusal(None, f"not Python: {error}") from None
    return values


def preset_names() -> list[str]:
    """The presets that ship with the trainer."""
    return sorted(path.stem for path in _PRESETS.glob("*.py") if path.stem != "__init__")


def preset_path(name: str) -> Path:
    """The file of a preset; UserError with the nearest name when there is none."""
    names = preset_names()
    if name in names:
        return _PRESETS / f"{name}.py"
    stem = Path(name).stem.removeprefix("train_")  # nanoGPT's config/train_gpt2.py is the preset gpt2
    hint = nearest(stem, names) or f"; the presets are {', '.join(names)}"
    raise UserError(f"{shown(name)}: neither a config file nor a preset{hint}")


def preset_summary(name: str) -> str:
    """The first line of a preset's docstring."""
    return (ast.get_docstring(_parse(_read(preset_path(name)))) or "").partition("\n")[0]


def _read(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:
            source = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a config file: {error.strerror}") from None
    if len(source) > _MAX_BYTES:
        raise UserError(f"{path}: more than {_MAX_BYTES} bytes, expected a config file")
    return source


def _parse(source: bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an odd backslash in a string is not worth a warning
        return ast.parse(source)


def _evaluate(node: ast.expr, values: dict[str, Value]) -> Value:
    match node:
        case ast.Constant(value=int() | float() | str() as value):  # bool is an int; None, bytes, complex are not
            result = value
        case ast.Name(id=name):
            if name not in values:
                raise _Refused(node, f"{name} is not assigned further up in this file")
            result = values[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            result = _apply(node, _UNARY[type(op)], _evaluate(operand, values))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            result = _apply(node, _BINARY[type(op)], _evaluate(left, values), _evaluate(right, values))
        case ast.Call() if ast.unparse(node) == _CLOCK:
            result = str(time.time())
        case _:
            raise _Refused(node, "refused: expected a literal or arithmetic on literals")
    if type(result) is str and len(result) > _MAX_TEXT:
        raise _Refused(node, f"refused: text of more than {_MAX_TEXT} characters")
    return result


def _apply(node: ast.expr, function, *operands: Value) -> Value:
    joins = function is operator.add and all(type(operand) is str for operand in operands)
    if not joins and not all(type(operand) in (int, float) for operand in operands):
        raise _Refused(node, "refused: arithmetic is for numbers, and + for two strings")
    if function is operator.pow and all(type(operand) is int for operand in operands):
        base, exponent = operands
        # Checked before the work is done: 9**9**9 would never end.
        if abs(base) > 1 and base.bit_length() * exponent > 128:
            raise _Refused(node, "refused: a whole number of more than 64 bits")
    try:
        result = function(*operands)
    except (ArithmeticError, ValueError) as error:
        raise _Refused(node, f"cannot be computed: {error.args[-1]}") from None
    if type(result) not in (int, float, str):  # a root of a negative number is complex
        raise _Refused(node, f"cannot be computed: the result is {type(result).__name__}")
    return result
