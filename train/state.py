"""The state of a run: model, optimizer, loss scale and progress. Training changes it; a checkpoint holds it.

A resumed run compares its losses with best_val_loss, as long as both are of the same data and a file holds the state
that had it: see `resumed_progress`.
"""

import dataclasses
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from model import GPT
from model.pretrained import from_checkpoint, load_gpt2
from train import checkpoint as checkpoints
from train.checkpoint import MODEL_ARGS, MOMENTS
from train.distributed import World
from train.errors import UserError
from train.optim import FlatAdamW, LossScale, Optimizer
from train.plan import Plan, weights_wanted


@dataclass
class Progress:
    """How far a run has come. A checkpoint holds this besides weights and moments."""

    iter_num: int = 0  # updates done
    best_val_loss: float = 1e9
    best_iter: int = -1  # iteration of the best loss; -1: there is none
    stale_evals: int = 0  # evaluations since the best one
    judged_at: int = -1  # iteration of the last evaluation that counted: a resumed run only shows it again


@dataclass
class TrainState:
    """The state of a run. `step.py` and `loop.py` change it, `save` writes it."""

    plan: Plan
    model: GPT  # its parameters are on the device; if sharded, only this rank's share
    optimizer: Optimizer
    scaler: LossScale
    progress: Progress
    saved_iter: int = -1  # iteration of the state in ckpt.pt; -1: there is none of this run
    other_data: bool = False  # the checkpoint's best loss was of other data

    def save(self) -> None:
        """Write a checkpoint of the current state. Every rank must call it; the master writes."""
        plan, progress = self.plan, self.progress
        if not (plan.sharded or plan.world.master):
            return
        weights, moments = self._whole()
        if plan.world.master:
            checkpoint = {
                "model": weights,
                "optimizer": moments,
                "model_args": {name: getattr(self.model.config, name) for name in MODEL_ARGS},
                "iter_num": progress.iter_num,
                "best_val_loss": progress.best_val_loss,
                "config": dataclasses.asdict(plan.config),
                "nanofuse": {
                    "gelu": self.model.config.gelu,
                    "tokenizer": plan.tokenizer,
                    "val_data": plan.dataset.fingerprint(),
                    "best_iter": progress.best_iter,
                    "scaler": self.scaler.state_dict(),
                    "stale_evals": progress.stale_evals,
                    "judged_at": progress.judged_at,
                },
            }
            # interrupted where an evaluation was due, and resumed: saved again, now with its loss
            again = self.saved_iter == progress.iter_num and not self.other_data
            checkpoints.save(Path(plan.config.out_dir), checkpoint, plan.config.keep_checkpoints, again=again)
            self.saved_iter = progress.iter_num

    def _whole(self) -> tuple[dict, dict]:
        """The state_dicts of model and optimizer. If sharded, the master gets whole tensors, the others None."""
        if not self.plan.sharded:
            return self.model.state_dict(), self.optimizer.state_dict()
        from train import shard

        keep = self.plan.world.master
        return shard.whole_model(self.model, keep=keep), shard.whole(self.optimizer.state_dict(), keep=keep)


def make_state(plan: Plan, checkpoint: dict | None) -> TrainState:
    """A new run's state, or the checkpoint's. UserError if weights or moments cannot be loaded, and on a rank that has
    read another checkpoint or dataset than rank 0."""
    check_ranks(plan, checkpoint)
    model = build_model(plan, checkpoint)
    scaler = LossScale(plan.device, enabled=plan.precision.compute == torch.float16)
    state = TrainState(plan, model, place(plan, model), scaler, Progress())
    if checkpoint is not None and plan.config.init_from == "resume":
        load_optimizer(state.optimizer, cropped(checkpoint, model.config.block_size))
        ours = checkpoint["nanofuse"]
        if state.scaler.enabled and ours.get("scaler"):
            state.scaler.load_state_dict(ours["scaler"])
        progress, line = resumed_progress(plan, checkpoint)
        state.progress = shared_progress(progress, plan.world)
        state.saved_iter, state.other_data = checkpoint["iter_num"], bool(changes(plan, checkpoint))
        plan.lines.append(line)
    elif checkpoint is not None:
        plan.lines.append(f"weights of {checkpoints.named(plan.config.init_from)}, iteration {checkpoint['iter_num']}")
    return state


def check_ranks(plan: Plan, checkpoint: dict | None) -> None:
    """UserError on a rank that has read other files than rank 0: on another machine, or before a run replaced them."""
    config, data = plan.config, plan.dataset
    if checkpoint is not None:
        iter_num, ours = checkpoint["iter_num"], checkpoint["nanofuse"]
        known = iter_num, checkpoint["best_val_loss"], ours.get("best_iter"), ours.get("judged_at")
        plan.world.check_alike(f"init_from={config.init_from}: got a checkpoint of iteration {iter_num}", *known)
    tokens = len(data.train), data.fingerprint()
    plan.world.check_alike(f"dataset={config.dataset}: got {tokens[0]:,} tokens to train on, {tokens[1]}", *tokens)


def shared_progress(progress: Progress, world: World) -> Progress:
    """Rank 0's progress. Only rank 0 writes files, so that another machine may lack ckpt-best.pt."""
    fields = dataclasses.fields(Progress)
    values = world.from_master(*dataclasses.astuple(progress))
    return Progress(*(type(field.default)(value) for field, value in zip(fields, values, strict=True)))


def resumed_progress(plan: Plan, checkpoint: dict) -> tuple[Progress, str]:
    """(how far the resumed run has come, a message). The best loss is that of ckpt-best.pt or of ckpt.pt itself.

    The best loss and patience start again if the data or block_size changed, or if no file holds the best state.
    """
    ours, iter_num, best = checkpoint["nanofuse"], checkpoint["iter_num"], checkpoint["best_val_loss"]
    out_dir = Path(plan.config.out_dir)
    line = f"resumed from {out_dir / checkpoints.LATEST}, iteration {iter_num}; best validation loss"
    if changed := changes(plan, checkpoint):
        return Progress(iter_num), f"{line} starts again: {' and '.join(changed)} changed"
    # nanoGPT saves right after an evaluation. It does not count evaluations without improvement.
    stale_evals, judged_at = ours.get("stale_evals", 0), ours.get("judged_at", iter_num)
    best_only = checkpoint["config"].get("always_save_checkpoint") is False  # then nanoGPT's file is its best one
    best_iter = ours.get("best_iter", iter_num if best_only else -1)
    there = checkpoints.held(out_dir / checkpoints.BEST)
    if there and there.best_val_loss <= best:
        best_iter, best = there
        line += f" {best:.4f}, of iteration {best_iter}"
        # Where an earlier checkpoint was put back, a run comes to this iteration again, with other weights.
        best_iter = best_iter if best_iter < iter_num else -1
        return Progress(iter_num, best, best_iter, stale_evals, judged_at), line
    if best_iter not in (0, iter_num):  # iteration 0 is never saved
        return Progress(iter_num), f"{line} starts again: no file holds the best state"
    return Progress(iter_num, best, best_iter, stale_evals, judged_at), f"{line} {best:.4f}, of iteration {best_iter}"


def changes(plan: Plan, checkpoint: dict) -> list[str]:
    """What changed between the checkpoint and `plan`, so that their validation losses cannot be compared."""
    before = checkpoint["nanofuse"].get("val_data")
    if before is None:
        data = checkpoint["config"].get("dataset", plan.config.dataset) != plan.config.dataset
    else:
        data = before != plan.dataset.fingerprint()
    block_size = checkpoint["model_args"]["block_size"] != plan.shape.block_size
    return ["dataset"] * data + ["block_size"] * block_size


def build_model(plan: Plan, checkpoint: dict | None) -> GPT:
    """A new model, OpenAI's or the checkpoint's, on the host, in float32. UserError if weights cannot be loaded."""
    config, shape = plan.config, plan.shape
    options = {"precision": plan.precision, "attention": plan.attention, "recompute": config.recompute}
    if config.init_from == "scratch":
        torch.manual_seed(config.seed)
        return GPT(shape, plan.ops, **options)
    with weights_wanted(config):
        if checkpoint is not None:
            model = from_checkpoint(checkpoint, plan.ops, dropout=config.dropout, **options)
        else:
            model = load_gpt2(config.init_from, plan.ops, dropout=config.dropout, gelu=shape.gelu, **options)
    if shape.block_size < model.config.block_size:
        model.crop_block_size(shape.block_size)
    return model


def place(plan: Plan, model: GPT) -> Optimizer:
    """Move `model`, or this rank's share of it, from the host to the device. Returns its optimizer."""
    config = plan.config
    settings = {
        "learning_rate": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "weight_decay": config.weight_decay,
    }
    if plan.sharded:
        from train import shard  # imported here: its imports take a second

        shard.share_out(model, plan.world, plan.device)
        return shard.ShardedAdamW(model, **settings)
    model.to(plan.device)
    return FlatAdamW(model, plan.ops, **settings, several=config.gradient_accumulation_steps > 1)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Give an AdamW the step counts and moments of `state`, a checkpoint's "optimizer".

    The rate, betas and decay stay this run's; fused, foreach and capturable this device's. UserError if the number or
    the shapes of its parameters are not the checkpoint's, or if the checkpoint has no moments for them.
    """
    own = optimizer.state_dict()["param_groups"]
    here, there = ([str(len(group["params"])) for group in groups] for groups in (own, state["param_groups"]))
    if here != there:
        raise UserError(
            f"init_from=resume: the optimizer of the checkpoint has groups of {' and '.join(there)} tensors, "
            f"this model's {' and '.join(here)}"
        )
    moments = {}
    if state["state"]:  # empty when no step had been taken
        ids = chain.from_iterable(group["params"] for group in state["param_groups"])
        params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        pairs = enumerate(zip(ids, params, strict=True))
        moments = {i: _moments(state["state"].get(old), p, i) for i, (old, p) in pairs}
    optimizer.load_state_dict({"state": moments, "param_groups": own})


def _moments(entry: object, param: torch.Tensor, index: int) -> dict[str, torch.Tensor]:
    """`entry`, an AdamW's state of `param` in a checkpoint, checked. UserError if it is anything else."""

    def fits(moment: object) -> bool:
        dense = isinstance(moment, torch.Tensor) and moment.layout == torch.strided and not moment.is_meta
        return dense and moment.is_floating_point() and moment.shape == param.shape

    found = entry if isinstance(entry, dict) else {}
    step = found.get("step")  # a number or a tensor, as the AdamW of the file had it
    if isinstance(step, torch.Tensor) and step.numel() == 1 and not step.is_meta:
        step = step.item()
    if type(step) not in (int, float) or not 0 <= step < 1e15 or not all(fits(found.get(key)) for key in MOMENTS):
        raise UserError(
            f"init_from=resume: the optimizer of the checkpoint has for its tensor {index} no count of steps, or no "
            f"floats {' and '.join(MOMENTS)} of the shape {list(param.shape)}: it is not this model's AdamW"
        )
    return {"step": torch.tensor(float(step)), **{key: found[key] for key in MOMENTS}}


def cropped(checkpoint: dict, block_size: int) -> dict:
    """The checkpoint's AdamW state. The moments of its position embeddings are cut to `block_size`, as the weights."""
    state, before = checkpoint["optimizer"], checkpoint["model_args"]["block_size"]
    entry = state["state"].get(1)  # the second tensor, after the embedding of tokens
    if block_size == before or not isinstance(entry, dict):
        return state
    cut = {
        key: value[:block_size] if key in MOMENTS and getattr(value, "shape", ())[:1] == (before,) else value
        for key, value in entry.items()
    }
    return {**state, "state": {**state["state"], 1: cut}}
