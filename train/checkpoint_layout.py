"""What is in a checkpoint: nanoGPT's six keys, so that either program reads the other's, and one of ours.

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

import re
from collections.abc import Iterator
from itertools import chain

import torch

from train.errors import UserError

KEYS = ("model", "optimizer", "model_args", "iter_num", "best_val_loss", "config")
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter, beside its count of steps

_WRAPPERS = re.compile(r"^(?:(?:_orig_mod|module)\.)+")  # torch.compile's and DDP's
_MASK = re.compile(r"\.attn\.bias$")  # the causal mask, a 4-D buffer of nanoGPT's where it has no flash attention


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
            raise ValueError(f"its {key} is {value!r}")
    return {key: raw[key] for key in MODEL_ARGS}


def _moments(entry: object, param: torch.Tensor, index: int) -> dict[str, torch.Tensor]:
    saved = f"init_from=resume: the optimizer of the checkpoint has for its tensor {index}"
    if not isinstance(entry, dict) or not entry.keys() >= {"step", *MOMENTS}:
        raise UserError(f"{saved} no step, {' and '.join(MOMENTS)}: it is not an AdamW's")
    for key in MOMENTS:
        if entry[key].shape != param.shape:
            raise UserError(f"{saved} the shape {list(entry[key].shape)}, this model {list(param.shape)}")
    # A number or a tensor, as the AdamW of the file had it; load_state_dict moves it where this one wants it.
    step = torch.tensor(float(entry["step"]), dtype=torch.float32)
    return {"step": step, **{key: entry[key] for key in MOMENTS}}
