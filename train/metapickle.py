"""Reads nanoGPT's meta.pkl, as its preparing scripts write it, without running anything in it.

A pickle can ask for any class or function by name, and call it. Here every name gets a stand-in that does nothing,
except dicts of other kinds and numpy's numbers. Training needs only the size of the vocabulary, which is found also
beside things that are not understood. Then only text cannot be sampled.
"""

import hashlib
import io
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

DTYPE = re.compile(r"[iuf]\d|U\d\d?")  # numpy's numbers and strings
PLAIN = (str, bytes, int, type(None))  # tokens that can be compared with another table's


def read_meta_pickle(data: bytes) -> dict[str, Any]:
    """{vocab_size, itos, stoi} in the form of meta.json. ValueError for a pickle that cannot be read.

    A table of characters becomes "tokenizer" and "chars", of any other "table" is the digest.
    """
    try:
        meta = _Unpickler(io.BytesIO(data), encoding="utf-8", errors="replace").load()
    except Exception as error:  # an unpickler fed with garbage raises almost anything
        raise ValueError(f"not a pickle that can be read ({type(error).__name__}: {error})") from None
    if not isinstance(meta, dict):
        raise ValueError("expected a dict with a vocab_size")
    size, table = meta.get("vocab_size"), _table(meta.get("itos"), meta.get("stoi"))
    if type(size) is not int:
        size = 1 + max((i for i in table if type(i) is int), default=-1)
    found = {"vocab_size": size} | ({"dtype": meta["dtype"]} if isinstance(meta.get("dtype"), str) else {})
    tokens = [table.get(i) for i in range(len(table))]
    characters = all(isinstance(token, str) and len(token) == 1 for token in tokens)
    if tokens and characters and len(set(tokens)) == len(tokens) <= size:
        return found | {"tokenizer": "char", "chars": tokens}
    if table and all(type(i) is int and type(token) in PLAIN for i, token in table.items()):
        found["table"] = digest(table)
    return found


def _table(itos: Any, stoi: Any) -> dict[Any, Any]:
    """{id: token}; empty if there is none."""
    if isinstance(itos, dict):
        return itos
    if isinstance(itos, list):
        return dict(enumerate(itos))
    return {i: token for token, i in stoi.items() if type(i) is int} if isinstance(stoi, dict) else {}


def digest(table: Mapping[int, Any]) -> str:
    return hashlib.sha256(repr(sorted(table.items())).encode("utf-8", "surrogatepass")).hexdigest()


class _StandIn:
    """Takes the place of any class, function or object. It accepts anything and does nothing."""

    args: tuple = ()

    def __init__(self, *args: Any, **_: Any) -> None:
        self.args = args

    def __setitem__(self, *_: Any) -> None:
        pass

    __setstate__ = append = extend = add = __setitem__


def _scalar(dtype: Any = None, data: Any = None, *_: Any) -> Any:
    """A number or a string of numpy, as Python's own. The arguments are numpy.dtype("i8"), for example, and bytes, in
    old pickles _codecs.encode(text, "latin1")."""
    name, text = (str(next(iter(getattr(it, "args", ())), "")) for it in (dtype, data))
    if not DTYPE.fullmatch(name):
        return _StandIn()
    data = data if isinstance(data, bytes) else text.encode("latin-1")
    return np.frombuffer(data, name, count=1)[0].item()


def _list_of(count: int) -> Callable[["_Unpickler"], None]:
    def load(unpickler: "_Unpickler") -> None:
        unpickler.stack[-count:] = [unpickler.stack[-count:]]

    return load


class _Unpickler(pickle._Unpickler):
    """The one in C takes all memory for an index of 2^60. Tuples are lists here: the hash of a tuple of tuples of
    tuples can overflow the stack, or never end."""

    dispatch = pickle._Unpickler.dispatch | {
        pickle.TUPLE[0]: pickle._Unpickler.load_list,
        pickle.EMPTY_TUPLE[0]: pickle._Unpickler.load_empty_list,
        pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8,  # of no more bytes than there are
        **{opcode[0]: _list_of(n) for n, opcode in enumerate((pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3), 1)},
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "collections":  # a defaultdict, for example, whose items follow or are an argument
            return lambda *args: next((arg for arg in args if isinstance(arg, dict)), {})
        return _scalar if module.startswith("numpy") and name == "scalar" else _StandIn
