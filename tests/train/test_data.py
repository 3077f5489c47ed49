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
    assert dataset.tokenizer().decode_bytes(dataset.train[:3]) == b"ABC"
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
NANOGPTS = {"vocab_size": 50, "itos": ITOS, "stoi": STOI}


@pytest.mark.parametrize(
    ("meta", "size", "known"),
    [
        (NANOGPTS, 50, True),
        ({"vocab_size": np.int32(64), "itos": {np.int32(i): np.str_(char) for i, char in ITOS.items()}}, 64, True),
        ({"vocab_size": None, "itos": collections.OrderedDict(ITOS), "stoi": STOI}, 50, True),
        ({"vocab_size": "50", "itos": None, "stoi": collections.defaultdict(int, STOI)}, 50, True),
        ({"vocab_size": np.int64(50), "itos": np.array(CHARS), "stoi": collections.Counter(STOI)}, 50, True),
        ({"itos": tuple(CHARS)}, 50, True),
        ({"itos": [f"word{i}" for i in range(50)]}, 50, False),
        ({"vocab_size": 50}, 50, False),
        ({"vocab_size": 50, "itos": {**ITOS, 0: None}}, 50, False),
        ({"vocab_size": 50, "itos": {**ITOS, 1: "A"}}, 50, False),  # twice the same
        ({"itos": {**ITOS, 51: "!"}}, 52, False),  # a hole
        ({"vocab_size": 50, "itos": [*CHARS, "!"]}, 50, False),  # more than vocab_size
        ({"vocab_size": 50, "itos": Evil(), "tokenizer": Path("a")}, 50, False),
        ({"vocab_size": 50, "itos": {**ITOS, 0: Pointer()}}, 50, False),
        ({"vocab_size": 50, "dtype": "uint32"}, 50, False),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_meta_pickles_of_forks(tmp_path, monkeypatch, meta, size, known, protocol):
    """Training needs the size alone. What is not understood costs the sampling of text. Nothing is run."""
    monkeypatch.chdir(tmp_path)
    dataset = Dataset(make(tmp_path, pickle.dumps(meta, protocol)))
    assert (dataset.vocab_size, type(dataset.vocab_size), dataset.train.dtype) == (size, int, meta.get("dtype", "<u2"))
    assert not Path("pickle-was-run").exists()
    if known:
        assert dataset.tokenizer().encode("BAD") == [1, 0, 3]
    else:
        with pytest.raises(UserError, match="the dataset's is not known"):
            dataset.tokenizer()


HUGE, NESTED = (1 << 60).to_bytes(8, "little"), b"\x80\x02}N"


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        # pickles that would take all memory, or the stack
        (b"}p%d\n." % (1 << 60), ""),  # an index
        *((b"\x80\x05" + opcode + HUGE + b"a.", "") for opcode in (b"\x8e", b"\x95", b"\x96")),  # lengths
        (NESTED + b"\x85" * 100_000 + b"K\x01s.", ""),  # a key that is a tuple of a tuple of a tuple ...
        (NESTED + b"2\x86" * 100 + b"K\x01s.", ""),  # of two equal ones, of two equal ones, ...
        (b"}X\x0a\0\0\0vocab_size\x8b" + (9999).to_bytes(4, "little") + b"\x7f" * 9999 + b"s.", ""),  # a long number
        (pickle.dumps({"vocab_size": Evil()}), "vocab_size"),
        (pickle.dumps(NANOGPTS)[:-3], "not a pickle"),
        (pickle.dumps([50]), "vocab_size"),
        ("{", "Expecting"),
        ("[" * 100_000, "recursion"),
        ('{"vocab_size": true}', "Expected `int`"),
        ('{"vocab_size": 8589934592}', "<= 4294967296"),
        ('{"vocab_size": 100277, "dtype": "uint16"}', "expected uint32"),
        ('{"vocab_size": 50, "val_tokens": -3}', "val_tokens"),
        ('{"vocab_size": 2, "tokenizer": "char", "chars": ["a", "a"]}', "distinct single characters"),
        ('{"vocab_size": 2, "tokenizer": "char", "chars": ["a", "b", "c"]}', "chars has 3 characters"),
        ('{"vocab_size": 2, "tokenizer": "char", "chars": ["ab", "c"]}', "distinct single characters"),
        ('{"vocab_size": 50, "checksums": {"bytes": 2, "train": [], "val": []}}', "checksums.bytes"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_malformed_meta_is_refused(tmp_path, monkeypatch, meta, said):
    monkeypatch.chdir(tmp_path)
    name = "meta.json" if isinstance(meta, str) else "meta.pkl"
    (make(tmp_path, None) / name).write_bytes(meta.encode() if isinstance(meta, str) else meta)
    with pytest.raises(UserError, match=f"{name}: cannot be read: .*{said}"):
        Dataset(tmp_path)
    assert not Path("pickle-was-run").exists()


# Files that are not what meta says


@pytest.mark.parametrize(
    ("meta", "train", "dtype", "said"),
    [
        ({"vocab_size": 65_536}, [65_535, 1], "<u2", ""),
        ({"vocab_size": 65_537}, [65_536, 1], "<u4", ""),
        ({"vocab_size": 50, "dtype": "uint32"}, [49, 1], "<u4", ""),
        ({"vocab_size": 100_277}, [1, 2, 3], "<u2", "1 tokens and 2 bytes, expected one or more, 4 bytes each: it was"),
        ({"vocab_size": 100_277}, [1, 2, 3, 4], "<u2", "token 131073 at position 0, .*vocab_size=100277"),
        ({"vocab_size": 50}, [*range(50)] * 7 + [50, 50], "<u2", "token 50 at position 350, .*vocab_size=50"),
        ({"vocab_size": 50}, [], "<u2", "0 tokens and 0 bytes, expected one or more, 2 bytes each"),
        ({"vocab_size": 50}, [1], "<u2", "block_size=1: .* holds 1 tokens, expected at least 2"),
        (CHAR_META, [1, 2, 3], "<u4", r"second token is 0, .* uint16 for vocab_size=50, or another .* in .*meta\.json"),
        ({"vocab_size": 100_277}, [1, 2, 3], "<u8", "every second token is 0, .* expected uint32"),
        ({"vocab_size": 50, "train_tokens": 3}, [1, 2], "<u2", r"2 tokens .* expected the 3 of meta\.json"),
    ],
)
def test_sizes_and_dtypes(tmp_path, monkeypatch, meta, train, dtype, said):
    monkeypatch.setattr("train.data.SCAN_TOKENS", 100)
    folder = make(tmp_path, meta, train=train, dtype=dtype)
    if said:
        with pytest.raises(UserError, match=said):
            Dataset(folder).check(1)
    else:
        Dataset(folder).check(1)
        assert Dataset(folder).train.tolist() == train


def test_a_file_that_another_one_replaces_stays_whole_for_the_run(tmp_path):
    dataset = unique(tmp_path)
    (tmp_path / "train.bin").unlink()
    (tmp_path / "train.bin").write_bytes(b"ab")
    with loader(dataset) as batches:
        assert batches.train(0).x.max() > 8


@pytest.mark.parametrize("name", ["meta.pkl", "train.bin", "val.bin"])
@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_refused(tmp_path, name, put):
    (make(tmp_path, None) / name).unlink(missing_ok=True)
    put(tmp_path / name)
    with pytest.raises(UserError, match=str(tmp_path)):
        Dataset(tmp_path)


def test_a_file_that_was_changed_is_refused(tmp_path, monkeypatch):
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
        with pytest.raises(UserError, match=said):
            Dataset(path.parent).check(8)
    monkeypatch.setattr("train.data.SCAN_BYTES", 10_000)  # now the file is a large one
    assert Dataset(path.parent).check(8)
    with pytest.raises(UserError, match="damaged"):
        Dataset(path.parent).check(8, whole=True)
    assert not Dataset(make(tmp_path / "old")).check(whole=True)  # without checksums


# Loader


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
    assert want[19].x[:, :, 0].tolist() == [[4350, 148, 1097], [125, 1174, 1007]]  # as in every earlier version
    assert want[19].seeds == (5957291195729832734, 2031715849233284585)
    assert len({seed for batch in want for seed in batch.seeds}) == 40
    with loader(dataset) as jumping:
        for step in (17, 3, 4, 19, 0, 1, 0):
            assert same(jumping.train(step), want[step])
    with loader(dataset, seed=8) as other:
        assert not torch.equal(other.train(0).x, want[0].x)


def test_ranks_share_out_the_batch_of_one_process_and_evaluate_the_same_batches(tmp_path):
    dataset = unique(tmp_path)
    with loader(dataset, accumulation=6) as alone:
        want, evaluated = alone.train(5), [alone.evaluation(split, 4) for split in ("train", "val")]
    for batch, steps in ((want, 6), (evaluated[0], 1)):  # targets are the next tokens
        assert (batch.x.shape, batch.x.dtype) == ((steps, 3, 8), torch.int64)
        assert batch.x.is_contiguous()
        assert batch.y.is_contiguous()
        assert torch.equal(batch.x + 1, batch.y)
    for rank in range(3):
        with loader(dataset, accumulation=2, rank=rank, world_size=3) as part:
            assert all(map(same, [part.evaluation(split, 4) for split in ("train", "val")], evaluated))
            assert same(part.train(5), Batch(want.x[rank::3], want.y[rank::3], want.seeds[rank::3]))
    assert len(want.x[:, :, 0].unique()) == 18  # no sample twice in a step
    assert [batch.x[0, :, 0].tolist() for batch in evaluated] == [[3798, 353, 3849], [37, 15, 32]]


def test_drawing_from_nine_billion_tokens_makes_no_table_of_them(tmp_path):
    length = 9_000_000_000
    unique(tmp_path)
    os.truncate(tmp_path / "train.bin", 2 * length)  # a hole, which takes no disk space
    dataset = Dataset(tmp_path)
    dataset.check(8)  # too large to be read for the check
    with loader(dataset) as batches:
        assert batches.train(0).x.sum() == 0
        assert batches._draw("train", np.random.default_rng(0), 480).max() > length * 0.9


def test_a_bad_token_in_the_thread_reaches_the_caller(tmp_path):
    with (
        loader(unique(tmp_path, length=9), vocab_size=8) as batches,
        pytest.raises(UserError, match=r"train\.bin: token 8 at position 8, .*vocab_size=8"),
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
