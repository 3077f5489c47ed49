"""Reads nanoGPT's meta.pkl, as its preparing scripts write it, without running anything in it.

A pickle can ask for any class or function by name, and call it. Here every name gets a stand-in that does nothing,
except dicts of other kinds and numpy's numbers. Training needs only the size of the vocabulary, which is found also
beside things that are not understood. Then only text cannot be sampled.
"""

import collections
import hashlib
import io
import pickle
import pickletools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

MAX_TUPLES = 50_000  # in one pickle: if each one holds the next, hashing more of them overflows the stack
DTYPE = re.compile(r"[iufb]\d\d?|U\d{1,4}")  # numpy's numbers and strings
PLAIN = (str, bytes, int, type(None))  # tokens that can be compared with another table's
DICTS = ("OrderedDict", "defaultdict", "Counter")


def read_meta_pickle(data: bytes) -> dict[str, Any]:
    """{vocab_size, itos, stoi} in the form of meta.json. ValueError for a pickle that cannot be read.

    A table of characters becomes "tokenizer" and "chars". For any other, "unread" says why text cannot be sampled, and
    "table" is its digest. "vocab_size" is missing if there is neither a size nor a whole table.
    """
    try:
        check_pickle(data)
        meta = _Unpickler(io.BytesIO(data), encoding="utf-8", errors="replace").load()
    except Exception as error:  # an unpickler fed with garbage raises almost anything
        raise ValueError(f"not a pickle that can be read ({type(error).__name__}: {error})") from None
    if not isinstance(meta, dict):
        raise ValueError("expected a dict with a vocab_size")
    size, table = meta.get("vocab_size"), _table(meta.get("itos"), meta.get("stoi"))
    tokens = [table[i] for i in range(len(table))] if set(table) == set(range(len(table))) else []
    if type(size) is not int and tokens:
        size = len(tokens)
    found = {"vocab_size": size} | ({"dtype": meta["dtype"]} if isinstance(meta.get("dtype"), str) else {})
    characters = all(isinstance(token, str) and len(token) == 1 for token in tokens)
    if tokens and characters and len(set(tokens)) == len(tokens) <= size:
        return found | {"tokenizer": "char", "chars": tokens}
    if table and all(type(i) is int and type(token) in PLAIN for i, token in table.items()):
        found["table"] = digest(table)
    of_words = "itos holds more than different single characters with ids from 0 on"
    return found | {"unread": of_words if table else "it has no table of characters"}


def _table(itos: Any, stoi: Any) -> dict[Any, Any]:
    """{id: token}; empty if there is none."""
    if isinstance(itos, list | tuple):
        return dict(enumerate(itos))
    if not isinstance(itos, dict) and isinstance(stoi, dict):
        return {i: token for token, i in stoi.items() if type(i) is int}
    return itos if isinstance(itos, dict) else {}


def digest(table: Mapping[int, Any]) -> str:
    """A digest of a table {id: token}."""
    return hashlib.sha256(repr(sorted(table.items())).encode("utf-8", "surrogatepass")).hexdigest()


def check_pickle(data: bytes) -> None:
    """ValueError for a pickle that is damaged, or whose reading could take all memory or overflow the stack."""
    tuples = 0
    for opcode, argument, _ in pickletools.genops(data):
        tuples += opcode.name.startswith("TUPLE")
        if opcode.name.endswith("PUT") and int(argument) > len(data):
            raise ValueError("a pickle that asks for more memory than it has bytes")
    if tuples > MAX_TUPLES:
        raise ValueError(f"a pickle of more than {MAX_TUPLES:,} tuples")


class _StandIn:
    """Takes the place of any class, function or object. It accepts anything and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = __init__


class _Dtype(_StandIn):
    """In place of numpy.dtype. text: as in "i8"; empty for one that is not read."""

    def __init__(self, text: Any = "", *_: Any, **__: Any) -> None:
        self.text = text if isinstance(text, str) and DTYPE.fullmatch(text) else ""


def _scalar(dtype: Any = None, data: Any = None, *_: Any) -> Any:
    """A number or a string of numpy, as Python's own."""
    if not (isinstance(dtype, _Dtype) and dtype.text and isinstance(data, bytes)):
        return _StandIn()
    return np.frombuffer(data, dtype.text, count=1)[0].item()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in ("dtype", "scalar"):
            return _Dtype if name == "dtype" else _scalar
        return getattr(collections, name) if module == "collections" and name in DICTS else _StandIn
