import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bklm.data import IGNORED, Vocabulary, get_wikitext2_dataloaders, make_loader, set_epoch, windows

IDS = np.arange(2, 1002, dtype=np.uint16)


def order(loader):
    """The first input of each window, in the order in which the loader gives them."""
    return torch.cat([x[:, 0] for x, _ in loader]).tolist()


@given(st.integers(2, 60), st.integers(1, 59), st.integers(1, 9))
def test_every_token_after_the_first_is_a_target_exactly_once(n, seq_len, batch_size):
    seq_len = min(seq_len, n - 1)
    data = windows(np.arange(10, 10 + n), seq_len, pad_id=3)
    loader = make_loader(data, min(batch_size, len(data)))
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert x.shape == y.shape == (len(data), seq_len)
    assert x.dtype == y.dtype == torch.int64
    real = y != IGNORED
    assert y[real].tolist() == list(range(11, 10 + n))
    assert x[real].tolist() == list(range(10, 9 + n))
    assert (x[~real] == 3).all()
    assert real.sum() == data.num_targets == n - 1


@given(st.integers(2, 60), st.integers(1, 59))
def test_disjoint_windows_are_the_originals_blocks(n, seq_len):
    seq_len = min(seq_len, n - 1)
    data = windows(np.arange(n), seq_len, "disjoint")
    blocks = torch.arange(n - n % (seq_len + 1)).view(-1, seq_len + 1)
    x, y = data[list(range(len(data)))]
    assert x.tolist() == blocks[:, :-1].tolist()
    assert y.tolist() == blocks[:, 1:].tolist()
    assert data.num_targets == y.numel()


def test_one_window_is_a_row_of_the_batch():
    data = windows(IDS, 7)
    x, y = data[[3, 142]]
    for row, index in enumerate((3, 142)):
        assert data[index][0].tolist() == x[row].tolist()
        assert data[index][1].tolist() == y[row].tolist()
    assert data[-1][0].tolist() == x[1].tolist()
    for outside in (len(data), [0, len(data)], [-1]):
        with pytest.raises(IndexError):
            data[outside]


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    def loader(**settings):
        return make_loader(windows(IDS, 9), 8, shuffle=True, **settings)

    torch.manual_seed(1)
    first = loader(seed=5)
    passes = [order(first) for _ in range(3)]
    torch.manual_seed(2)
    assert [order(loader(seed=5, epoch=epoch)) for epoch in range(3)] == passes
    assert len({tuple(one) for one in passes}) == 3
    assert all(sorted(one) == sorted(passes[0]) for one in passes)
    assert order(loader(seed=6)) != passes[0]
    set_epoch(first, 1)
    assert order(first) == passes[1]


def test_the_order_stays_the_same_from_version_to_version():
    assert order(make_loader(windows(np.arange(9), 1), 8, shuffle=True, seed=7)) == [4, 3, 6, 2, 1, 0, 5, 7]


def test_unshuffled_windows_come_in_order_in_every_pass():
    loader = make_loader(windows(IDS, 9), 8)
    assert order(loader) == order(loader) == list(range(2, 1001, 9))


def test_a_pass_leaves_torchs_global_generator_alone():
    before = torch.get_rng_state()
    order(make_loader(windows(IDS, 9), 8, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_pass_does_not_mind_another_default_device(shuffle, num_workers):
    """As under torch.set_default_device("cuda"): a CPU's generator cannot draw there; on "meta" nothing can be drawn."""
    data = windows(np.arange(50), 4)
    want = list(make_loader(data, 3, shuffle=shuffle, seed=1))
    torch.set_default_device("meta")
    try:
        loader = make_loader(data, 3, shuffle=shuffle, seed=1, num_workers=num_workers)
        found = list(loader)
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for x, y in zip(found, want, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(
    "index", [np.int64(2), np.array(2), torch.tensor(2), torch.tensor(2, dtype=torch.uint8), -11]
)
def test_every_kind_of_number_is_an_index(index):
    data = windows(np.arange(50), 4)
    assert all(torch.equal(a, b) for a, b in zip(data[index], data[2], strict=True))
    assert [x.tolist() for x in data[[int(index) % 13]]] == [x[None].tolist() for x in data[index]]


def test_accelerate_gives_the_same_batches():
    accelerate = pytest.importorskip("accelerate")
    plain = make_loader(windows(IDS, 9), 8, shuffle=True, seed=1)
    prepared = accelerate.Accelerator(cpu=True).prepare(make_loader(windows(IDS, 9), 8, shuffle=True, seed=1))
    assert [order(prepared) for _ in range(2)] == [order(plain) for _ in range(2)]
    set_epoch(plain, 7)
    set_epoch(prepared, 7)
    assert order(prepared) == order(plain)


def test_accelerate_shares_every_window_among_processes_once():
    accelerate = pytest.importorskip("accelerate")
    shares = []
    for process in range(2):
        loader = make_loader(windows(IDS, 9), 8, shuffle=True, seed=1)
        shared = accelerate.data_loader.prepare_data_loader(
            loader, num_processes=2, process_index=process, even_batches=False, put_on_device=False
        )
        shares.append(order(shared.base_dataloader if hasattr(shared, "base_dataloader") else shared))
    assert sorted(shares[0] + shares[1]) == list(range(2, 1001, 9))


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_last_batch_may_be_smaller_or_dropped(drop_last):
    sizes = [len(x) for x, _ in make_loader(windows(IDS, 9), 50, drop_last=drop_last)]
    assert sizes == ([50, 50] if drop_last else [50, 50, 11])


@pytest.mark.slow
def test_workers_give_the_same_batches_in_silence():
    script = """
import numpy as np
from bklm.data import Vocabulary, make_loader, windows

ids = Vocabulary.train(["a b c"] * 9, 9).encode(["a b c"] * 300)
one, two = (make_loader(windows(ids, 7), 8, shuffle=True, num_workers=n) for n in (0, 2))
for _ in range(2):
    assert all((a == c).all() and (b == d).all() for (a, b), (c, d) in zip(one, two, strict=True))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_wikitext_loaders_keep_the_contract(text_folder):
    train_loader, val_loader, vocab_size = get_wikitext2_dataloaders(
        batch_size=2, seq_len=8, data_dir=text_folder
    )
    assert vocab_size == 14  # 12 words, <pad> and <unk>
    for loader in (train_loader, val_loader):
        batches = list(loader)
        assert [len(x) for x, _ in batches] == [2, 1]
        for x, y in batches:
            assert x.shape == y.shape == (len(x), 8)
            assert x.dtype == y.dtype == torch.int64
            assert (x[:, 1:] == y[:, :-1])[y[:, 1:] != IGNORED].all()
        assert sum(int((y != IGNORED).sum()) for _, y in batches) == 20  # 21 tokens, the first is no target
    lines = (text_folder / "train.txt").read_text().split("\n")
    expected = Vocabulary.train(lines, 30_000).encode("= beta = some beta text , <unk>")
    assert next(iter(val_loader))[0][0].tolist() == expected.tolist()


def test_a_small_validation_text_does_not_limit_the_batch(tmp_path):
    for split, words in (("train", 100), ("valid", 9), ("test", 9)):
        (tmp_path / f"{split}.txt").write_text("a b " * words)
    _, val_loader, _ = get_wikitext2_dataloaders(batch_size=20, seq_len=8, data_dir=tmp_path)
    assert [x.shape for x, _ in val_loader] == [(3, 8)]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"batch_size": 0}, "batch_size is 0; give a whole number from 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5; give a whole number from 1"),
        ({"batch_size": True}, "batch_size is True; give a whole number from 1"),
        ({"batch_size": 33}, "batch_size 33 is larger than the data: there are 5 windows"),
        ({"seq_len": 0}, "seq_len is 0; give a whole number from 1"),
        ({"seq_len": 21}, "seq_len 21 is longer than the text: it has 21 tokens and a window takes seq_len"),
        ({"num_workers": -1}, "num_workers is -1; give a whole number from 0"),
        ({"vocab_size_limit": 2}, "vocab_size_limit is 2; give a whole number from 3"),
        ({"layout": "sliding"}, "layout 'sliding' is unknown; choose 'every-target-once' or 'disjoint'"),
        ({"seed": -1}, "seed is -1; give a whole number from 0"),
        ({"max_train_tokens": 0}, "max_train_tokens is 0; give a whole number from 2, or None for all"),
        ({"max_train_tokens": 3}, "seq_len 4 is longer than the text: it has 3 tokens"),
    ],
)
def test_bad_settings_are_one_sentence(settings, sentence, text_folder):
    with pytest.raises(ValueError) as caught:
        get_wikitext2_dataloaders(**{"batch_size": 2, "seq_len": 4, "data_dir": text_folder} | settings)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_numbers_are_refused_before_the_text_is_looked_for():
    with pytest.raises(ValueError, match="num_workers"):
        get_wikitext2_dataloaders(num_workers=-1, data_dir="/no/such/folder")
