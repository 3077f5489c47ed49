"""Token files, and batches from them."""

import collections
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from train.data import Batch, Dataset, Loader
from train.errors import UserError
from train.metapickle import check_pickle
from train.prepare import PrepareConfig, prepare

CHARS = [chr(ord("A") + i) for i in range(50)]
CHAR_META = {"vocab_size": 50, "tokenizer": "char", "chars": CHARS}


def make(folder: Path, meta: dict | bytes | None = CHAR_META, *, train: list[int] | int = 4000, dtype="<u2") -> Path:
    """A dataset with token i % 50 at position i. meta: a dict for meta.json, bytes for nanoGPT's meta.pkl."""
    folder.mkdir(exist_ok=True)
    for name, ids in (("train", train), ("val", 300)):
        ids = np.arange(ids) % 50 if isinstance(ids, int) else np.array(ids)
        ids.astype(dtype).tofile(folder / f"{name}.bin")
    if isinstance(meta, dict):
        (folder / "meta.json").write_text(json.dumps(meta))
    elif meta is not None:
        (folder / "meta.pkl").write_bytes(meta)
    return folder


def unique(folder: Path, length: int = 5000) -> Dataset:
    """A dataset with training tokens 0, 1, 2, ...: the first token of a sample is its offset."""
    return Dataset(make(folder, {"vocab_size": 65536, "tokenizer": "byte"}, train=list(range(length))))


def loader(dataset: Dataset, **changes) -> Loader:
    return Loader(dataset, **{"batch_size": 3, "block_size": 8, "accumulation": 2, "seed": 7} | changes)


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and a.seeds == b.seeds


# What a folder says of its tokens


def test_opens_files_and_meta(tmp_path):
    dataset = Dataset(make(tmp_path / "a"))
    assert (len(dataset.train), len(dataset.val), dataset.n_vocab, dataset.vocab_size) == (4000, 300, 50, 50)
    assert isinstance(dataset.train, np.memmap)
    assert not dataset.train.flags.writeable
    assert dataset.tokenizer().decode(dataset.train[:3]) == "ABC"
    gpt2 = Dataset(make(tmp_path / "b", None))
    assert (gpt2.n_vocab, gpt2.vocab_size, gpt2.train.dtype, gpt2.tokenizer().name) == (50257, 50304, "<u2", "gpt2")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pickle-was-run",)


class Pointer:
    """A scalar of numpy whose bytes are an address."""

    def __reduce__(self):
        return np.int64(0).__reduce__()[0], (np.dtype("O"), bytes(range(8)))


ITOS = dict(enumerate(CHARS))
STOI = {char: i for i, char in ITOS.items()}


@pytest.mark.parametrize(
    ("meta", "size", "known"),
    [
        ({"vocab_size": np.int32(64), "itos": {np.int32(i): np.str_(c) for i, c in ITOS.items()}}, 64, True),
        ({"vocab_size": None, "itos": collections.OrderedDict(ITOS), "stoi": STOI}, 50, True),
        ({"vocab_size": "50", "itos": None, "stoi": collections.defaultdict(int, STOI)}, 50, True),
        ({"vocab_size": np.int64(50), "itos": tuple(CHARS)}, 50, True),
        ({"itos": [f"word{i}" for i in range(50)]}, 50, False),
        ({"vocab_size": 50}, 50, False),
        ({"vocab_size": 50, "itos": {**ITOS, 0: None}}, 50, False),
        ({"vocab_size": 50, "itos": {**ITOS, 1: "A"}}, 50, False),  # twice the same
        ({"vocab_size": 50, "itos": {**ITOS, 51: "!"}}, 50, False),  # a hole
        ({"vocab_size": 50, "itos": [*CHARS, "!"]}, 50, False),  # more than vocab_size
        ({"vocab_size": 50, "itos": Evil(), "tokenizer": Path("a")}, 50, False),
        ({"vocab_size": 50, "itos": {**ITOS, 0: Pointer()}}, 50, False),
    ],
)
def test_meta_pickles_of_forks(tmp_path, monkeypatch, meta, size, known):
    """Training needs the size alone. What is not understood costs the sampling of text."""
    monkeypatch.chdir(tmp_path)
    dataset = Dataset(make(tmp_path, pickle.dumps(meta)))
    dataset.check(8)
    assert (dataset.vocab_size, type(dataset.vocab_size), dataset.train.dtype) == (size, int, np.uint16)
    assert not Path("pickle-was-run").exists()
    if known:
        assert dataset.tokenizer().encode("BAD") == [1, 0, 3]
    else:
        with pytest.raises(UserError, match="the dataset's is not known"):
            dataset.tokenizer()


@pytest.mark.parametrize(
    "meta",
    [
        *(pickle.dumps(meta) for meta in (Evil(), [50], {"itos": {1: "a"}}, {"vocab_size": Evil()})),
        *(pickle.dumps({"vocab_size": 50})[:-3], b"\x80\x02."),
        *("{", "[]", "[" * 100_000),
        *(json.dumps({"vocab_size": size}) for size in (0, True, 1e30, 1 << 33)),
        *('{"vocab_size": 50, "dtype": "int8"}', '{"vocab_size": 100277, "dtype": "uint16"}'),
        *('{"vocab_size": 50, "train_tokens": "many"}', '{"vocab_size": 50, "val_tokens": -3}'),
        '{"vocab_size": 50, "checksums": {"bytes": 2, "train": [], "val": []}}',
        *('{"vocab_size": 50, "checksums": {"bytes": 9, "train": []}}', '{"vocab_size": 50, "checksums": [1]}'),
    ],
    ids=lambda meta: repr(meta[:40]),
)
def test_a_malformed_meta_is_refused(tmp_path, monkeypatch, meta):
    monkeypatch.chdir(tmp_path)
    name = "meta.json" if isinstance(meta, str) else "meta.pkl"
    (make(tmp_path, None) / name).write_bytes(meta.encode() if isinstance(meta, str) else meta)
    with pytest.raises(UserError, match=f"{name}: cannot be read: "):
        Dataset(tmp_path)
    assert not Path("pickle-was-run").exists()


def test_a_pickle_that_would_take_all_memory_or_the_stack_is_not_loaded():
    with pytest.raises(ValueError, match="asks for more memory than it has bytes"):
        check_pickle(b"\x80\x02}r\xff\xff\xff\x7f.")  # a memo of 2^31 entries
    with pytest.raises(ValueError, match="more than 50,000 tuples"):
        check_pickle(b"\x80\x02}N" + b"\x85" * 50_001 + b"K\x01s.")  # each one holds the next


# Files that are not what meta says


@pytest.mark.parametrize(
    ("size", "train", "dtype", "said"),
    [
        (100_277, [1, 2, 3], "<u2", r"1 tokens and 2 bytes, expected one or more, 4 bytes each: it was cut short"),
        (100_277, [1, 2, 3, 4], "<u2", r"token 131073 at position 0, .*vocab_size=100277"),
        (50_257, [1, 2, 3, 4], "<u4", r"every second token is 0, .* expected uint16 for vocab_size=50257"),
        (100_277, [1, 2, 3], "<u8", r"every second token is 0, .* expected uint32"),
        (50, [], "<u2", r"0 tokens and 0 bytes, expected one or more, 2 bytes each"),
    ],
)
def test_a_size_or_dtype_that_the_file_contradicts(tmp_path, size, train, dtype, said):
    with pytest.raises(UserError, match=rf"train\.bin: {said}"):
        Dataset(make(tmp_path, {"vocab_size": size}, train=train, dtype=dtype)).check(1)


def test_a_file_cut_short_under_the_run(tmp_path):
    """Read on, the process would die of SIGBUS without a word."""
    with loader(Dataset(make(tmp_path))) as batches:
        os.truncate(tmp_path / "train.bin", 400)
        with pytest.raises(UserError, match=r"train\.bin: 400 bytes, expected 8,000: it was cut short under the run"):
            batches.train(0)


def test_a_file_that_another_one_replaces_stays_whole_for_the_run(tmp_path):
    dataset = unique(tmp_path)
    (tmp_path / "train.bin").unlink()
    (tmp_path / "train.bin").write_bytes(b"ab")
    with loader(dataset) as batches:
        assert batches.train(0).x.max() > 8


@pytest.mark.parametrize("name", ["meta.json", "meta.pkl", "train.bin", "val.bin"])
@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_refused(tmp_path, name, put):
    (make(tmp_path, None) / name).unlink(missing_ok=True)
    put(tmp_path / name)
    with pytest.raises(UserError, match=str(tmp_path)):
        Dataset(tmp_path)


def test_a_file_that_was_cut_short_or_changed_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("To be, or not to be\n" * 500)
    monkeypatch.setattr("train.prepare.CHECKSUM_BYTES", 10_000)
    prepare(["a.txt"], PrepareConfig())
    path = Path("data", "a", "train.bin")
    assert Dataset(path.parent).check(8)
    whole = path.read_bytes()
    for at, part in ((0, "0 to 5,000"), (len(whole) - 2, "5,000 to 10,000")):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])  # another letter
        said = rf"train\.bin: damaged, or another file: tokens {part} .* with: python -m train\.prepare"
        for most, seconds, all_of_it in ((2**20, 0, False), (0, 60, False), (0, 0, True)):
            monkeypatch.setattr("train.data.FULL_SCAN_BYTES", most)
            monkeypatch.setattr("train.data.CHECK_SECONDS", seconds)
            with pytest.raises(UserError, match=said):
                Dataset(path.parent).check(8, whole=all_of_it)
        assert Dataset(path.parent).check(8)  # a large file, and no time
    path.write_bytes(whole[:-200])
    with pytest.raises(
        UserError, match=r"train\.bin: 8,900 tokens and 0 bytes, expected the 9,000 of meta\.json, .*: it was cut"
    ):
        Dataset(path.parent)
    assert not Dataset(make(tmp_path / "old")).check(whole=True)  # without checksums


def test_more_than_65536_tokens_are_uint32(tmp_path):
    u2, u4, chosen = {"vocab_size": 65_536}, {"vocab_size": 65_537}, {"vocab_size": 65_536, "dtype": "uint32"}
    for meta, dtype in ((u2, "<u2"), (u4, "<u4"), (chosen, "<u4")):
        dataset = Dataset(make(tmp_path, meta, train=[65_535, 1], dtype=dtype))
        dataset.check(1)
        assert dataset.train.tolist() == [65_535, 1]


def test_check_names_the_first_bad_token(tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.SCAN_TOKENS", 100)
    dataset = Dataset(make(tmp_path, train=[*range(50)] * 7 + [50, 52]))
    with pytest.raises(UserError, match=r"train\.bin: token 50 at position 350, expected ids below vocab_size=50"):
        dataset.check(8)
    dataset.check(8, vocab_size=64)
    with pytest.raises(UserError, match=r"block_size=300: .*val\.bin holds 300 tokens, expected at least 301"):
        dataset.check(300)
    Dataset(make(tmp_path, train=[5, 0, 7, 0])).check(1)  # where the table is known, these are tokens


# Loader


def test_targets_are_the_next_tokens_and_both_go_to_the_device_in_one_copy(tmp_path, monkeypatch):
    copies, to = [], torch.Tensor.to

    def counted(tensor: torch.Tensor, *args, **how) -> torch.Tensor:
        copies.append(tensor)
        return to(tensor, *args, **how)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    with loader(unique(tmp_path)) as batches:
        for batch, steps in ((batches.train(0), 2), (batches.evaluation("train", 0), 1)):
            assert batch.x.shape == (steps, 3, 8)
            assert batch.x.dtype == torch.int64
            assert batch.x.is_contiguous()
            assert batch.y.is_contiguous()
            assert torch.equal(batch.x + 1, batch.y)
    assert len(copies) == 2


def test_every_window_is_drawn_and_no_other(tmp_path):
    dataset = unique(tmp_path, length=20)  # offsets 0 ... 11, the range of torch.randint(20 - 8)
    with loader(dataset, batch_size=12, accumulation=1) as batches:
        assert sorted(batches.train(3).x[0, :, 0].tolist()) == list(range(12))
    with loader(dataset, batch_size=40, accumulation=1) as batches:  # more than there are, so with replacement
        assert set(batches.train(0).x[0, :, 0].tolist()) <= set(range(12))


@pytest.mark.parametrize("run_bytes", [1 << 20, 1])  # many steps gathered at once; one step at a time
def test_a_batch_is_a_function_of_seed_and_step(tmp_path, monkeypatch, run_bytes):
    monkeypatch.setattr("train.data.RUN_BYTES", run_bytes)
    dataset = unique(tmp_path)
    with loader(dataset) as ahead:
        want = [ahead.train(step) for step in range(20)]
    seeds = [seed for batch in want for seed in batch.seeds]
    assert len(set(seeds)) == 40
    assert all(0 <= seed < 2**63 for seed in seeds)
    with loader(dataset) as jumping:
        for step in (17, 3, 4, 19, 0, 1, 0):
            assert same(jumping.train(step), want[step])
    assert not torch.equal(want[0].x, want[1].x)
    with loader(dataset, seed=8) as other:
        assert not torch.equal(other.train(0).x, want[0].x)
        assert other.train(0).seeds != want[0].seeds


def test_ranks_share_out_the_batch_of_one_process_and_evaluate_the_same_batches(tmp_path):
    dataset = unique(tmp_path)
    with loader(dataset, accumulation=6) as alone:
        want, evaluated = alone.train(5), [alone.evaluation(split, 4) for split in ("train", "val")]
        assert not torch.equal(alone.evaluation("train", 5).x, evaluated[0].x)
    for rank in range(3):
        with loader(dataset, accumulation=2, rank=rank, world_size=3) as part:
            assert all(map(same, [part.evaluation(split, 4) for split in ("train", "val")], evaluated))
            assert same(part.train(5), Batch(want.x[rank::3], want.y[rank::3], want.seeds[rank::3]))
    assert len(want.x[:, :, 0].unique()) == 18  # no sample twice in a step
    assert evaluated[1].x.max() < 50 <= evaluated[0].x.max()


def test_drawing_from_nine_billion_tokens_makes_no_table_of_them(tmp_path):
    length = 9_000_000_000
    unique(tmp_path)
    os.truncate(tmp_path / "train.bin", 2 * length)  # a hole, which takes no disk space
    dataset = Dataset(tmp_path)
    dataset.check(8)  # too large to be read for the check
    with loader(dataset, batch_size=480) as batches:
        assert batches.train(0).x.sum() == 0
        offsets = batches._draw("train", np.random.default_rng(0), 4800)
    assert len(set(offsets.tolist())) == 4800
    assert offsets.max() > length * 0.9


def test_a_bad_token_in_the_thread_reaches_the_caller(tmp_path):
    with (
        loader(unique(tmp_path, length=900), vocab_size=100) as batches,
        pytest.raises(UserError, match=r"train\.bin: token (\d+) at position \1, .*vocab_size=100"),
    ):
        batches.train(0)


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
            assert same(cpu.train(step), Batch(batch.x.cpu(), batch.y.cpu(), batch.seeds))
