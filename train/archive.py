"""torch's zip archives, read with care: others may have made them, or a disk damaged them.

A load first checks every CRC. Then it checks that torch has read the bytes that were checked. torch itself checks
nothing: it returns flipped bits as weights, and uninitialised memory for a member that it does not find.
"""

import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from train.errors import first_line
from train.files import open_regular


def load_archive(path: Path) -> object:
    """What torch.save wrote to `path`: tensors on the CPU, plain values, and dicts, lists and tuples of those.

    Every byte is verified. OSError if the file cannot be opened, ValueError if it is not a whole archive.
    """
    with open_regular(path) as file:  # once: a save may replace the name between the check and the load
        known = _members(file, verify=True)
        file.seek(0)
        try:
            raw = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        except Exception as error:  # whatever a foreign zip archive makes torch raise
            found = re.search(r"GLOBAL (\S+)", str(error))  # the one useful word of a page of advice
            why = f"it holds {found[1]}, more than tensors and plain values" if found else first_line(error)
            raise ValueError(f"is not loaded: {why}") from error
    seen = set()
    for place, value in leaves(raw):
        if not isinstance(value, torch.Tensor):
            continue
        if value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(f"is not loaded: {place} is a {value.layout} tensor on {value.device}, not a plain one")
        storage = value.untyped_storage()
        if storage.data_ptr() not in seen:  # tied weights share one
            content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            if (storage.nbytes(), zlib.crc32(content)) not in known:
                raise ValueError(f"is damaged: torch does not read the bytes of {place} that the archive holds")
            seen.add(storage.data_ptr())
    return raw


def glance(path: Path) -> object:
    """As `load_archive`, but no weight is read, and no weight's CRC is checked. Raises whatever torch does."""
    with open_regular(path) as file:
        _members(file, verify=False)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def leaves(tree: object, place: str = "") -> Iterator[tuple[str, object]]:
    """(place, value) of every leaf of nested dicts, lists and tuples, and of every key."""
    if isinstance(tree, dict):
        for key, item in tree.items():
            yield f"a key of {place}", key
            yield from leaves(item, f"{place}[{key!r}]")
    elif isinstance(tree, list | tuple):
        for index, item in enumerate(tree):
            yield from leaves(item, f"{place}[{index}]")
    else:
        yield place, tree


def _members(file: BinaryIO, *, verify: bool) -> set[tuple[int, int]]:
    """(size, CRC) of the members of `file`. ValueError unless it is a zip archive as torch.save writes it, with the
    right CRC of its pickle. verify: whether all CRCs must be right."""
    length = file.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            for member in members:
                packed = member.compress_type != zipfile.ZIP_STORED or member.file_size > length
                # Where these are set, torch's reader and Python's may see different files.
                if packed or member.external_attr or member.internal_attr or member.extra:
                    raise ValueError(f"its member {member.filename} is packed or marked, as torch.save never does")
                if member.filename.endswith("/data.pkl"):
                    archive.read(member)  # checks its CRC
            if verify and (name := archive.testzip()):
                raise ValueError(f"its member {name} does not have its CRC")
    except Exception as error:  # zipfile raises half a dozen kinds, depending on the field that is hit
        raise ValueError(f"is no checkpoint, or a damaged one of {length} bytes ({first_line(error)})") from error
    return {(member.file_size, member.CRC) for member in members}
