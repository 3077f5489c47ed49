"""The corpora that have a name, and where their text comes from. To add one is a line in CORPORA and a function."""

import ast
import hashlib
import http.client
import itertools
import os
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from train.errors import UserError, command, first_line, quoted
from train.files import read_regular, replacing

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
MAX_TEXT = 1 << 24  # bytes of the text of a corpus
TIMEOUT = 30  # seconds without a byte until a download is given up

# Folders of the standard library that are left out: without text to learn from, or not in all of Debian's packages
LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "__phello__", "lib2to3", "turtledemo"}
LEFT_OUT |= {"tkinter", "idlelib", "distutils", "ensurepip", "pydoc_data"}
TYPOGRAPHY = str.maketrans(
    {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "--", 0x2026: "..."}
)
PART = 4000  # characters of text that stay together when the corpus is shuffled
LONG = 64  # characters; a longer paragraph that is repeated counts as a copy


def docs_text() -> str:
    """The text of `docs`: about 1.8 million printable ASCII characters, the same for one version of Python.

    Copies of paragraphs are left out, so that validation does not test what training has shown. Then the text is cut
    into parts, which are sorted by their sha256. This shuffles them without a random generator, so that any tenth of
    the text is like the rest. UserError if this Python has no sources.
    """
    seen: set[str] = set()
    parts: set[str] = set()
    try:
        from pydoc_data.topics import topics  # what help("topic") shows

        for text in itertools.chain(map(_plain, topics.values()), _docstrings(Path(sysconfig.get_path("stdlib")))):
            parts.update(_parts(text, seen))
    except (OSError, SyntaxError, ImportError) as error:
        raise UserError(f"docs: the sources of this Python cannot be read: {error}; choose another dataset") from None
    ordered = sorted(parts, key=lambda part: hashlib.sha256(part.encode()).digest())
    return "".join(part + "\n\n\n" for part in ordered)


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
    """`text` with plain quotes and dashes; "" if it still has more than printable ASCII."""
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


def shakespeare_text() -> bytes:
    """TinyShakespeare, downloaded. UserError if that fails."""
    remedy = "put the file into the dataset's folder as input.txt and run again"
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=TIMEOUT) as response:
            return response.read(MAX_TEXT)
    except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(f"{SHAKESPEARE_URL}: cannot be downloaded ({first_line(reason)}); {remedy}") from None


def openwebtext() -> dict[str, Any]:
    """{"train": documents, "val": documents}, split as nanoGPT splits them. UserError if they cannot be loaded."""
    try:
        from datasets import load_dataset

        documents = load_dataset("Skylion007/openwebtext", split="train")
        parts = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    except ImportError:
        raise UserError("openwebtext: the package `datasets` is missing; pip install 'nanofuse[data]'") from None
    except Exception as error:  # of the network, the cache or the disk: the package has no common ancestor for them
        raise UserError(f"openwebtext: cannot be loaded: {type(error).__name__}: {first_line(error)}") from None
    return {"train": parts["train"], "val": parts["test"]}


class Corpus(NamedTuple):
    tokenizer: str  # what `--tokenizer=auto` stands for
    text: Callable[[], bytes] | None  # makes or downloads it; None: documents instead of a text, `openwebtext`
    sha256: str = ""  # of the text; empty: of what `text` makes

    def fetch(self, path: Path) -> None:
        """Make or download the text as `path`, unless it is there. UserError if that fails, or for another text."""
        there = os.path.lexists(path)
        try:
            data = read_regular(path, MAX_TEXT) if there else self.text()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        expected = self.sha256 or hashlib.sha256(self.text() if there else data).hexdigest()
        if (found := hashlib.sha256(data).hexdigest()) != expected:
            raise UserError(
                f"{path}: the text's sha256 is {found}, expected {expected}: it is not the corpus; move it away, or "
                f"prepare it under another name: {command('train.prepare')} {quoted(path)} --dataset=NAME"
            )
        if not there:
            with replacing(path) as file:
                file.write(data)


CORPORA = {
    "docs": Corpus("char", lambda: docs_text().encode()),  # what every Python ships: its reference and docstrings
    "shakespeare_char": Corpus("char", shakespeare_text, SHAKESPEARE_SHA256),  # by character
    "shakespeare": Corpus("gpt2", shakespeare_text, SHAKESPEARE_SHA256),  # by GPT-2's tokens
    "openwebtext": Corpus("gpt2", None),  # 8 million web pages, by GPT-2's tokens; 54 GB of cache
}


def dataset_folder(name: str) -> Path:
    """The folder of a dataset: data/<name>. A name that begins with data/, or an absolute one, is the folder itself."""
    path = Path(name)
    named = path.is_absolute() or (path.parts[:1] == ("data",) and len(path.parts) > 1)
    return path if named else Path("data") / path


def how_to_make(folder: Path, tokenizer: str | None = None) -> str:
    """The command that makes the dataset in `folder`, with this tokenizer if it is one. FILE ... stands for the user's
    text."""
    name, usual = folder.name if folder.parent == Path("data") else str(folder), "char"
    if name in CORPORA:
        what, usual = name, CORPORA[name].tokenizer
    else:
        text = folder / "input.txt"
        what = f"{quoted(text) if os.path.isfile(text) else 'FILE ...'} --dataset={quoted(name)}"
    other = f" --tokenizer={tokenizer}" if tokenizer in ("char", "byte", "gpt2") and tokenizer != usual else ""
    return f"{command('train.prepare')} {what}{other}"
