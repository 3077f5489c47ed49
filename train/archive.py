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
from pickle import UnpicklingError
from typing import BinaryIO

import torch

from train.errors import first_line
from train.files import open_regular
from train.metapickle import check_pickle


def load_archive(path: Path) -> object:
    """What torch.save wrote to `path`: tensors on the CPU, plain values, and dicts, lists and tuples of those.

    Every byte is verified. OSError if the file cannot be opened, ValueError if it is not a whole archive.
    """
    with open_regular(path) as file:  # once: a save may replace the name between the check and the load
        members = _verify(file)
        file.seek(0)
        try:
            raw = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
        except UnpicklingError as error:
            what = re.search(r"GLOBAL (\S+)", str(error))  # the one useful word of a page of advice
            more = "it holds more than tensors and plain values" + (f" ({what[1]})" if what else "")
            raise ValueError(f"is not loaded: {more}") from error
        except Exception as error:  # whatever a foreign zip archive makes torch raise
            raise ValueError(f"is not a checkpoint that torch can read ({first_line(error)})") from error
    _check_read(raw, members)
    return raw


def glance(path: Path) -> object:
    """As `load_archive`, but no weight is read, and no CRC is checked. Raises whatever torch and zipfile do."""
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        _check_members(archive, os.fstat(file.fileno()).st_size)
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


def _verify(file: BinaryIO) -> list[zipfile.ZipInfo]:
    """The members of `file`. ValueError unless it is a zip archive as torch.save writes it, and all CRCs are right."""
    start, length = file.read(4), file.seek(0, os.SEEK_END)
    try:
        if not zipfile.is_zipfile(file):  # looks for the directory at the end
            damage = f"cut short: the directory at the end of its zip archive is missing ({length} bytes)"
            if start != b"PK\x03\x04":
                damage = f"not a checkpoint: {length} bytes, but not the zip archive that torch.save writes"
        else:
            with zipfile.ZipFile(file) as archive:
                _check_members(archive, length)
                name = archive.testzip()
            if name is None:
                return archive.infolist()
            damage = f"damaged: its member {name} does not have its CRC"
    except Exception as error:  # zipfile raises half a dozen kinds, depending on the field that is hit
        damage = f"damaged ({first_line(error)})"
    raise ValueError(f"is {damage}")


def _check_members(archive: zipfile.ZipFile, length: int) -> None:
    """ValueError for members that could fill the memory or overflow the stack. length: the file's, in bytes."""
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > length:
            raise ValueError(f"its member {member.filename} is packed, which torch.save never does")
        if member.filename.endswith("/data.pkl"):
            check_pickle(archive.read(member))


def _check_read(raw: object, members: list[zipfile.ZipInfo]) -> None:
    """ValueError unless the bytes of every tensor that torch read are those of a member that was verified."""
    for member in members:
        # torch.save writes none of these. Where they are set, torch's reader and Python's may see different files.
        if member.external_attr or member.internal_attr or member.extra:
            raise ValueError(f"is damaged: its member {member.filename} has attributes that torch.save does not write")
    known = {(member.file_size, member.CRC) for member in members}
    seen = set()
    for place, value in leaves(raw):
        if not isinstance(value, torch.Tensor):
            continue
        if value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(f"is not loaded: {place} is a {value.layout} tensor on {value.device}, not a plain one")
        storage = value.untyped_storage()
        if storage.data_ptr() in seen:
            continue
        seen.add(storage.data_ptr())
        content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        if (storage.nbytes(), zlib.crc32(content)) not in known:
            raise ValueError(f"is damaged: torch does not read the bytes of {place} that the archive holds")
