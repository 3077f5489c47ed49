"""Token files, and batches from them."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from train.data import Dataset, Loader
from train.errors import UserError

CHARS = [chr(ord("A") + i) for i in range(50)]


def make(folder: Path, train=4000, val=300, *, meta: dict | None = None, dtype="<u2") -> Path:
    """A dataset with token i % 50 at position i, so that a sample shows its offset modulo 50."""
    folder.mkdir(exist_ok=True)
    for name, length in (("train", train), ("val", val)):
        (np.arange(length) % 50).astype(dtype).tofile(folder / f"{name}.bin")
    meta = {"vocab_size": 50, "tokenizer": "char", "chars": CHARS} if meta is None else meta
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def unique(folder: Path, length: int = 5000) -> Dataset:
    """A dataset with training tokens 0, 1, 2, ...: the first token of a sample is its offset."""
    make(folder, meta={"vocab_size": 65536, "tokenizer": "byte"})
    np.arange(length, dtype="<u2").tofile(folder / "train.bin")
    return Dataset(folder)


def loader(dataset: Dataset, **changes) -> Loader:
    return Loader(dataset, **{"batch_size": 3, "block_size": 8, "accumulation": 2, "seed": 7} | changes)


def same(a, b) -> bool:
    return torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and a.seeds == b.seeds


# Dataset


def test_opens_files_and_meta(tmp_path):
    dataset = Dataset(make(tmp_path))
    assert (len(dataset.train), len(dataset.val)) == (4000, 300)
    assert dataset.n_vocab == dataset.vocab_size == 50
    assert isinstance(dataset.train, np.memmap)
    assert not dataset.train.flags.writeable
    assert dataset.tokenizer().decode(dataset.train[:3]) == "ABC"


def test_no_meta_is_gpt2_bpe(tmp_path):
    (make(tmp_path) / "meta.json").unlink()
    dataset = Dataset(tmp_path)
    assert (dataset.n_vocab, dataset.vocab_size, dataset.train.dtype) == (50257, 50304, np.uint16)
    assert dataset.tokenizer().name == "gpt2"


def test_reads_nanogpts_meta(tmp_path):
    (make(tmp_path) / "meta.json").unlink()
    itos = dict(enumerate(CHARS))
    meta = {"vocab_size": 50, "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    dataset = Dataset(tmp_path)
    assert dataset.vocab_size == 50
    assert dataset.tokenizer().encode("BAD") == [1, 0, 3]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pickle-was-run",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Evil()),
        pickle.dumps({"vocab_size": 50, "itos": Evil()}),
        pickle.dumps({"vocab_size": np.int64(50)}),
        pickle.dumps({"itos": {}}),
        pickle.dumps({"vocab_size": 50, "itos": {0: "a"}}),
        b"not a pickle",
    ],
)
def test_refuses_other_pickles(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    (make(tmp_path) / "meta.json").unlink()
    (tmp_path / "meta.pkl").write_bytes(data)
    with pytest.raises(UserError, match=r"meta\.pkl"):
        Dataset(tmp_path)
    assert not Path("pickle-was-run").exists()


@pytest.mark.parametrize(
    "text",
    ["{", "{}", '{"vocab_size": 0}', '{"vocab_size": 50, "dtype": "int8"}'],
)
def test_refuses_a_malformed_meta(tmp_path, text):
    (make(tmp_path) / "meta.json").write_text(text)
    with pytest.raises(UserError, match=r"meta\.json"):
        Dataset(tmp_path)


def nanogpts(folder: Path, vocab_size: int, ids: list[int], dtype: str) -> Path:
    """A folder with a meta.pkl that states its number of tokens and nothing else."""
    (make(folder) / "meta.json").unlink()
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    for name in ("train", "val"):
        np.array(ids, dtype).tofile(folder / f"{name}.bin")
    return folder


def test_more_than_65536_tokens_are_uint32(tmp_path):
    ids = [7, 100_276, 65_536, 1]
    dataset = Dataset(nanogpts(tmp_path, 100_277, ids, "<u4"))
    assert dataset.train.tolist() == ids
    dataset.check(2)
    assert Dataset(nanogpts(tmp_path, 65_536, [65_535], "<u2")).train.tolist() == [65_535]


def test_a_dtype_that_contradicts_the_number_of_tokens(tmp_path):
    with pytest.raises(UserError, match=r"train\.bin: 6 bytes, expected a positive multiple of 4 \(uint32\)"):
        Dataset(nanogpts(tmp_path / "odd", 100_277, [1, 2, 3], "<u2"))
    with pytest.raises(UserError, match=r"train\.bin: token 131073 at position 0, .*vocab_size=100277"):
        Dataset(nanogpts(tmp_path / "even", 100_277, [1, 2, 3, 4], "<u2")).check(1)
    with pytest.raises(UserError, match=r"meta\.json: .*dtype is uint16, expected uint32"):
        Dataset(make(tmp_path, meta={"vocab_size": 100_277, "dtype": "uint16"}))


def test_a_file_cut_short_under_the_run(tmp_path):
    """Read on, the process would die of SIGBUS without a word."""
    dataset = Dataset(make(tmp_path))
    with loader(dataset) as batches:
        first = batches.train(0)
        os.truncate(tmp_path / "train.bin", 4000)
        with pytest.raises(UserError, match=r"train\.bin: 4,000 bytes, expected 8,000: it was cut short under the run"):
            batches.train(100)
        os.truncate(tmp_path / "val.bin", 0)
        with pytest.raises(UserError, match=r"val\.bin: 0 bytes"):
            batches.evaluation("val", 0)
    make(tmp_path / "again")
    (tmp_path / "again").rename(tmp_path / "moved")
    dataset = Dataset(tmp_path / "moved")
    with loader(dataset) as batches:  # a file that another one replaces stays whole
        (tmp_path / "moved" / "train.bin").unlink()
        (tmp_path / "moved" / "train.bin").write_bytes(b"ab")
        assert same(batches.train(0), first)


def test_missing_data_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"python -m train\.prepare poems"):
        Dataset(tmp_path / "poems")
    (make(tmp_path) / "val.bin").unlink()
    with pytest.raises(UserError, match=r"val\.bin.*python -m train\.prepare"):
        Dataset(tmp_path)


def test_check_names_the_first_bad_token(tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.SCAN_TOKENS", 100)
    dataset = Dataset(make(tmp_path))
    dataset.check(8)
    with pytest.raises(UserError, match=r"train\.bin: token 49 at position 49,.*vocab_size=49"):
        dataset.check(8, vocab_size=49)
    tokens = np.fromfile(tmp_path / "val.bin", dtype="<u2")
    tokens[[234, 250]] = 51, 52
    tokens.tofile(tmp_path / "val.bin")
    with pytest.raises(UserError, match=r"val\.bin: token 51 at position 234,"):
        Dataset(tmp_path).check(8)


# Loader


def test_targets_are_the_next_tokens(tmp_path):
    with loader(unique(tmp_path)) as batches:
        for batch in (batches.train(0), batches.evaluation("train", 0)):
            assert batch.x.shape[1:] == batch.y.shape[1:] == (3, 8)
            assert batch.x.dtype == torch.int64
            assert batch.x.is_contiguous()
            assert batch.y.is_contiguous()
            assert torch.equal(batch.x + 1, batch.y)
            assert torch.equal(batch.x[..., 1:], batch.y[..., :-1])


def test_every_window_is_drawn_and_no_other(tmp_path):
    dataset = unique(tmp_path, length=20)  # offsets 0 ... 11, the range of torch.randint(20 - 8)
    with loader(dataset, batch_size=12, accumulation=1) as batches:
        assert sorted(batches.train(3).x[0, :, 0].tolist()) == list(range(12))
    with loader(dataset, batch_size=40, accumulation=1) as batches:  # more than there are, so with replacement
        assert set(batches.train(0).x[0, :, 0].tolist()) <= set(range(12))


@pytest.mark.parametrize("accumulation", [1, 5000])  # many steps gathered at once; one step at a time
def test_a_batch_is_a_function_of_seed_and_step(tmp_path, accumulation):
    dataset = unique(tmp_path)
    with loader(dataset, accumulation=accumulation) as ahead:
        want = [ahead.train(step) for step in range(20)]
    with loader(dataset, accumulation=accumulation) as jumping:
        for step in (17, 3, 4, 19, 0, 1, 0):
            assert same(jumping.train(step), want[step])
    assert not torch.equal(want[0].x, want[1].x)
    with loader(dataset, accumulation=accumulation, seed=8) as other:
        assert not torch.equal(other.train(0).x, want[0].x)
        assert other.train(0).seeds != want[0].seeds


def test_dropout_seeds_differ(tmp_path):
    with loader(unique(tmp_path), accumulation=4) as batches:
        seeds = [seed for step in range(50) for seed in batches.train(step).seeds]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_ranks_share_out_the_batch_of_one_process(tmp_path):
    dataset = unique(tmp_path)
    with loader(dataset, accumulation=6) as alone:
        want = alone.train(5)
    for rank in range(3):
        with loader(dataset, accumulation=2, rank=rank, world_size=3) as part:
            got = part.train(5)
        assert torch.equal(got.x, want.x[rank::3])
        assert torch.equal(got.y, want.y[rank::3])
        assert got.seeds == want.seeds[rank::3]
    assert len(want.x[:, :, 0].unique()) == 18  # no sample twice in a step


def test_evaluation_batches_are_fixed(tmp_path):
    dataset = unique(tmp_path)
    with loader(dataset) as one, loader(dataset, rank=1, world_size=2, accumulation=1) as two:
        one.train(0)
        for split in ("train", "val"):
            assert same(one.evaluation(split, 4), two.evaluation(split, 4))
            assert not torch.equal(one.evaluation(split, 4).x, one.evaluation(split, 5).x)
        assert one.evaluation("val", 0).x.max() < 50
        assert one.evaluation("train", 0).x.max() >= 50


def test_drawing_from_nine_billion_tokens_makes_no_table_of_them(tmp_path):
    length = 9_000_000_000
    dataset = unique(tmp_path)
    with open(tmp_path / "train.bin", "wb") as file:
        file.truncate(2 * length)  # a hole, which takes no disk space
    dataset = Dataset(tmp_path)
    dataset.check(8)  # too large to be read for the check
    with loader(dataset, batch_size=480) as batches:
        assert batches.train(0).x.sum() == 0
        offsets = batches._draw("train", np.random.default_rng(0), 4800)
    assert len(set(offsets.tolist())) == 4800
    assert offsets.max() > length * 0.9


def test_a_bad_token_in_the_thread_reaches_the_caller(tmp_path):
    dataset = unique(tmp_path)
    with (
        loader(dataset, vocab_size=100) as batches,
        pytest.raises(UserError, match=r"train\.bin: token \d+ at position \d+.*vocab_size=100"),
    ):
        batches.train(0)
    with (
        loader(Dataset(make(tmp_path)), vocab_size=49) as batches,
        pytest.raises(UserError, match=r"val\.bin: token 49 at position \d*[49]9,"),
    ):
        [batches.evaluation("val", k) for k in range(100)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_batches_are_those_of_the_cpu(tmp_path):
    dataset = unique(tmp_path)
    work = torch.randn(4096, 4096, device="cuda")
    with loader(dataset) as cpu, loader(dataset, device="cuda") as cuda:
        got = []
        for step in range(200):  # the device falls behind, so a buffer that is reused too early would show
            work = torch.tanh(work @ work)
            got.append(cuda.train(step))
        for step, batch in enumerate(got):
            assert batch.x.is_cuda
            assert same(cpu.train(step), type(batch)(batch.x.cpu(), batch.y.cpu(), batch.seeds))
