"""python -m train [presets and config files] [--key=value ...]: parse, build, run."""

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from train.config import TrainConfig, check_each, choose_base, compose, notes, parse
from train.errors import UserError, any_characters, command, ending, first_line, run, safe

if __name__ == "__main__":  # --help and wrong settings end here: importing torch takes seconds
    any_characters()
    with ending():
        check_each(TrainConfig(**parse(sys.argv[1:]).settings))

import torch

from model.work import num_params
from train import checkpoint as checkpoints
from train.compile import model_to_train, uncompile
from train.data import Loader
from train.distributed import local_device, process_group, world_from_environment
from train.files import owned
from train.graph import GraphedStep
from train.hardware import device_name, memory_suffices, resolve_device, use_device
from train.log import RunLog, check_sinks, say
from train.loop import Loop
from train.plan import choose_graphs, decide
from train.plot import plot_run
from train.profile import ProfiledStep
from train.sample import SampleConfig, example_start, sample_text
from train.state import TrainState, make_state
from train.step import TrainStep

LESS = "a smaller --batch_size, --recompute=block and --loss_chunk=4096 need less"


def main() -> int:
    parsed = parse(sys.argv[1:])
    named = TrainConfig(**parsed.settings)  # what was not named has its plain default
    rehearsal = bool(named.rehearse)  # a rehearsal: all is checked, nothing is trained
    device = None if rehearsal else resolve_device(named.device)
    world = world_from_environment()
    resumed = named.init_from == "resume"
    with ExitStack() as stack:
        checkpoint = stored = None
        if resumed:
            out_dir = Path(named.out_dir)
            if world.master and not rehearsal and not named.eval_only and os.path.isdir(out_dir):
                stack.enter_context(owned(out_dir))  # before the load: a run that still goes on will save again
            checkpoint = checkpoints.load(out_dir / checkpoints.LATEST, complete=True)
            stored = {**checkpoint["config"], "out_dir": named.out_dir}
            if not checkpoint["nanofuse"]:  # nanoGPT's: it holds values for the machine that wrote it
                for machine in ("device", "dtype", "backend"):
                    stored.pop(machine, None)
        elif path := checkpoints.named(named.init_from):
            checkpoint = checkpoints.load(path)
        base, why = choose_base(parsed, gpu=rehearsal or device.type != "cpu", stored=stored)
        config = compose(parsed, base)
        why = " over ".join([*reversed(parsed.sources), why])
        for note in notes(parsed, config) if world.master else ():
            say(note)
        if rehearsal:
            from train.rehearse import rehearse  # imported here: only a rehearsal needs it

            for line in rehearse(config, set(parsed.settings), why, checkpoint, world):
                if world.master:
                    print(safe(line))
            return 0
        check_sinks(config)
        if world.master and not config.eval_only and not resumed:
            stack.enter_context(owned(Path(config.out_dir)))
        device = use_device(local_device(resolve_device(config.device), world))
        with memory_suffices(LESS), process_group(world, config.backend, device):
            plan = decide(config, set(parsed.settings), why, checkpoint, world, device)
            state = make_state(plan, checkpoint)
            del checkpoint, stored  # frees as much memory as the model and the optimizer take
            status = train(state, resumed=resumed)
        if world.size > 1:
            # Skip the interpreter's shutdown. Threads of torch's communication may ask for the GIL during it. Then the
            # process aborts ("terminate called without an active exception"), and torchrun reports a failed run.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status


def train(state: TrainState, *, resumed: bool) -> int:
    """Train on one rank to the end of the run; returns the exit status. resumed: the state is an earlier run's."""
    plan, config, world = state.plan, state.plan.config, state.plan.world
    log = None
    if world.master:  # makes out_dir
        facts = {"device": device_name(plan.device), "parameters": num_params(plan.shape)}
        log = RunLog(config, **facts, resume_iter=state.progress.iter_num if resumed else None)
    tell = say if world.master else lambda line: None
    for line in plan.lines:
        tell(line)
    if world.master and state.other_data and not config.eval_only:
        tell(f"the best checkpoint until now was kept in {checkpoints.set_best_aside(Path(config.out_dir))}")
    step = make_step(state, tell)
    with Loader(
        plan.dataset,
        batch_size=config.batch_size,
        block_size=config.block_size,
        accumulation=plan.accumulation,
        seed=config.seed,
        device=plan.device,
        rank=world.rank,
        world_size=world.size,
        vocab_size=plan.shape.vocab_size,
    ) as loader:
        loop = Loop(state, step, loader, log)
        try:
            status = loop.run()
        finally:
            if isinstance(step, ProfiledStep):
                step.end()
    if log is not None:
        say(loop.ended)
        if status == 0 and not config.eval_only:
            farewell(state, loop)
        log.close()
    return 128 + status if status else 0


def make_step(state: TrainState, say: Callable[[str], None]) -> TrainStep | ProfiledStep:
    """The step, compiled, captured and profiled as the settings say."""
    plan, config = state.plan, state.plan.config
    model = model_to_train(state.model, config, plan.device, say, sharded=plan.sharded)
    state.optimizer.clear()
    world = None if plan.sharded else plan.world
    settings = {"grad_clip": config.grad_clip, "accumulation": plan.accumulation}
    step = TrainStep(model, state.optimizer, **settings, scaler=state.scaler, world=world)
    graphs, without = choose_graphs(config, plan.device, sharded=plan.sharded)
    if without:
        say(without)
    if graphs:
        step = GraphedStep(step, (config.batch_size, config.block_size), evaluates=True)
    if config.profile and plan.world.master:
        step = ProfiledStep(step, plan, state.progress.iter_num, say)
    return step


def farewell(state: TrainState, loop: Loop) -> None:
    """Print the final losses, a sample of text, and the paths of the run's files."""
    plan, losses, best = state.plan, loop.losses, state.progress.best_val_loss
    uncompile(state.model)  # each length of a text would be compiled
    say(f"final losses: train {losses.train:.4f}, val {losses.val:.4f} (best {best:.4f})")
    try:
        if plan.sharded:
            raise UserError(f"the model is shared out; {command('train.sample')} reads it from the checkpoint")
        tokenizer = plan.dataset.tokenizer(plan.config.bpe_dir or None)
        generator = torch.Generator(plan.device).manual_seed(plan.config.seed)
        drawn = SampleConfig(start=example_start(tokenizer), max_new_tokens=300)
        text = "".join(sample_text(state.model, tokenizer, drawn, generator))
        say(f"a sample:\n{text}\n---------------")
    # GPT-2's tokenizer must be downloaded once; no memory is left; Ctrl-C, on a slow device
    except (UserError, RuntimeError, KeyboardInterrupt) as error:
        say(f"no sample of text: {first_line(error)}")
    out_dir = Path(plan.config.out_dir)
    for name, path in (("checkpoint", out_dir / checkpoints.LATEST), ("best", checkpoints.best_of(out_dir))):
        found = checkpoints.held(path)
        say(f"{name + ':':<11} {f'{path}, iteration {found.iter_num}' if found else 'none was saved'}")
    say(f"metrics:    {out_dir / 'metrics.jsonl'}")
    say(f"loss curve: {plot_run(out_dir) or 'nothing to draw yet'}")


if __name__ == "__main__":
    run(main)
