"""torch's zip archives, read with care: others may have made them, or a disk damaged them.

A load first checks every CRC. Then it checks that torch has read the bytes that were checked. torch itself checks
nothing: it returns flipped bits as weights, and uninitialised memory for a member that it does not find.
"""

import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from train.errors import first_line
from train.files import open_regular

ZIP64 = b"\x01\x00"  # how the only extra field begins that torch writes: sizes of archives over 4 GB
MAX_VALUES = 2_000_000
MAX_TUPLES = 50_000  # in one pickle: if each one holds the next, hashing more of them overflows the stack


def load_archive(path: Path, *, verify: bool = True) -> object:
    """What torch.save wrote to `path`: tensors on the CPU, plain values, and dicts, lists and tuples of those.

    Every byte is verified. verify=False: none is, and no weight is read where the file can be mapped. OSError if the
    file cannot be opened, ValueError if it is not a whole archive.
    """
    with open_regular(path) as file:  # once: a save may replace the name between the check and the load
        try:
            with zipfile.ZipFile(file) as archive:
                members = _members(archive)
                if verify and (name := archive.testzip()):
                    raise ValueError(f"its member {name} does not have its CRC")
            if not verify:  # torch maps by name alone, which must be UTF-8; some file systems map nothing
                with suppress(UnicodeEncodeError, RuntimeError):
                    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            file.seek(0)
            raw = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
            if not verify:
                return raw
            storages = {storage.data_ptr(): storage for storage in _storages(raw)}  # tied weights share one
            for storage in storages.values():
                sizes = [member.CRC for member in members if member.file_size == storage.nbytes()]
                if not sizes or zlib.crc32(torch.empty(0, dtype=torch.uint8).set_(storage).numpy()) not in sizes:
                    raise ValueError("torch does not read the bytes that the archive holds")
        except Exception as error:  # whatever a damaged or foreign file makes zipfile and torch raise
            found = re.search(r"GLOBAL (\S+)", str(error))  # the one useful word of a page of advice
            why = f"it holds {found[1]}, more than tensors and plain values" if found else first_line(error)
            raise ValueError(f"is no checkpoint, or a damaged one: {why}") from error
    return raw


def _members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The members of the archive. ValueError unless they are as torch.save writes them, and their pickle can be read
    without overflowing the stack."""
    members = archive.infolist()
    for member in members:
        packed = member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size
        # Where these are set, torch's reader and Python's may see different files.
        if packed or member.external_attr or member.internal_attr or member.extra[:2] not in (b"", ZIP64):
            raise ValueError(f"its member {member.filename} is packed or marked, as torch.save never does")
        if member.filename.endswith("/data.pkl"):
            codes = pickletools.genops(archive.read(member))
            if sum(code.name.startswith("TUPLE") for code, *_ in codes) > MAX_TUPLES:
                raise ValueError(f"its pickle has more than {MAX_TUPLES:,} tuples")
    return members


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    """Of every tensor in nested dicts, lists and tuples. ValueError for lists that hold themselves, or others so often
    that nobody could print them."""
    waiting, visited = [tree], 0
    while waiting:
        item, visited = waiting.pop(), visited + 1
        if visited > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES:,} values")
        if isinstance(item, torch.Tensor):
            yield item.untyped_storage()
        elif isinstance(item, dict | list | tuple):
            waiting += [*item, *item.values()] if isinstance(item, dict) else item
