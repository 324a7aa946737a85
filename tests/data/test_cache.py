import errno
import json
import logging
import multiprocessing
import os

import numpy as np
import pytest

from bklm.data import Corpus, cache, tokenize_corpus
from bklm.data.cache import cache_folder, load_or_build

ARRAYS = {
    "a": np.arange(1000, dtype=np.uint16),
    "b": np.array([-5, 7], np.int32),
    "none": np.empty(0, np.uint8),
}


def build():
    return dict(ARRAYS)


def unexpected():
    raise AssertionError("built although cached")


def load(build=build, key="key"):
    return load_or_build("kind", key, tuple(ARRAYS), build)


def same(arrays):
    return all(
        arrays[name].dtype == a.dtype and arrays[name].tolist() == a.tolist() for name, a in ARRAYS.items()
    )


def test_an_entry_is_built_once_and_then_mapped_from_disk():
    assert same(load())
    again = load(unexpected)
    assert same(again)
    assert isinstance(again["a"], np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        again["a"][0] = 1


def test_entries_are_kept_apart_by_key():
    load(key="one")
    with pytest.raises(AssertionError):
        load(unexpected, key="other")


def damage_truncate(entry):
    (entry / "a.bin").write_bytes((entry / "a.bin").read_bytes()[:-7])


def damage_flip(entry):
    data = bytearray((entry / "a.bin").read_bytes())
    data[100] ^= 1
    (entry / "a.bin").write_bytes(data)


def damage_extend(entry):
    with (entry / "b.bin").open("ab") as file:
        file.write(bytes(4))


def damage_empty(entry):
    (entry / "a.bin").write_bytes(b"")


def damage_missing(entry):
    (entry / "b.bin").unlink()


def damage_index(entry):
    (entry / "index.json").write_text('{"a": ')


def damage_index_of_another_shape(entry):
    (entry / "index.json").write_text("[1]")


def damage_index_without_names(entry):
    (entry / "index.json").write_text("{}")


def damage_index_with_objects(entry):
    index = json.loads((entry / "index.json").read_text())
    index["a"]["dtype"] = "O"
    (entry / "index.json").write_text(json.dumps(index))


def damage_file_for_folder(entry):
    for path in entry.iterdir():
        path.unlink()
    entry.rmdir()
    entry.write_text("not a folder")


DAMAGES = [damage for name, damage in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_set_aside_reported_and_built_anew(damage, caplog):
    load()
    entry = cache_folder() / "kind" / "key"
    damage(entry)
    with caplog.at_level(logging.WARNING):
        assert same(load())
    assert "cannot be used" in caplog.text
    assert "set aside as key.damaged-0" in caplog.text
    assert (entry.parent / "key.damaged-0").exists()
    caplog.clear()
    assert same(load(unexpected))
    assert not caplog.records


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_an_entry_that_cannot_be_read_just_now_is_left_as_it_is(monkeypatch, caplog, code):
    load()

    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_read", fail)
        assert same(load())
    assert f"cannot be read ([Errno {code}] {os.strerror(code)}) and are left as they are" in caplog.text
    assert same(load(unexpected))


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_an_entry_is_as_open_to_others_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").touch()
        load()
    finally:
        os.umask(before)
    entry = cache_folder() / "kind" / "key"
    assert entry.stat().st_mode == (tmp_path / "folder").stat().st_mode
    assert {p.stat().st_mode for p in entry.iterdir()} == {(tmp_path / "file").stat().st_mode}


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BKLM_CACHE_DIR", str(tmp_path / "file"))
    assert same(load())
    assert "cannot be cached" in caplog.text
    assert "stay in memory" in caplog.text


def test_a_write_that_fails_half_way_leaves_nothing_behind(own_cache, monkeypatch, caplog):
    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dumps", full_disk)
    assert same(load())
    assert "No space left on device" in caplog.text
    assert list((own_cache / "kind").iterdir()) == []


def load_elsewhere(_):
    return same(load())


def test_processes_that_build_the_same_entry_at_once_all_get_it(own_cache):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert all(pool.map(load_elsewhere, range(16), chunksize=1))
    assert [path.name for path in (own_cache / "kind").iterdir()] == ["key"]


def test_the_folder_is_the_users_cache_unless_named(monkeypatch, tmp_path):
    monkeypatch.delenv("BKLM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "bklm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "bklm"


def test_tokens_are_cached_by_text_and_settings(own_cache):
    def entries():
        return len(list((own_cache / "tokens").iterdir()))

    text = Corpus("one", "here", ["a b c a"], ["a"], ["b"])
    first = tokenize_corpus(text)
    again = tokenize_corpus(Corpus("two", "elsewhere", [" a b c a ", ""], ["a"], ["b"]))
    assert entries() == 1
    assert again.train.tolist() == first.train.tolist()
    assert (again.name, again.vocab.words) == ("two", first.vocab.words)
    tokenize_corpus(text, 4)
    tokenize_corpus(Corpus("one", "here", ["a b c b"], ["a"], ["b"]))
    assert entries() == 3


def test_words_with_any_visible_character_survive_the_cache():
    text = Corpus("odd", "here", ["a\0b \ufeff é 😀 \u200b <unk> \x1b \\n"], ["a\0b"], ["😀"])
    first, cached = tokenize_corpus(text), tokenize_corpus(text)
    assert cached.vocab.words == first.vocab.words
    assert cached.valid.tolist() == [first.vocab.ids["a\0b"]]
