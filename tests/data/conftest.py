import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Every test has an empty cache of its own and no data folder in the environment."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BKLM_CACHE_DIR", str(folder))
    monkeypatch.delenv("BKLM_DATA_DIR", raising=False)
    return folder


@pytest.fixture
def text_folder(tmp_path):
    """A folder with three small text files in WikiText's layout."""
    for split, word in (("train", "alpha"), ("valid", "beta"), ("test", "gamma")):
        text = f" \n = {word} = \n \n some {word} text , <unk> and more \n = = Part = = \n the end \n = Next = \n x \n"
        (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8")
    return tmp_path
