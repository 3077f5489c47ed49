"""Export a checkpoint for `transformers`: python -m train.export --out_dir=out --to=FOLDER"""

from dataclasses import dataclass
from pathlib import Path

from model.pretrained import export_gpt2, from_checkpoint
from train.checkpoint import load
from train.errors import UserError, run
from train.settings import command_line, setting


@dataclass(frozen=True)
class ExportConfig:
    out_dir: str = setting("out", "folder of the checkpoint", path=True)
    to: str = setting("", "folder to write config.json and model.safetensors into", path=True)


def main(argv: list[str] | None = None) -> None:
    """The command. Raises UserError."""
    about = "Write a checkpoint as a Hugging Face GPT-2 folder."
    config, _ = command_line(ExportConfig, argv, "python -m train.export", about)
    if not config.to:
        raise UserError("to: got '', expected a folder, as in --to=my-gpt2")
    path = Path(config.out_dir) / "ckpt.pt"
    checkpoint = load(path)
    try:
        folder = export_gpt2(from_checkpoint(checkpoint), config.to)
    except ImportError as error:
        raise UserError(str(error)) from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"to: {config.to} cannot be written ({error.strerror})") from error
    print(f"{folder}: written; read it with transformers.GPT2LMHeadModel.from_pretrained({str(folder)!r})")


if __name__ == "__main__":
    run(main)
