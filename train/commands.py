"""The command `nanofuse`: every program of the project by name, from any folder.

In a folder with files called train.py or bench.py, nanoGPT's for one, `python -m train` runs those. This does not: the
folder it is started in is not among the places where its modules are looked for.
"""

import runpy
import sys

from train.errors import UserError, ending, shown
from train.settings import nearest

COMMANDS = {  # what is run as `python -m`, with which arguments before the user's, and what it does
    "train": (["train"], "train a GPT"),
    "rehearse": (["train", "--rehearse"], "check a training run for a GPU, without one"),
    "prepare": (["train.prepare"], "make a dataset of text files or of a corpus by name"),
    "sample": (["train.sample"], "draw text from a trained model"),
    "plot": (["train.plot"], "draw the loss curves of runs"),
    "export": (["train.export"], "write a checkpoint as a folder for `transformers`"),
    "bench": (["bench"], "measure this machine"),
    "report": (["bench.report"], "compare the measurements of several machines or commits"),
}


def main() -> None:
    """`nanofuse COMMAND ...`; ends as the command does. One line and exit status 2 where there is no such command."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: nanofuse COMMAND ...\n")
        print("\n".join(f"  {command:<10}{about}" for command, (_, about) in COMMANDS.items()))
        print("\n`nanofuse COMMAND --help` lists the settings of a command.")
        return
    with ending():
        if name not in COMMANDS:
            raise UserError(f"unknown command {shown(name)}{nearest(name, COMMANDS)}; nanofuse --help lists them all")
    (module, *before), _ = COMMANDS[name]
    sys.argv[1:] = [*before, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
