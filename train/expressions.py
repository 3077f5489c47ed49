"""The value of a Python expression in a config file, computed without running Python.

The expression is walked as a syntax tree. It may hold numbers, text, names with a value, arithmetic, comparisons,
`a if b else c`, three ways to fill in text, and calls of FUNCTIONS: what config files of nanoGPT and its forks hold.
Everything else is refused.
"""

import ast
import functools
import math
import operator
import os.path
import time
from collections.abc import Callable, Mapping
from typing import Any

from train.errors import UserError


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
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
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
    **{function.__name__: function for function in (str, int, float, abs, min, max, round)},
    **{f"math.{function.__name__}": function for function in (math.sqrt, math.log, math.ceil, math.floor)},
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
        case ast.Constant(value=None | int() | float() | str() as constant):  # bool is an int
            return constant
        case ast.Name(id=name) if name in named:
            return named[name]
        case ast.Name(id=name):
            raise UserError(f"{name} is not assigned further up in this file, or not understood there")
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return _called(OPERATORS[type(op)], value(operand))
        case ast.BinOp(op=ast.Mod(), left=template, right=ast.Tuple(elts=values)):
            return _called(operator.mod, value(template), tuple(map(value, values)))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as template), attr="format"), args=values, keywords=[]
        ):
            return _called(template.format, *map(value, values))
        case ast.BinOp(op=op, left=left, right=right) | ast.Compare(ops=[op], left=left, comparators=[right]) if (
            type(op) in OPERATORS
        ):
            return _called(OPERATORS[type(op)], value(left), value(right))
        case ast.BoolOp(op=op, values=parts):
            for part in parts:
                if bool(result := value(part)) is isinstance(op, ast.Or):
                    break
            return result
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return value(body if value(test) else orelse)
        case ast.JoinedStr(values=parts):
            return "".join(map(value, parts))
        case ast.FormattedValue(value=inner, conversion=-1, format_spec=spec):
            return _called(format, value(inner), value(spec) if spec else "")
        case ast.Call(func=function, args=arguments, keywords=[]) if ast.unparse(function) in FUNCTIONS:
            return _called(FUNCTIONS[ast.unparse(function)], *map(value, arguments))
    expected = "values, arithmetic, or calls such as str(), int(), time.time()"
    raise UserError(f"refused: {ast.unparse(node)[:60]}; expected {expected}")


def _called(function: Callable, *operands: Any) -> Any:
    """function(*operands). What a function of the tables raises, torch's too, is refused."""
    try:
        return function(*operands)
    except Exception as error:
        raise UserError(f"cannot be computed: {error}") from None
