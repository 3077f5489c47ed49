"""What all of our operations tell torch.compile."""

from functools import cache
from hashlib import sha256
from pathlib import Path

from torch.compiler import config


@cache
def mark_graphs() -> None:
    """Mark torch.compile's cache on disk with a digest of our sources, once. Its graphs hold an operation's backward
    pass, but its key has only the operation's name: without the mark, graphs of another version would be taken."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    config.cache_key_tag += "nanofuse-" + sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
