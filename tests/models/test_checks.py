"""Names and types: every field of every model's configuration, and places given as numbers, refused in one sentence."""

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import bklm
from bklm import models
from bklm.data import make_loader, windows
from bklm.models import GPT, GPTConfig, future_leak
from bklm.models.koopman import dmd, edmd
from bklm.training.auxiliary import WithTerm

CONFIGS = {name: getattr(models, name) for name in models.__all__ if name.endswith("Config")}
FIELDS = [
    (name, field.name, field.type)
    for name, config in CONFIGS.items()
    for field in dataclasses.fields(config)
    if field.type in ("int", "float") and field.name != "vocab_size"
]


@pytest.mark.parametrize(("config", "field", "kind"), FIELDS)
def test_a_field_that_is_no_number_is_refused_by_its_name(config, field, kind):
    mixer = {"mixer": "solve"} if config == "ResNetBKConfig" else {}
    needed = {"d_model": 8, "n_layers": 1, "n_heads": 2, "n_seq": 8} if config == "GPTConfig" else {}
    for value in ("1", None, True, torch.tensor(1), 1j, [1]):
        with pytest.raises(TypeError, match=rf"^{field}: got .*; it must be a (whole )?number") as caught:
            CONFIGS[config](20, **{**mixer, **needed, field: value})
        assert "\n" not in str(caught.value)
    if kind == "int":
        with pytest.raises(TypeError, match=rf"it must be a whole number of Python's own: give int\({field}\)"):
            CONFIGS[config](20, **{**mixer, **needed, field: np.int64(1)})
    CONFIGS[config](20, **mixer, **needed)


def test_places_and_counts_are_whole_numbers_however_they_are_written():
    model, ids = GPT(GPTConfig(20, 8, 1, 2, 8, 0.0)).eval(), torch.randint(0, 20, (2, 6))
    want = future_leak(model, ids, 3)
    for three in (torch.tensor(3), np.int64(3), np.array(3)):
        assert torch.equal(future_leak(model, ids, three), want)
        assert torch.equal(model.generate(ids[:, :2], three, 0.0), model.generate(ids[:, :2], 3, 0.0))
    for value in (3.0, "3", None, torch.tensor(3.0)):
        with pytest.raises(TypeError, match=r"^position: got .*; it must be a whole number, 1 to 5\.$"):
            future_leak(model, ids, value)
        with pytest.raises(TypeError, match=r"^max_new_tokens: got .*; it must be an integer, 0 or more\.$"):
            model.generate(ids, value)
    x = torch.randn(9, 3)
    assert torch.equal(dmd(x, x, torch.tensor(2)), dmd(x, x, 2))
    with pytest.raises(TypeError, match=r"^rank: got 2\.0; it must be a whole number"):
        dmd(x, x, 2.0)
    with pytest.raises(TypeError, match=r"^ridge: got '1'; it must be a number\.$"):
        edmd(x, x, "1")
    for field, more in (("weight", {"weight": "1"}), ("limit", {"weight": 1.0, "limit": "1"})):
        with pytest.raises(TypeError, match=rf"^{field}: got '1'; it must be a number"):
            WithTerm(model, torch.nn.Identity(), **more)


def test_a_text_is_checked_before_its_windows_are_asked_for():
    ids = list(range(20))
    for given in (ids, torch.tensor(ids), np.array(ids, np.uint16)):
        assert next(iter(make_loader(windows(given, 4), 2)))[0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for given in (torch.tensor(3), np.ones((2, 20), int), np.ones(20), ["a"] * 20):
        with pytest.raises(
            TypeError, match=r"^token ids must be a one-dimensional array of integers, not .*\)$"
        ):
            windows(given, 4)


def test_numbers_drawn_from_a_generator_say_on_which_device():
    """Else torch.set_default_device("cuda") would have the generator of a CPU draw there, which torch refuses."""
    draws = ("rand", "randn", "randint", "randperm", "normal")
    for file in Path(bklm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in [f"torch.{name}" for name in draws]:
                given = {keyword.arg for keyword in node.keywords}
                assert "generator" not in given or "device" in given, f"{file}:{node.lineno}"
