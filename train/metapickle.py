"""nanoGPT's meta.pkl, as its many preparing scripts write it, read without running anything in it.

A pickle can ask for any class or function by name and call it. Here it gets a stand-in that does nothing, whatever the
name, except for dicts of other kinds and numpy's numbers. So the size of the vocabulary, which is all that training
needs, is found beside things that are not understood; those cost only the sampling of text.
"""

import io
import pickle
import pickletools
import re
from typing import Any

import numpy as np

MAX_TUPLES = 50_000  # in one pickle: were they one in another, Python's hash of more would overflow the stack
DTYPE = re.compile(r"[<>=|]?([iufb]\d\d?|U\d{1,4})")
DICTS = ("OrderedDict", "defaultdict", "Counter")


def read_meta_pickle(data: bytes) -> dict[str, Any]:
    """{vocab_size, itos, stoi} in the form of meta.json: with "tokenizer" and "chars" for a table of characters; for
    another, "unread" says why text cannot be sampled. ValueError where no vocabulary size is found."""
    meta = _load(data)
    if not isinstance(meta, dict):
        raise ValueError("expected a dict with a vocab_size")
    table, unread = _table(meta.get("itos"), meta.get("stoi"))
    vocab_size = meta.get("vocab_size")
    if type(vocab_size) is float and vocab_size.is_integer():
        vocab_size = int(vocab_size)
    if vocab_size is None and table is not None:
        vocab_size = len(table)
    if vocab_size is None:
        raise ValueError("no 'vocab_size' in it")
    if table is not None and type(vocab_size) is int and len(table) > vocab_size:
        table, unread = None, f"itos has {len(table)} entries, vocab_size is {vocab_size}"
    found: dict[str, Any] = {"vocab_size": vocab_size}
    if table is None:
        return found | {"unread": unread}
    if not all(isinstance(char, str) and len(char) == 1 for char in table) or len(set(table)) != len(table):
        return found | {"unread": "itos holds more than different single characters"}
    return found | {"tokenizer": "char", "chars": table}


def _table(itos: Any, stoi: Any) -> tuple[list | None, str]:
    """(the tokens in the order of their ids, "") or (None, why there are none)."""
    if isinstance(itos, list | tuple):
        return list(itos), ""
    if not isinstance(itos, dict) and isinstance(stoi, dict):
        itos = {i: token for token, i in stoi.items() if type(i) is int}
    if not isinstance(itos, dict):
        return None, "it has no table of characters"
    if set(itos) != set(range(len(itos))):
        return None, f"the ids of itos are not those from 0 to {len(itos) - 1}"
    return [itos[i] for i in range(len(itos))], ""


def check_pickle(data: bytes) -> None:
    """ValueError for a pickle that is damaged, or whose reading could take all memory or overflow the stack."""
    tuples = 0
    for opcode, argument, _ in pickletools.genops(data):
        tuples += opcode.name.startswith("TUPLE")
        if opcode.name.endswith("PUT") and int(argument) > len(data):
            raise ValueError("a pickle that asks for more memory than it has bytes")
    if tuples > MAX_TUPLES:
        raise ValueError(f"a pickle of more than {MAX_TUPLES:,} tuples")


def _load(data: bytes) -> Any:
    """The pickled value. ValueError for a pickle that cannot be read."""
    try:
        check_pickle(data)
        return _Unpickler(io.BytesIO(data), encoding="utf-8", errors="replace").load()
    except ValueError:
        raise
    except Exception as error:  # an unpickler fed with garbage raises almost anything
        raise ValueError(f"not a pickle that can be read ({type(error).__name__}: {error})") from None


class _StandIn:
    """In place of any class, function or object. It takes anything and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, *_: Any) -> None:
        pass

    extend = add = update = append


class _Dtype(_StandIn):
    """In place of numpy.dtype. text: as in "<i8"; empty for one that is not read."""

    def __init__(self, text: Any = "", *_: Any, **__: Any) -> None:
        self.text = text if isinstance(text, str) and DTYPE.fullmatch(text) else ""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">") and self.text[:1] not in "<>=|":
            self.text = state[1] + self.text


def _scalar(dtype: Any = None, data: Any = None, *_: Any) -> Any:
    """A number or a string of numpy, as Python's own."""
    if not (isinstance(dtype, _Dtype) and dtype.text and isinstance(data, bytes)):
        return _StandIn()
    return np.frombuffer(data, dtype.text, count=1)[0].item()


def _dict(*arguments: Any) -> dict:
    """A dict of another kind, as a dict."""
    return dict(arguments[0]) if arguments and isinstance(arguments[0], dict) else {}


def _encode(text: Any = "", *_: Any) -> bytes:
    """Bytes, as pickles of protocol 2 spell them."""
    return text.encode("latin-1") if isinstance(text, str) else b""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode
        if module.partition(".")[0] == "numpy" and name in ("dtype", "scalar"):
            return _Dtype if name == "dtype" else _scalar
        return _dict if module == "collections" and name in DICTS else _StandIn
