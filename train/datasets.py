"""The corpora that have a name, and where their text comes from.

docs               what every Python ships: its language reference and the standard library's docstrings
shakespeare_char   TinyShakespeare, by character
shakespeare        TinyShakespeare, by GPT-2's tokens
openwebtext        8 million web pages, by GPT-2's tokens; 54 GB of cache
"""

import ast
import hashlib
import http.client
import itertools
import json
import os
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from train.encode import in_order, write_dataset, write_tokens
from train.errors import UserError
from train.files import making_folder, replacing
from train.tokenizer import GPT2_TOKENS, GPT2Tokenizer

TOKENIZERS = {"docs": "char", "shakespeare_char": "char", "shakespeare": "gpt2", "openwebtext": "gpt2"}

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TIMEOUT = 30  # seconds without a byte until a download is given up

# No text to learn from, or not the same in every distribution of one Python version: Debian packs some apart.
LEFT_OUT = frozenset(
    [
        "test",
        "tests",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "__phello__",
        "lib2to3",
        "turtledemo",
        "tkinter",
        "idlelib",
        "distutils",
        "ensurepip",
        "pydoc_data",
    ]
)
TYPOGRAPHY = str.maketrans(
    {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "--", 0x2026: "..."}
)
PART = 4000  # characters of text that stay together when the corpus is shuffled
DOCUMENTS = 500  # encoded together
LONG = 64  # a paragraph of more characters is a copy when it comes again


def docs_text() -> str:
    """The text of `docs`: about 1.8 million printable ASCII characters, the same for one version of Python.

    A paragraph that comes again is left out, so that validation does not ask for what training has shown. The
    text is then cut into parts, put in the order of their sha256: a shuffle that depends on no random
    generator, and any tenth of it is like the rest. Raises UserError where this Python has no sources.
    """
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    parts: set[str] = set()
    try:
        for text in itertools.chain(_topics(library), _docstrings(library)):
            parts.update(_parts(text, seen))
    except (OSError, SyntaxError) as error:
        raise UserError(f"docs: the sources of this Python cannot be read: {error}; choose another dataset") from None
    ordered = sorted(parts, key=lambda part: hashlib.sha256(part.encode()).digest())
    return "".join(part + "\n\n\n" for part in ordered)


def ensure_docs(folder: str | Path, say: Callable[[str], None] = print) -> None:
    """Make the dataset `docs` in `folder` if it is missing, in seconds; say its size and sha256."""
    folder = Path(folder)
    path = folder / "meta.json"
    if not all((folder / name).is_file() for name in ("train.bin", "val.bin", "meta.json")):
        prepare_docs(folder)
    try:
        say(docs_line(json.loads(path.read_text("utf-8"))))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); python -m train.prepare docs makes it anew") from None


def docs_line(meta: dict[str, Any]) -> str:
    """One line on `docs`: its tokens and sha256."""
    tokens = meta["train_tokens"] + meta["val_tokens"]
    unit = "characters" if meta["tokenizer"] == "char" else "tokens"
    return f"docs: {tokens:,} {unit} of Python's own documentation, sha256 {meta['sha256']}"


def prepare_docs(folder: Path, tokenizer: str = "char", **options: Any) -> dict[str, Any]:
    """Write the text, `folder`/input.txt, and the dataset made of it. Options are write_dataset's."""
    text = docs_text()
    with making_folder(folder):
        path = folder / "input.txt"
        with replacing(path) as file:
            file.write(text.encode())
        return write_dataset(folder, [path], tokenizer, **options)


def prepare_shakespeare(folder: Path, tokenizer: str, **options: Any) -> dict[str, Any]:
    """Write the dataset made of `folder`/input.txt, which is downloaded if missing. Returns meta."""
    path = folder / "input.txt"
    with making_folder(folder):
        if not path.exists():
            download(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
        elif (digest := hashlib.sha256(path.read_bytes()).hexdigest()) != SHAKESPEARE_SHA256:
            raise UserError(
                f"{path}: sha256 is {digest}, expected {SHAKESPEARE_SHA256}; delete it to have it downloaded"
            )
        return write_dataset(folder, [path], tokenizer, **options)


def prepare_openwebtext(
    folder: Path, bpe_dir: str = "", see: Callable[[int, int], None] = lambda done, total: None
) -> dict:
    """Write OpenWebText in nanoGPT's split, <|endoftext|> after every document. Returns the meta.

    `see` is told the documents done and their number.
    """
    bpe = GPT2Tokenizer(bpe_dir or None)
    documents = openwebtext()
    total = sum(len(part) for part in documents.values())
    digest = hashlib.sha256()
    done = 0

    def texts(part: Any) -> Iterator[list[str]]:
        nonlocal done
        for batch in part.iter(batch_size=DOCUMENTS):
            for text in batch["text"]:
                digest.update(text.encode("utf-8", "replace"))
            yield batch["text"]
            done += len(batch["text"])
            see(done, total)

    def encode(batch: list[str]) -> np.ndarray:
        return np.concatenate([ids for text in batch for ids in (bpe.encode_ordinary(text), end)])

    end = np.array([GPT2_TOKENS - 1], dtype=np.uint16)
    splits = {name: in_order(encode, texts(part)) for name, part in documents.items()}
    return write_tokens(folder, bpe, splits, digest.hexdigest)


def openwebtext() -> dict[str, Any]:
    """{"train": documents, "val": documents}, split as nanoGPT splits them. Raises UserError."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError("openwebtext: the package `datasets` is missing; pip install 'nanofuse[data]'") from None
    try:
        documents = load_dataset("Skylion007/openwebtext", split="train")
        parts = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    except Exception as error:  # of the network, the cache or the disk: the package has no common ancestor for them
        raise UserError(f"openwebtext: cannot be loaded: {type(error).__name__}: {_line(error)}") from None
    return {"train": parts["train"], "val": parts["test"]}


def download(url: str, path: Path, sha256: str) -> None:
    """Fetch `url` into `path`, whole and with that sha256, or raise a UserError that says what to do."""
    remedy = f"put the file at {path} and run again"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response, replacing(path) as file:
            digest = hashlib.sha256()
            while data := response.read(1 << 16):
                digest.update(data)
                file.write(data)
            if digest.hexdigest() != sha256:
                raise UserError(f"{url}: sha256 is {digest.hexdigest()}, expected {sha256}; {remedy}")
    except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(f"{url}: cannot be downloaded ({_line(reason)}); {remedy}") from None


def _line(error: object) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _topics(library: Path) -> Iterator[str]:
    """What pydoc's help("topic") shows: a dict literal, read without running its module."""
    for statement in ast.parse((library / "pydoc_data" / "topics.py").read_bytes()).body:
        if isinstance(statement, ast.Assign):
            yield from filter(None, map(_plain, ast.literal_eval(statement.value).values()))


def _docstrings(library: Path) -> Iterator[str]:
    """Each module's docstrings, in the order of the source, as one text."""
    for folder, folders, names in os.walk(library):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT and not name.startswith("config-"))
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                source = Path(folder, name).read_bytes()
                if b'"""' in source or b"'''" in source:
                    texts = map(_plain, _docstrings_in(ast.parse(source)))
                    yield "\n\n\n".join(filter(None, texts))


def _docstrings_in(node: ast.AST) -> Iterator[str]:
    """Of the definitions in `node`, itself included. Expressions, most of a tree, are not looked into."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
    for field in ("body", "handlers", "orelse", "finalbody"):
        if isinstance(children := getattr(node, field, None), list):
            for child in children:
                yield from _docstrings_in(child)


def _plain(text: str) -> str:
    """`text` in typewriter quotes and dashes; nothing where that leaves more than printable ASCII."""
    text = text.translate(TYPOGRAPHY).strip("\n")
    return text if all(" " <= char <= "~" or char == "\n" for char in set(text)) else ""


def _parts(text: str, seen: set[str]) -> Iterator[str]:
    """`text` without the long paragraphs that were seen, in parts of PART characters or one paragraph."""
    part = ""
    for paragraph in text.split("\n\n"):
        bare = paragraph.strip("\n")
        if len(bare) > LONG and bare in seen:
            continue
        seen.add(bare)
        if part and len(part) + len(paragraph) > PART:
            yield part
            part = ""
        part = part + "\n\n" + paragraph if part else bare
    if part:
        yield part
