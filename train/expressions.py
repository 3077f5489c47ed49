"""The value of a Python expression in a config file, computed without running Python.

The expression is walked as a syntax tree. It may hold numbers, text, names with a value, arithmetic, comparisons,
`a if b else c`, three ways to fill in text, and calls of FUNCTIONS: what config files of nanoGPT and its forks hold.
Everything else is refused. The work and the size of each result are bounded.
"""

import ast
import datetime
import functools
import math
import operator
import os.path
import re
import time
from collections.abc import Callable
from typing import Any

from train.errors import UserError

MAX_TEXT = 4096  # characters; bounds what `out_dir = out_dir + out_dir`, repeated, can cost
MAX_BITS = 128  # of a whole number, for the same reason


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and exponent > MAX_BITS:
        raise OverflowError("so large an exponent")  # before the work is done: 9**9**9 has no end
    return base**exponent


def _format(value: Any, spec: str = "") -> str:
    return format(value, _narrow(spec))


def _percent(template: str, *values: Any) -> str:
    return _narrow(template.replace("*", "0000")) % values  # of *, a value is the width


def _fill(template: str, *values: Any) -> str:
    if not re.fullmatch(r"([^{}]|\{\{|\}\}|\{\d*(:[^{}]*)?\})*", template):  # no attributes, no items, no nesting
        raise ValueError("expected plain fields such as {} or {0:.2f}")
    return _narrow(template).format(*values)


def _narrow(template: str) -> str:
    if re.search(r"\d{4}", template):  # a width that makes text of that size
        raise ValueError("so large a width")
    return template


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _torch(name: str) -> Any:
    """What a function of torch says of the machine. torch is imported only here: that takes seconds."""
    import torch

    return operator.attrgetter(name.removeprefix("torch."))(torch)()


OPERATORS: dict[type[ast.AST], Callable] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
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
FUNCTIONS: dict[str, Callable] = {
    **{f.__name__: f for f in (str, int, float, abs, min, max)},
    "round": lambda number: round(number),  # without digits: of a whole number, -10**9 has no end
    "time.time": time.time,
    "time.strftime": time.strftime,
    "datetime.now().strftime": _now,
    "datetime.datetime.now().strftime": _now,
    "os.path.join": os.path.join,
    **{f"math.{f.__name__}": f for f in (math.sqrt, math.log, math.ceil, math.floor)},
    **{
        name: functools.partial(_torch, name)
        for name in (
            "torch.cuda.is_available",
            "torch.cuda.is_bf16_supported",
            "torch.cuda.device_count",
            "torch.backends.mps.is_available",
        )
    },
}


def evaluate(node: ast.AST, named: Callable[[str], Any]) -> Any:
    """The value of an expression. named: the value of a name. Raises UserError, and what `named` raises."""

    def value(node: ast.AST) -> Any:
        return evaluate(node, named)

    match node:
        case ast.Constant(value=None | int() | float() | str() as result):  # bool is an int
            pass
        case ast.Name(id=name):
            result = named(name)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            result = _called(OPERATORS[type(op)], value(operand))
        case ast.BinOp(op=ast.Mod(), left=ast.Constant(value=str() as template), right=right):
            result = _called(_percent, template, *map(value, right.elts if isinstance(right, ast.Tuple) else [right]))
        case ast.Call(func=ast.Attribute(ast.Constant(value=str() as template), "format"), args=args, keywords=[]):
            result = _called(_fill, template, *map(value, args))
        case ast.BinOp(op=op, left=left, right=right) if type(op) in OPERATORS:
            operands = value(left), value(right)
            if str in map(type, operands) and not isinstance(op, ast.Add):
                raise UserError("refused: arithmetic is for numbers, and + for two strings")
            result = _called(OPERATORS[type(op)], *operands)
        case ast.Compare(ops=[op], left=left, comparators=[right]):
            result = _called(OPERATORS[type(op)], value(left), value(right))
        case ast.BoolOp(op=op, values=parts):
            for part in parts:
                if bool(result := value(part)) is isinstance(op, ast.Or):
                    break
        case ast.IfExp(test=test, body=body, orelse=orelse):
            result = value(body if value(test) else orelse)
        case ast.JoinedStr(values=parts):
            result = "".join(map(value, parts))
        case ast.FormattedValue(value=inner, conversion=-1, format_spec=spec):
            result = _called(_format, value(inner), *([value(spec)] if spec else []))
        case ast.Call(func=function, args=arguments, keywords=[]) if ast.unparse(function) in FUNCTIONS:
            result = _called(FUNCTIONS[ast.unparse(function)], *map(value, arguments))
        case ast.Call():
            raise UserError(f"refused: {ast.unparse(node)[:60]} is not called in a config file")
        case _:
            raise UserError("refused: expected values, arithmetic, or calls such as str(), int(), time.time()")
    if isinstance(result, str) and len(result) > MAX_TEXT:
        raise UserError(f"refused: text of more than {MAX_TEXT} characters")
    if isinstance(result, int) and result.bit_length() > MAX_BITS:
        raise UserError(f"refused: a whole number of more than {MAX_BITS} bits")
    return result


def _called(function: Callable, *operands: Any) -> Any:
    """function(*operands). What a function of the tables raises, torch's too, is refused."""
    try:
        return function(*operands)
    except Exception as error:
        raise UserError(f"cannot be computed: {error}") from None
