"""nanoGPT's config files, read without being executed, and the presets, which are such files.

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


class _Refused(UserError):
    def __init__(self, node: ast.AST, reason: str) -> None:
        super().__init__(reason)
        self.line = node.lineno


def preset_summary(name: str) -> str:
    """The first line of a preset's docstring."""
    return (ast.get_docstring(ast.parse(PRESETS[name].read_bytes())) or "").partition("\n")[0]


def config_path(name: str) -> Path:
    """The file of a preset, or else the config file `name`; UserError with the nearest preset where it is neither."""
    path = Path(name)
    if name in PRESETS or path.is_file():
        return PRESETS.get(name, path)
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
