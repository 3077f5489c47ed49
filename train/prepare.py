"""Text to token files: python -m train.prepare NAME | FILE ... [--tokenizer=char|byte|gpt2]"""

import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from train.cli import help_text, parse_settings
from train.datasets import TOKENIZERS, docs_line, prepare_docs, prepare_openwebtext, prepare_shakespeare
from train.encode import write_dataset
from train.errors import UserError, run
from train.settings import check_values, nearest, setting, shown
from train.tokenizer import NAMES

ABOUT = f"""Writes data/DATASET/train.bin, val.bin and meta.json. NAME is one of {", ".join(TOKENIZERS)};
or name text files, to be taken one after the other. Then: python -m train --dataset=DATASET"""


@dataclass(frozen=True)
class PrepareConfig:
    """The settings of `python -m train.prepare`."""

    tokenizer: str = setting("auto", "auto: gpt2 for shakespeare and openwebtext, else char", choices=("auto", *NAMES))
    dataset: str = setting("", "folder in data/, or an absolute path; if empty, the name of the corpus or first file")
    val_fraction: float = setting(0.1, "the last part of the text, for validation", low=1e-9, below=1)
    bpe_dir: str = setting("", "folder of GPT-2's encoder.json, for a machine without network")


class Progress:
    """A bar on a terminal, redrawn ten times a second; elsewhere a line every half minute."""

    def __init__(self, unit: str, stream: TextIO | None = None) -> None:
        self.unit, self.stream = unit, stream or sys.stderr
        self.done = 0
        self._bar = self.stream.isatty()
        self._start = self._shown = time.monotonic()

    def to(self, done: int, total: int) -> None:
        """`done` of `total` units are behind us."""
        self.done = done
        now = time.monotonic()
        if now - self._shown < (0.1 if self._bar else 30):
            return
        self._shown = now
        share = min(done / total, 1)
        rate = done / (now - self._start)
        left = (total - done) / rate if rate else 0
        line = f"{share:4.0%}, {rate:,.0f} {self.unit}/s, {left:.0f} s left"
        if self._bar:
            self.stream.write(f"\r[{'#' * round(30 * share):<30}] {line:<50}")
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:  # leave a clean line
            self.stream.write("\r\033[K")
            self.stream.flush()


def main() -> None:
    """The command. Raises UserError for bad input, with nothing written."""
    parsed = parse_settings(PrepareConfig, sys.argv[1:], presets=False, files=True)
    if parsed.help:
        print(help_text(PrepareConfig, "python -m train.prepare", ABOUT, positional="NAME | FILE ..."))
        return
    config = PrepareConfig(**parsed.settings)
    check_values(config)
    if not parsed.files:
        raise UserError(f"nothing to prepare: expected a name ({', '.join(TOKENIZERS)}) or text files")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that temporary files go
    start = time.monotonic()
    dataset, meta = prepare(parsed.files, config)
    folder = Path("data") / dataset
    if parsed.files == ["docs"]:
        print(docs_line(meta))
    for name in ("train", "val"):
        print(f"{folder / name}.bin: {meta[f'{name}_tokens']:,} tokens")
    print(f"vocabulary: {meta['vocab_size']:,} ({meta['tokenizer']}); text sha256 {meta['sha256']}")
    print(f"{time.monotonic() - start:.1f} s; train on it with: python -m train --dataset={dataset}")


def prepare(sources: list[str], config: PrepareConfig) -> tuple[str, dict[str, Any]]:
    """Prepare one corpus by name, or the files. Returns the dataset's name and meta. Raises UserError."""
    name = sources[0] if len(sources) == 1 and sources[0] in TOKENIZERS else None
    if name is None:
        _check_files(sources, config.dataset)
    dataset = config.dataset or name or Path(sources[0]).stem
    folder = Path("data") / dataset
    tokenizer = TOKENIZERS.get(name, "char") if config.tokenizer == "auto" else config.tokenizer
    if name == "openwebtext":
        if tokenizer != "gpt2" or config.val_fraction != PrepareConfig.val_fraction:
            raise UserError("openwebtext: made as nanoGPT makes it, expected no --tokenizer and no --val_fraction")
        with Progress("documents") as progress:
            return dataset, prepare_openwebtext(folder, config.bpe_dir, progress.to)
    options = {"val_fraction": config.val_fraction, "bpe_dir": config.bpe_dir}
    if name == "docs":
        return dataset, prepare_docs(folder, tokenizer, **options)
    if name is not None:
        return dataset, prepare_shakespeare(folder, tokenizer, **options)
    files = [Path(source) for source in sources]
    total = 2 * sum(file.stat().st_size for file in files)  # the text is read twice
    with Progress("bytes") as progress:
        see = lambda data: progress.to(progress.done + len(data), total)  # noqa: E731
        return dataset, write_dataset(folder, files, tokenizer, see=see, **options)


def _check_files(sources: list[str], dataset: str) -> None:
    for source in sources:
        path = Path(source)
        if path.is_file():
            continue
        if path.exists():
            raise UserError(f"{shown(source)}: not a regular file, expected a text file")
        if len(sources) == 1 and path.name == source and not path.suffix:
            hint = nearest(source, TOKENIZERS) or f", expected one of {', '.join(TOKENIZERS)}"
            raise UserError(f"{shown(source)}: no such corpus or file{hint}")
        raise UserError(f"{shown(source)}: no such file")
    if not dataset and (stem := Path(sources[0]).stem) in TOKENIZERS:
        raise UserError(f"dataset: {stem} is the name of a corpus, expected another: --dataset=NAME")


if __name__ == "__main__":
    run(main)
