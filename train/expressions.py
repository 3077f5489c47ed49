"""The value of a Python expression in a config file, computed without running Python.

The expression is walked as a syntax tree. It may hold numbers, text, names with a value, arithmetic, comparisons,
`a if b else c`, three ways to fill in text, and calls of FUNCTIONS: what config files of nanoGPT and its forks hold.
Everything else is refused. The work and the size of each result are bounded.
"""

import ast
import functools
import math
import operator
import os.path
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from train.errors import UserError

MAX_SIZE = 1000  # characters, or bits of a whole number: bounds what `x = x + x`, repeated, can cost


def _times(left: Any, right: Any) -> Any:
    if str in (type(left), type(right)):
        raise TypeError("* is for numbers")
    return left * right


def _power(base: Any, exponent: Any) -> Any:
    if exponent > MAX_SIZE:
        raise OverflowError("so large an exponent")  # before the work is done: 9**9**9 has no end
    return base**exponent


def _format(value: Any, spec: str = "") -> str:
    if len(spec) > 6:
        raise ValueError("so long a format")  # a width makes text of that size
    return format(value, spec)


def _percent(left: Any, *right: Any) -> Any:
    """A remainder, or text with values filled in."""
    if not isinstance(left, str):
        return operator.mod(left, *right)
    if not re.fullmatch(r"([^%]|%%|%[-+ 0-9.]{0,5}[a-zA-Z])*", left):  # no * for a width
        raise ValueError("expected plain fields such as %s or %.2f")
    return left % right


def _fill(template: str, *values: Any) -> str:
    if not re.fullmatch(r"([^{}]|\{\{|\}\}|\{\d*(:[^{}]{0,5})?\})*", template):  # no attributes, no items, no nesting
        raise ValueError("expected plain fields such as {} or {0:.2f}")
    return template.format(*values)


def _torch(name: str) -> Any:
    """What a function of torch says of the machine. torch is imported only here: that takes seconds."""
    import torch

    return operator.attrgetter(name)(torch)()


OPERATORS: dict[type[ast.AST], Callable] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: _times,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: _percent,
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
TORCH = ("cuda.is_available", "cuda.is_bf16_supported", "cuda.device_count", "backends.mps.is_available")
FUNCTIONS: dict[str, Callable] = {
    **{function.__name__: function for function in (str, int, float, abs, min, max)},
    **{f"math.{function.__name__}": function for function in (math.sqrt, math.log, math.ceil, math.floor)},
    # of a whole number, -10**9 digits have no end; it is 0 long before
    "round": lambda number, digits=None: round(number, digits if digits is None else max(digits, -MAX_SIZE)),
    "os.path.join": os.path.join,
    "time.time": time.time,
    "time.strftime": time.strftime,
    "datetime.now().strftime": time.strftime,
    "datetime.datetime.now().strftime": time.strftime,
    **{f"torch.{name}": functools.partial(_torch, name) for name in TORCH},
}


def evaluate(node: ast.AST, named: Mapping[str, Any]) -> Any:
    """The value of an expression. named: the values of names. UserError if it has none here."""
    value = functools.partial(evaluate, named=named)
    match node:
        case ast.Constant(value=None | int() | float() | str() as result):  # bool is an int
            pass
        case ast.Name(id=name) if name in named:
            result = named[name]
        case ast.Name(id=name):
            raise UserError(f"{name} is not assigned further up in this file, or not understood there")
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            result = _called(OPERATORS[type(op)], value(operand))
        case ast.BinOp(op=ast.Mod(), left=template, right=ast.Tuple(elts=values)):
            result = _called(_percent, *map(value, [template, *values]))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str()) as template, attr="format"), args=values, keywords=[]
        ):
            result = _called(_fill, *map(value, [template, *values]))
        case ast.BinOp(op=op, left=left, right=right) | ast.Compare(ops=[op], left=left, comparators=[right]) if (
            type(op) in OPERATORS
        ):
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
        case _:
            expected = "values, arithmetic, or calls such as str(), int(), time.time()"
            raise UserError(f"refused: {ast.unparse(node)[:60]}; expected {expected}")
    size = len(result) if isinstance(result, str) else result.bit_length() if isinstance(result, int) else 0
    if size > MAX_SIZE:
        raise UserError(f"refused: text of more than {MAX_SIZE} characters, or a whole number of more bits")
    return result


def _called(function: Callable, *operands: Any) -> Any:
    """function(*operands). What a function of the tables raises, torch's too, is refused."""
    try:
        return function(*operands)
    except Exception as error:
        raise UserError(f"cannot be computed: {error}") from None
