"""Whatever is put into a study's settings, there is a config or one sentence: never a hang, never another kind of error."""

from __future__ import annotations

import contextlib
import io
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bklm.harness.cli import parse
from bklm.studies import BaselineConfig, EmbeddingFreezeConfig, GradBlendConfig, PrecisionConfig

CONFIGS = (GradBlendConfig, PrecisionConfig, BaselineConfig, EmbeddingFreezeConfig)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 2**63, 1e308, -0.0, math.nan, math.inf])
WORDS = st.text(max_size=12) | st.sampled_from(
    ["grid", "nan", "1e999", "0,,1", "[]", "True", "٣", "0x10", " ", "\0"]
)
PLAIN = st.none() | st.booleans() | NUMBERS | WORDS | st.binary(max_size=4)
ANY = (
    PLAIN | st.lists(PLAIN, max_size=4) | st.dictionaries(WORDS, PLAIN, max_size=2) | st.tuples(st.lists(PLAIN))
)


@st.composite
def given_fields(draw) -> tuple[type, dict]:
    """A study's config and values for some of its fields: a few senseless ones, the others by themselves allowed."""
    config_class = draw(st.sampled_from(CONFIGS))
    names = draw(st.lists(st.sampled_from(config_class.names()), max_size=4, unique=True))
    specs = {spec.name: spec for spec in config_class.specs()}

    def near(spec) -> st.SearchStrategy:
        if spec.choices:
            return st.sampled_from(spec.choices) | ANY
        low, high = spec.low or 0, spec.high or 10**6
        return st.integers(int(low) - 1, int(high) + 1) | st.floats(low, high) | ANY

    return config_class, {name: draw(near(specs[name])) for name in names}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(given_fields())
def test_any_values_give_a_config_that_survives_json_or_one_sentence_that_names_a_field(case):
    config_class, values = case
    try:
        config = config_class(**values).resolved()
    except ValueError as error:
        refusal = str(error)
        assert "\n" not in refusal.replace(repr(values), "")
        assert any(name in refusal for name in config_class.names()), refusal
        return
    again = config_class(**json.loads(json.dumps(config.to_dict(), allow_nan=False))).resolved()
    assert again == config
    assert config.differences(config.to_dict()) == []


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(CONFIGS), st.lists(st.tuples(st.booleans(), st.integers(0, 99), WORDS), max_size=3))
def test_any_command_line_gives_a_config_or_ends_with_a_sentence(config_class, parts):
    names = config_class.names()
    words = [
        w
        for is_flag, number, value in parts
        for w in ((f"--{names[number % len(names)]}",) if is_flag else ()) + (value,)
    ]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            parse(config_class, words)
    except SystemExit as end:
        assert end.code in (0, 2)  # noqa: PT017
        assert "Traceback" not in printed.getvalue()
    except ValueError as error:  # the schema's own, which the command prints and ends with code 2
        assert any(name in str(error) for name in names)  # noqa: PT017


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize("value", [b"\xff", {"a": 1}, object(), [[1]], (None,), [math.nan]])
def test_values_of_odd_kinds_are_refused_by_every_field_that_does_not_take_text(config_class, value):
    for spec in config_class.specs():
        if spec.base is str:
            continue
        with pytest.raises(ValueError, match=rf"^{spec.name}: got "):
            config_class(**{spec.name: value})
