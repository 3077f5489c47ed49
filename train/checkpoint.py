"""Checkpoints: the latest state of a run, `out_dir/ckpt.pt`; its best one, if that is another; what is in them.

A save in six moves. Whichever a kill interrupts, each name is the old file or the new one, whole:

    1. write the new file in a folder .staging-<random>, fsync it
    2. shift ckpt-previous-1.pt to ckpt-previous-2.pt, and so on
    3. give ckpt.pt the second name ckpt-previous-1.pt (a hard link: ckpt.pt itself never vanishes)
    4. if ckpt.pt is the best state so far and the new one is not, give it the name ckpt-best.pt too
    5. rename the new file to ckpt.pt, which replaces the old one in one step; fsync the folder, so that the names
       survive a power cut too
    6. delete the oldest, so that there are `keep` again, and a ckpt-best.pt that the new ckpt.pt is better than

`resume` goes on from the latest. Who reads weights, to sample or to export, takes the best: see `best_of`.

A load checks every CRC first, and then that torch has read what was checked. torch checks nothing: it hands out flipped
bits as weights, and uninitialised memory where it finds no member.

The file holds nanoGPT's six keys, so that either program reads the other's, and one of ours:

    model          {parameter name: tensor}, without the prefixes of torch.compile and DDP
    optimizer      AdamW.state_dict(): first the group of tensors with 2 or more dimensions, then the others
    model_args     the seven arguments of nanoGPT's GPTConfig, no more and no fewer
    iter_num       optimizer steps done
    best_val_loss  float
    config         {setting: value} of the run
    nanofuse       what nanoGPT has no place for (absent in nanoGPT's own files, {} once read)

Everything is a tensor, a plain value, or a list, tuple or dict of those, so that both programs read it with
torch.load(weights_only=True), which runs no code.
"""

import errno
import os
import re
import shlex
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO, NamedTuple

import torch

from train.errors import UserError, first_line, shown
from train.files import open_regular, staging_folder, sync, sync_folder
from train.metapickle import check_pickle

KEYS = ("model", "optimizer", "model_args", "iter_num", "best_val_loss", "config")
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
OURS = {"gelu": str, "tokenizer": dict, "scaler": dict, "stale_evals": int, "judged_at": int}  # in "nanofuse"
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter, beside its count of steps

_WRAPPERS = re.compile(r"^(?:(?:_orig_mod|module)\.)+")  # torch.compile's and DDP's
_MASK = re.compile(r"\.attn\.bias$")  # the causal mask, a 4-D buffer of nanoGPT's where it has no flash attention

LATEST, BEST = "ckpt.pt", "ckpt-best.pt"
_PREVIOUS = "ckpt-previous-{}.pt"
_OF_A_RUN = ("ckpt*.pt", "metrics.jsonl", "loss.png", "loss.svg", "tensorboard", "trace.json")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class Held(NamedTuple):
    """What a checkpoint file says of itself."""

    iter_num: int
    best_val_loss: float


def save(out_dir: Path, checkpoint: dict, keep: int, *, best: bool = False, keep_best: bool = False) -> None:
    """Write `out_dir/ckpt.pt` and, of those before it, keep `keep` - 1: ckpt-previous-1.pt is the newest.

    best: `checkpoint` is the best state so far. keep_best: the ckpt.pt that it replaces is.

    Raises UserError where the disk is full or out_dir cannot be written; the old one is then untouched.
    """
    if keep < 1:
        raise ValueError(f"keep must be 1 or more, not {keep}")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with staging_folder(out_dir) as staging:
            with open(staging / LATEST, "wb") as file:
                torch.save(checkpoint, file)
                sync(file)
            if keep > 1:
                _keep_previous(out_dir, staging, keep)
            if keep_best:
                _name_also(out_dir / LATEST, staging, out_dir / BEST)
            os.replace(staging / LATEST, out_dir / LATEST)
            sync_folder(out_dir)
        for index, path in _previous(out_dir):
            if index >= keep:
                path.unlink()
        if best:
            (out_dir / BEST).unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None:
            raise  # not the disk's doing
        raise UserError(_why_not_saved(out_dir, checkpoint, cause)) from error


def load(path: Path) -> dict:
    """The checkpoint at `path`, ours or nanoGPT's, as `unpack` lays it out, its tensors on the CPU.

    Raises UserError where there is none, or none that is whole, and offers the newest previous one that is.
    """
    try:
        return _read(path)
    except FileNotFoundError:
        problem = f"init_from=resume: there is no {path}; out_dir={path.parent} should be an earlier run's"
    except OSError as error:
        problem = f"{path} cannot be read ({error.strerror})"
    except ValueError as error:
        problem = f"{path} {error}"
    raise UserError(problem + _offer(path))


def named(init_from: str) -> Path | None:
    """The checkpoint that `init_from` names by its path or its folder's, of a folder the best one; None where it names
    something else."""
    path = Path(init_from)
    if os.path.isfile(path / LATEST) and not os.path.isfile(path / "model.safetensors"):
        return best_of(path)
    return path if path.suffix == ".pt" and os.path.isfile(path) else None


def best_of(out_dir: Path) -> Path:
    """The checkpoint to read weights from: ckpt-best.pt, but ckpt.pt if it is the best itself, or none is."""
    best, latest = held(out_dir / BEST), held(out_dir / LATEST)
    return out_dir / (BEST if best and latest and best.best_val_loss <= latest.best_val_loss else LATEST)


def held(path: Path) -> Held | None:
    """What the checkpoint at `path` says of itself, None where there is none. It is not verified: no weight is read."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            _check_members(archive, os.fstat(file.fileno()).st_size)
            _check_pickle(archive)
        found = unpack(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception:  # no file, a damaged one, a foreign one: all that torch raises
        return None
    return Held(found["iter_num"], found["best_val_loss"])


def set_best_aside(out_dir: Path) -> Path | None:
    """Keep the best checkpoint in a new folder, as `set_aside` does, before others take its place."""
    try:
        if best_of(out_dir).name == LATEST:
            with staging_folder(out_dir) as staging:
                _name_also(out_dir / LATEST, staging, out_dir / BEST)
    except OSError as error:
        raise UserError(f"out_dir={out_dir}: {BEST} could not be written ({error})") from error
    return set_aside(out_dir, (BEST,))


def set_aside(out_dir: Path, patterns: Iterable[str] = _OF_A_RUN) -> Path | None:
    """Move an earlier run's checkpoints, metrics and curve into a new folder `out_dir/earlier-<date>-<time>`.

    patterns: of the names to move. Returns that folder, or None where there was nothing to move.
    """
    files = [path for pattern in patterns for path in sorted(out_dir.glob(pattern)) if not path.is_dir()]
    if not files:
        return None
    stem = f"earlier-{datetime.now():%Y%m%d-%H%M%S}"
    folder, count = out_dir / stem, 1
    try:
        while folder.exists():
            count += 1
            folder = out_dir / f"{stem}-{count}"
        folder.mkdir()
        for path in files:
            path.rename(folder / path.name)
    except OSError as error:
        raise UserError(f"out_dir={out_dir}: the earlier run in it could not be set aside ({error})") from error
    return folder


# Reading


def _read(path: Path) -> dict:
    """The checkpoint at `path`. OSError where it cannot be opened, ValueError where it is not a whole one."""
    if os.path.isdir(path):
        raise ValueError("is a folder, not a checkpoint")
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
    try:
        return unpack(raw)
    except ValueError as error:
        raise ValueError(f"is not a GPT's checkpoint: {error}") from error


def _verify(file: BinaryIO) -> list[zipfile.ZipInfo]:
    """The members of `file`. ValueError unless it is a zip archive, as torch.save writes, and all have their CRC."""
    start = file.read(4)
    try:
        whole = zipfile.is_zipfile(file)  # looks for the directory at the end
    except Exception as error:
        raise ValueError(f"is damaged ({first_line(error)})") from error
    if not whole:
        length = file.seek(0, os.SEEK_END)
        if start == b"PK\x03\x04":
            raise ValueError(f"is cut short: the directory at the end of its zip archive is missing ({length} bytes)")
        raise ValueError(f"is not a checkpoint: {length} bytes, but not the zip archive that torch.save writes")
    try:
        with zipfile.ZipFile(file) as archive:
            _check_members(archive, file.seek(0, os.SEEK_END))
            damaged = archive.testzip()
            if damaged is None:
                _check_pickle(archive)
    except Exception as error:  # zipfile raises half a dozen kinds, depending on the field that is hit
        raise ValueError(f"is damaged ({first_line(error)})") from error
    if damaged is not None:
        raise ValueError(f"is damaged: its member {damaged} does not have its CRC")
    return archive.infolist()


def _check_members(archive: zipfile.ZipFile, length: int) -> None:
    """ValueError for a member that is packed, and could fill the memory. length: of the file, in bytes."""
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > length:
            raise ValueError(f"its member {member.filename} is packed, which torch.save never does")


def _check_pickle(archive: zipfile.ZipFile) -> None:
    """ValueError for an archive whose pickle would take all memory, or overflow the stack."""
    for member in archive.infolist():
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


def _offer(path: Path) -> str:
    others = [previous for _, previous in _previous(path.parent)]
    for other in [path.with_name(LATEST), *others, path.with_name(BEST)]:
        if other.name == path.name:
            continue
        try:
            iteration = _read(other)["iter_num"]
        except (OSError, ValueError):
            continue
        if path.name == BEST:
            move, then = shlex.join(["mv", str(path), f"{path}.damaged"]), f"{other.name} is read instead"
        else:
            move, then = shlex.join(["mv", str(other), str(path)]), "resume again"
        which = {LATEST: "the latest one", BEST: "the best one"}.get(other.name, "the one before it")
        return f"; {which}, of iteration {iteration}, is whole: `{move}`, then {then}"
    return ""


# Writing


def _keep_previous(out_dir: Path, staging: Path, keep: int) -> None:
    """Moves 2 and 3. The oldest becomes one too many: it goes when the new file stands."""
    latest, first = out_dir / LATEST, out_dir / _PREVIOUS.format(1)
    if not latest.exists():
        return
    if first.exists() and first.samefile(latest):
        return  # a save killed between moves 3 and 5 did this already
    # Only up to the first gap, which a save killed within move 2 leaves: none is to be pushed out early.
    vacant = next((i for i in range(1, keep) if not (out_dir / _PREVIOUS.format(i)).exists()), keep)
    for i in range(vacant, 1, -1):
        os.replace(out_dir / _PREVIOUS.format(i - 1), out_dir / _PREVIOUS.format(i))
    _name_also(latest, staging, first)


def _name_also(path: Path, staging: Path, name: Path) -> None:
    """Have the file `path` under `name` too: a hard link, or a copy on a file system without them."""
    second = staging / "second"
    try:
        os.link(path, second)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with path.open("rb") as source, second.open("wb") as copy:
            shutil.copyfileobj(source, copy)
            sync(copy)
    os.replace(second, name)


def _previous(out_dir: Path) -> list[tuple[int, Path]]:
    """(index, path) of every ckpt-previous-<index>.pt, the newest first."""
    found = ((re.fullmatch(r"ckpt-previous-(\d+)\.pt", path.name), path) for path in out_dir.glob("ckpt-previous-*"))
    return sorted((int(match[1]), path) for match, path in found if match)


# What went wrong


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind `error`: torch's writer raises a RuntimeError of its own over the file's."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _why_not_saved(out_dir: Path, checkpoint: dict, error: OSError) -> str:
    path = out_dir / LATEST
    left = f"{path} is still whole" if path.is_file() else f"there is no {path}"
    if error.errno not in _NO_ROOM:
        return f"out_dir={out_dir}: the checkpoint could not be written ({error}); {left}"
    storages = (value.untyped_storage() for _, value in leaves(checkpoint) if isinstance(value, torch.Tensor))
    needed = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())  # tied weights count once
    free = shutil.disk_usage(out_dir).free
    return (
        f"out_dir={out_dir}: no room for the checkpoint: it needs {needed / 1e6:.2f} MB, "
        f"{free / 1e6:.2f} MB are free ({error.strerror}); {left}"
    )


# What is in the file


def pack(
    model_state: dict[str, torch.Tensor],
    optimizer_state: dict,
    model_args: dict[str, int | float | bool],
    iter_num: int,
    best_val_loss: float,
    config: dict,
    extra: dict,
) -> dict:
    """The dict to save. Its tensors are those passed in, not copies.

    model_state and optimizer_state are what `state_dict()` gives; extra becomes the key "nanofuse".
    Raises ValueError for anything that `load` would refuse: now, while the run still lives.
    """
    # How this process ran AdamW (in a CUDA graph, its rate in a tensor) must not bind the one that resumes:
    # nanoGPT takes both over from the file, and `capturable` fails on a CPU.
    groups = [
        {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in group.items()} | {"capturable": False}
        for group in optimizer_state["param_groups"]
    ]
    for name, tree in (("optimizer", groups), ("config", config), ("nanofuse", extra)):
        for place, value in leaves(tree, name):
            if value is not None and type(value) not in (bool, int, float, str, torch.Tensor):
                raise ValueError(f"{place} is a {type(value).__name__}, not a tensor or a plain value")
    return unpack(
        {
            "model": model_state,
            "optimizer": {"state": optimizer_state["state"], "param_groups": groups},
            "model_args": model_args,
            "iter_num": iter_num,
            "best_val_loss": best_val_loss,
            "config": config,
            "nanofuse": extra,
        }
    )


def unpack(raw: object) -> dict:
    """What torch.load returned, checked, in the layout above. ValueError says what is wrong with it."""
    if not isinstance(raw, dict):
        raise ValueError(f"it holds a {type(raw).__name__}, not a dict")
    if missing := [key for key in KEYS if key not in raw]:
        raise ValueError(f"it has no {', '.join(missing)}")
    best = raw["best_val_loss"]
    if isinstance(best, torch.Tensor) and best.numel() == 1:
        best = best.item()  # as nanoGPT keeps it
    if type(best) not in (int, float):
        raise ValueError(f"its best_val_loss is a {type(best).__name__}, not a number")
    if type(raw["iter_num"]) is not int or raw["iter_num"] < 0:
        raise ValueError(f"its iter_num is {raw['iter_num']!r}, not a count of iterations")
    ours = raw.get("nanofuse", {})
    if not isinstance(raw["config"], dict) or not isinstance(ours, dict):
        raise ValueError("its config or nanofuse is not a dict")
    for key, kind in OURS.items():
        if type(ours.get(key, kind())) is not kind:
            raise ValueError(f"its {key} is {shown(ours[key])}, not a {kind.__name__}")
    return {
        "model": _model(raw["model"]),
        "optimizer": _optimizer(raw["optimizer"]),
        "model_args": _model_args(raw["model_args"]),
        "iter_num": raw["iter_num"],
        "best_val_loss": float(best),
        "config": raw["config"],
        "nanofuse": ours,
    }


def leaves(tree: object, place: str = "") -> Iterator[tuple[str, object]]:
    """(place, value) of everything in nested dicts, lists and tuples that is none of them, the keys included."""
    if isinstance(tree, dict):
        for key, item in tree.items():
            yield f"a key of {place}", key
            yield from leaves(item, f"{place}[{key!r}]")
    elif isinstance(tree, list | tuple):
        for index, item in enumerate(tree):
            yield from leaves(item, f"{place}[{index}]")
    else:
        yield place, tree


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Give an AdamW the step counts and moments of `state`, a checkpoint's "optimizer".

    The rate, betas and decay stay this run's; fused, foreach and capturable this device's;
    load_state_dict alone takes them from the file. Tensors that need no cast or move are not copied.
    Raises UserError where its parameters are not those of the checkpoint, in number or shape.
    """

    def parameters(groups: list[dict]) -> Iterator:
        return chain.from_iterable(group["params"] for group in groups)

    own = optimizer.state_dict()["param_groups"]
    here, there = ([str(len(group["params"])) for group in groups] for groups in (own, state["param_groups"]))
    if here != there:
        raise UserError(
            f"init_from=resume: the optimizer of the checkpoint has groups of {' and '.join(there)} tensors, "
            f"this model's {' and '.join(here)}"
        )
    moments = {}
    if state["state"]:  # empty when no step had been taken
        matched = map(parameters, (optimizer.param_groups, own, state["param_groups"]))
        for param, new_id, old_id in zip(*matched, strict=True):
            moments[new_id] = _moments(state["state"].get(old_id), param, new_id)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": moments, "param_groups": own})
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)  # load_state_dict copies them, and a rate in a tensor must stay that very tensor


def _model(raw: object) -> dict[str, torch.Tensor]:
    if not isinstance(raw, dict) or not raw:
        raise ValueError("its model is not a dict of tensors")
    for name, tensor in raw.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"its model has {name!r}, a {type(tensor).__name__}, not a named tensor")
    return {_WRAPPERS.sub("", k): v for k, v in raw.items() if not (_MASK.search(k) and v.ndim == 4)}


def _optimizer(raw: object) -> dict:
    groups = raw.get("param_groups") if isinstance(raw, dict) else None
    if not (
        isinstance(groups, list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
        and isinstance(raw.get("state"), dict)
    ):
        raise ValueError("its optimizer is not the state of a torch optimizer")
    return raw


def _model_args(raw: object) -> dict[str, int | float | bool]:
    if not isinstance(raw, dict) or set(raw) != set(MODEL_ARGS):
        came = ", ".join(map(str, raw)) if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"its model_args are {came}, those of a GPT {', '.join(MODEL_ARGS)}")
    for key, value in raw.items():
        fits = type(value) is int and value > 0
        if key == "bias":
            fits = type(value) is bool
        if key == "dropout":
            fits = type(value) in (int, float) and 0 <= value <= 1
        if not fits:
            raise ValueError(f"its {key} is {shown(value)}")
    return {key: raw[key] for key in MODEL_ARGS}


def _moments(entry: object, param: torch.Tensor, index: int) -> dict[str, torch.Tensor]:
    saved = f"init_from=resume: the optimizer of the checkpoint has for its tensor {index}"
    if not isinstance(entry, dict) or not entry.keys() >= {"step", *MOMENTS}:
        raise UserError(f"{saved} no step, {' and '.join(MOMENTS)}: it is not an AdamW's")
    for key in MOMENTS:
        moment = entry[key]
        if not (isinstance(moment, torch.Tensor) and moment.is_floating_point() and moment.layout == torch.strided):
            raise UserError(f"{saved} {shown(moment)} as {key}, expected a tensor of floats")
        if moment.shape != param.shape:
            raise UserError(f"{saved} the shape {list(moment.shape)}, this model {list(param.shape)}")
        if moment.is_meta or moment.numel() * moment.element_size() > moment.untyped_storage().nbytes():
            raise UserError(f"{saved} {key} without all its values")
    # A number or a tensor, as the AdamW of the file had it; load_state_dict moves it where this one wants it.
    step = entry["step"]
    if isinstance(step, torch.Tensor) and step.numel() == 1 and not step.is_meta:
        step = step.item()
    if type(step) not in (int, float) or not 0 <= step < 1e15:
        raise UserError(f"{saved} {shown(step)} as step, expected a count of steps")
    step = torch.tensor(float(step), dtype=torch.float32)
    return {"step": step, **{key: entry[key] for key in MOMENTS}}
