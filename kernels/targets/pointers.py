"""Which of a kernel's tensors a load or store on a source line goes through: the kernels' source, read as a tree."""

import ast
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from kernels.launch import Launch

UNKNOWN = "?"  # where no source line explains an access


def tensor_of(argument: Any) -> Tensor | None:
    """The tensor behind a launch's argument: itself, or a tensor descriptor's."""
    argument = getattr(argument, "base", argument)
    return argument if isinstance(argument, Tensor) else None


def pointers_of(launch: Launch, source: tuple[str, int] | None, store: bool) -> list[tuple[str, str]]:
    """Of each load, or store, that is written on a source line: the first name in its address, and the launch's tensor
    argument behind it; scalars first.

    Names are followed back through assignments and through the parameters of helpers; where a helper serves several
    tensors, to the first. Where nothing leads to an argument, the first name stands for it.
    """
    if source is None:
        return []
    kernel_file = Path(launch.kernel.fn.__code__.co_filename)
    file = kernel_file.with_name(source[0])  # only the name: the compiler's cache remembers where the tree once was
    if not file.exists():
        return []
    tensors = {name: tensor for name, argument in launch.args.items() if (tensor := tensor_of(argument)) is not None}
    here = _names_in(file)
    origins = [here] if file == kernel_file else [here, _names_in(kernel_file)]
    called = _called(launch.kernel.fn.__name__, origins)
    found = {}
    for names in here.addressed.get((source[1], store), ()):
        first, seen = names[0][1] if names else UNKNOWN, set()
        pointer = first
        while names:
            if known := [name for _, name in names if name in tensors]:
                pointer = known[0]
                break
            seen.update(names)
            before = [old for origin in origins for name in names for old in origin.made_of.get(name, ())]
            names = [name for name in before if name not in seen and name[0] in called]
        found[pointer] = first
    pairs = [(first, pointer) for pointer, first in found.items()]
    return sorted(pairs, key=lambda pair: tensors[pair[1]].numel() if pair[1] in tensors else 2)


_Name = tuple[str, str]  # a function, a variable of it


@dataclass(frozen=True)
class _Names:
    """Of a source file: the names in the address of every load and store on a line; those that a name is made of."""

    addressed: dict[tuple[int, bool], list[list[_Name]]]  # (line, store)
    made_of: dict[_Name, list[_Name]]
    calls: dict[str, set[str]]  # function -> functions


def _called(function: str, origins: list[_Names]) -> set[str]:
    """A function and all that it calls."""
    called, waiting = set(), [function]
    while waiting:
        if (name := waiting.pop()) not in called:
            called.add(name)
            waiting += [callee for origin in origins for callee in origin.calls.get(name, ())]
    return called


@lru_cache
def _names_in(file: Path) -> _Names:
    tree = ast.parse(file.read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    parameters = {node.name: node.args.args for node in functions}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            imported = file.with_name(f"{(node.module or '').rsplit('.', 1)[-1]}.py")
            if imported.exists() and imported != file:
                others = ast.parse(imported.read_text()).body
                parameters |= {other.name: other.args.args for other in others if isinstance(other, ast.FunctionDef)}
    found = _Names({}, {}, {})
    for function in functions:
        for node in ast.walk(function):
            _note(node, function.name, parameters, found)
    return found


def _note(node: ast.AST, function: str, parameters: dict[str, list[ast.arg]], found: _Names) -> None:
    """Add what a node of a function tells."""

    def names(node: ast.AST) -> list[_Name]:
        return [(function, inner.id) for inner in ast.walk(node) if isinstance(inner, ast.Name)]

    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        verb, owner = node.func.attr, node.func.value
        if verb.startswith(("load", "store", "atomic", "gather", "scatter")):
            of_language = isinstance(owner, ast.Name) and owner.id == "tl"
            store = verb.startswith(("store", "atomic", "scatter"))
            address = node.args[0] if of_language and node.args else owner
            found.addressed.setdefault((node.lineno, store), []).append(names(address))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in parameters:
        found.calls.setdefault(function, set()).add(node.func.id)
        for parameter, value in zip(parameters[node.func.id], node.args, strict=False):
            found.made_of.setdefault((node.func.id, parameter.arg), []).extend(names(value))
    elif isinstance(node, ast.Assign | ast.AugAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            for name in names(target):
                found.made_of.setdefault(name, []).extend(names(node.value))
