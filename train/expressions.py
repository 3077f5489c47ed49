"""The value of a Python expression in a config file, computed without running Python.

The expression is walked as a syntax tree. It may hold numbers, text, names with a value, arithmetic, comparisons,
`a if b else c`, f-strings, lists, tuples, dicts and subscripts, and calls of the functions in FUNCTIONS and METHODS.
Everything else is refused. The work and the size of each result are bounded.
"""

import ast
import datetime
import math
import operator
import os.path
import re
import string
import time
from collections.abc import Callable, Mapping
from typing import Any

from train.errors import UserError

MAX_TEXT = 4096  # characters; bounds what `out_dir = out_dir + out_dir`, repeated, can cost
MAX_BITS = 128  # of a whole number, for the same reason
OPERATORS: dict[type[ast.AST], Callable] = {
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
COMPARISONS: dict[type[ast.AST], Callable] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda item, items: item in items,
    ast.NotIn: lambda item, items: item not in items,
}
SCALARS = (int, float, str, type(None))  # bool is an int
MODULES = {"os", "math", "time", "datetime", "torch"}  # whose functions a config file may call


def _torch(path: str) -> Callable[[], Any]:
    """A function of torch without arguments. torch is imported when it is called: that takes seconds."""

    def call() -> Any:
        import torch

        return operator.attrgetter(path)(torch)()

    return call


FUNCTIONS: dict[str, Callable] = {
    **{f.__name__: f for f in (str, int, float, bool, abs, min, max, len)},
    "round": lambda x, digits=None: round(x, digits if digits is None else max(-20, min(20, digits))),
    "time.time": time.time,
    "time.localtime": time.localtime,
    "time.strftime": time.strftime,
    "datetime.datetime.now": lambda: datetime.datetime.now(),
    "datetime.date.today": datetime.date.today,
    "os.path.join": os.path.join,
    "os.path.basename": os.path.basename,
    "os.path.dirname": os.path.dirname,
    "os.path.expanduser": os.path.expanduser,
    "os.cpu_count": os.cpu_count,
    **{f"math.{f.__name__}": f for f in (math.sqrt, math.log, math.log2, math.exp, math.ceil, math.floor)},
    **{
        f"torch.{path}": _torch(path)
        for path in (
            "cuda.is_available",
            "cuda.is_bf16_supported",
            "cuda.device_count",
            "backends.mps.is_available",
        )
    },
}
METHODS: dict[type, tuple[str, ...]] = {
    str: ("format", "lower", "upper", "strip", "replace", "startswith", "endswith"),
    datetime.datetime: ("strftime", "isoformat", "timestamp"),
    datetime.date: ("strftime", "isoformat"),
    dict: ("get",),
}


class Refused(UserError):
    """A part of a config file that is not read. line: where it stands."""

    def __init__(self, node: ast.AST, reason: str) -> None:
        super().__init__(reason)
        self.line = node.lineno


def evaluate(node: ast.expr, named: Callable[[ast.Name], Any], modules: Mapping[str, str]) -> Any:
    """The value of an expression. named: the value of a name. modules: imported name -> the module or function that it
    stands for, as "datetime.datetime". Raises Refused, and what `named` raises.
    """

    def value(node: ast.expr) -> Any:
        return evaluate(node, named, modules)

    match node:
        case ast.Constant(value=result) if isinstance(result, SCALARS):
            pass
        case ast.Name():
            result = named(node)
        case ast.UnaryOp(op=ast.Not()):
            result = not value(node.operand)
        case ast.UnaryOp() if type(node.op) in OPERATORS:
            result = _computed(node, value(node.operand))
        case ast.BinOp() if type(node.op) in OPERATORS:
            result = _computed(node, value(node.left), value(node.right))
        case ast.BoolOp(op=op, values=parts):
            for part in parts:
                if bool(result := value(part)) is isinstance(op, ast.Or):
                    break
        case ast.Compare():
            result = _compared(node, value)
        case ast.IfExp():
            result = value(node.body if value(node.test) else node.orelse)
        case ast.JoinedStr(values=parts):
            result = ""
            for part in parts:
                result = (result + _formatted(part, value))[: MAX_TEXT + 1]  # of more, no more than is refused below
        case ast.Tuple() | ast.List():
            result = [_scalar(item, value(item)) for item in node.elts]
            result = tuple(result) if isinstance(node, ast.Tuple) else result
        case ast.Dict():
            result = {
                _scalar(node, key and value(key)): _scalar(item, value(item))
                for key, item in zip(node.keys, node.values, strict=True)
            }
        case ast.Subscript():
            result = _tried(node, operator.getitem, value(node.value), value(node.slice))
        case ast.Call():
            function, arguments = _function(node, value, modules), [value(argument) for argument in node.args]
            if any(keyword.arg is None for keyword in node.keywords):
                raise Refused(node, "refused: ** in a call")
            result = _tried(node, function, *arguments, **{word.arg: value(word.value) for word in node.keywords})
        case _:
            raise Refused(node, "refused: expected values, arithmetic, or calls such as str(), int(), time.time()")
    if isinstance(result, str) and len(result) > MAX_TEXT:
        raise Refused(node, f"refused: text of more than {MAX_TEXT} characters")
    if isinstance(result, int) and result.bit_length() > MAX_BITS:
        raise Refused(node, "refused: a whole number of more than 64 bits")
    return result


def _tried(node: ast.AST, function: Callable, *operands: Any, **options: Any) -> Any:
    """function(*operands). What a function with bounded arguments raises is refused."""
    try:
        return function(*operands, **options)
    except (ArithmeticError, ValueError, TypeError, LookupError, RuntimeError, AssertionError, ImportError) as error:
        reason = error.args[-1] if error.args else type(error).__name__
        raise Refused(node, f"cannot be computed: {reason}") from None


def _computed(node: ast.UnaryOp | ast.BinOp, *operands: Any) -> Any:
    """Arithmetic on numbers. Text may be joined with +, repeated with *, and filled in with %."""
    op, kinds = type(node.op), tuple(type(operand) for operand in operands)
    texts = op is ast.Add and kinds == (str, str)
    if op is ast.Mult and set(kinds) == {str, int}:
        texts = math.prod(len(x) if isinstance(x, str) else max(x, 0) for x in operands) <= MAX_TEXT
        if not texts:
            raise Refused(node, f"refused: text of more than {MAX_TEXT} characters")
    if op is ast.Mod and kinds[0] is str and kinds[1] is not dict:
        texts = True
        _check_width(node, operands[0], r"%[^a-zA-Z%]*(\d{4}|\*)")
    if not texts and not set(kinds) <= {int, float}:
        raise Refused(node, "refused: arithmetic is for numbers, and + for two strings")
    if op is ast.Pow and kinds == (int, int):
        base, exponent = operands
        if abs(base) > 1 and base.bit_length() * exponent > MAX_BITS:  # before the work is done: 9**9**9 has no end
            raise Refused(node, "refused: a whole number of more than 64 bits")
    result = _tried(node, OPERATORS[op], *operands)
    if not isinstance(result, int | float | str):  # a root of a negative number is complex
        raise Refused(node, f"cannot be computed: the result is {type(result).__name__}")
    return result


def _compared(node: ast.Compare, value: Callable[[ast.expr], Any]) -> bool:
    left = value(node.left)
    for op, comparator in zip(node.ops, node.comparators, strict=True):
        right = value(comparator)
        if not _tried(node, COMPARISONS[type(op)], left, right):
            return False
        left = right
    return True


def _formatted(node: ast.expr, value: Callable[[ast.expr], Any]) -> str:
    """A part of an f-string."""
    if isinstance(node, ast.Constant):
        return node.value
    assert isinstance(node, ast.FormattedValue)
    spec = value(node.format_spec) if node.format_spec else ""
    _check_width(node, spec, r"\d{4}")
    shown = {-1: lambda x: x, ord("s"): str, ord("r"): repr, ord("a"): ascii}[node.conversion](value(node.value))
    return _tried(node, format, shown, spec)


def _check_width(node: ast.AST, text: str, too_large: str) -> None:
    """Refuse a format in which the pattern `too_large` finds a width: it would make text of that size."""
    if re.search(too_large, text):
        raise Refused(node, "refused: a format with so large a width")


def _scalar(node: ast.AST, value: Any) -> Any:
    """A member of a list, a tuple or a dict; none of these, or what repeats could grow."""
    if not isinstance(value, SCALARS):
        raise Refused(node, "refused: expected numbers and text in a list, a tuple or a dict")
    return value


def _function(node: ast.Call, value: Callable[[ast.expr], Any], modules: Mapping[str, str]) -> Callable:
    """The function that is called: one of FUNCTIONS by its name, or one of METHODS of a value."""
    first, dot, rest = ast.unparse(node.func).partition(".")
    name = modules.get(first, "" if dot else first) + dot + rest
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    if isinstance(node.func, ast.Attribute) and not (isinstance(node.func.value, ast.Name) and first in modules):
        of, method = value(node.func.value), node.func.attr
        if method in METHODS.get(type(of), ()):
            if method == "format":
                _check_template(node, of)
            return getattr(of, method)
    raise Refused(node, f"refused: {ast.unparse(node.func)[:60]}() is not called in a config file")


def _check_template(node: ast.AST, template: str) -> None:
    """Refuse a template for str.format that asks for attributes, items, or large widths."""
    for _, field, spec, _ in _tried(node, lambda: list(string.Formatter().parse(template))):
        _check_width(node, spec or "", r"\d{4}|[{}]")
        if not re.fullmatch(r"\w*", field or ""):
            raise Refused(node, "refused: expected plain fields such as {} or {0:.2f}")
