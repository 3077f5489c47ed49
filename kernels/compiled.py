"""What all of our operations tell torch.compile."""

from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from torch.compiler import config


@lru_cache
def _sources() -> str:
    """A digest of the files of this folder."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def mark_graphs() -> None:
    """Mark torch.compile's cache on disk with a digest of our sources. Its graphs hold an operation's backward pass,
    but its key has only the operation's name: without the mark, graphs of another version would be taken."""
    mark = f"nanofuse-{_sources()}"
    if mark not in config.cache_key_tag:
        config.cache_key_tag += mark
