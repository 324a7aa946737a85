"""Models by name: every class that records and files name is built from its own configuration."""

import dataclasses

import pytest

from bklm import models
from bklm.models.by_name import CLASSES, built, config_class


def test_every_class_of_a_language_model_is_among_them():
    known = {name for name in models.__all__ if hasattr(models, f"{name}Config")} | {"ContextTokenLM"}
    assert set(CLASSES) == known


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_and_its_settings_make_the_model(name):
    fields = {f.name for f in dataclasses.fields(config_class(name))}
    widths = dict.fromkeys(("d_model", "embed_dim", "hidden_dim", "context_dim", "units"), 8)
    small = widths | {"n_layers": 1, "n_heads": 1, "n_seq": 4}
    model = built(name, {"vocab_size": 11} | {k: v for k, v in small.items() if k in fields})
    assert type(model) is getattr(models, name)
    assert type(model.config) is config_class(name)
    assert model.vocab_size == 11
    assert type(built(name, dataclasses.asdict(model.config))) is type(model)
