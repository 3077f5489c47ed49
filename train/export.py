"""Export a checkpoint for `transformers`: python -m train.export --out_dir=out --to=FOLDER"""

import os
from dataclasses import dataclass
from pathlib import Path

from model import GPT
from model.pretrained import CONFIG, WEIGHTS, export_gpt2, from_checkpoint
from train.checkpoint import load
from train.errors import UserError, run
from train.files import check_output, staging_folder, sync, sync_folder
from train.settings import command_line, setting


@dataclass(frozen=True)
class ExportConfig:
    out_dir: str = setting("out", "folder of the checkpoint", path=True)
    to: str = setting("", "folder to write config.json and model.safetensors into", path=True)


def write(model: GPT, folder: Path) -> None:
    """Write `model` into `folder`, each file in one step, the weights first. Raises as `export_gpt2`, and OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    names = (WEIGHTS, CONFIG)
    for name in names:
        check_output(folder / name)
    with staging_folder(folder) as staging:
        export_gpt2(model, staging)
        for name in names:
            with open(staging / name, "rb") as file:
                sync(file)
            os.replace(staging / name, folder / name)
    sync_folder(folder)


def main(argv: list[str] | None = None) -> None:
    """The command. Raises UserError."""
    about = "Write a checkpoint as a Hugging Face GPT-2 folder."
    config, _ = command_line(ExportConfig, argv, "python -m train.export", about)
    if not config.to:
        raise UserError("to: got '', expected a folder, as in --to=my-gpt2")
    path, folder = Path(config.out_dir) / "ckpt.pt", Path(config.to)
    checkpoint = load(path)
    try:
        write(from_checkpoint(checkpoint), folder)
    except ImportError as error:
        raise UserError(str(error)) from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"to: {config.to} cannot be written ({error.strerror})") from error
    print(f"{folder}: written; read it with transformers.GPT2LMHeadModel.from_pretrained({str(folder)!r})")


if __name__ == "__main__":
    run(main)
