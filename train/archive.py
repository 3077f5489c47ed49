"""torch's zip archives, read with care: others may have made them, or a disk damaged them.

A load first checks every CRC. Then it checks that torch has read the bytes that were checked. torch itself checks
nothing: it returns flipped bits as weights, and uninitialised memory for a member that it does not find.
"""

import re
import zipfile
import zlib
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from train.errors import first_line
from train.files import open_regular


def load_archive(path: Path) -> object:
    """What torch.save wrote to `path`: tensors on the CPU, plain values, and dicts, lists and tuples of those.

    Every byte is verified. OSError if the file cannot be opened, ValueError if it is not a whole archive.
    """
    with open_regular(path) as file:  # once: a save may replace the name between the check and the load
        try:
            with zipfile.ZipFile(file) as archive:
                known = {(member.file_size, member.CRC) for member in archive.infolist()}
                if name := archive.testzip():
                    raise ValueError(f"its member {name} does not have its CRC")
            file.seek(0)
            raw = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
            storages = [leaf.untyped_storage() for leaf in tree_leaves(raw) if isinstance(leaf, torch.Tensor)]
            for storage in {storage.data_ptr(): storage for storage in storages}.values():  # tied weights share one
                content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
                if (storage.nbytes(), zlib.crc32(content)) not in known:
                    raise ValueError("torch does not read the bytes that the archive holds")
        except Exception as error:  # whatever a damaged or foreign file makes zipfile and torch raise
            found = re.search(r"GLOBAL (\S+)", str(error))  # the one useful word of a page of advice
            why = f"it holds {found[1]}, more than tensors and plain values" if found else first_line(error)
            raise ValueError(f"is no checkpoint, or a damaged one: {why}") from error
    return raw
