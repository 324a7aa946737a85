"""Whatever happened to the bytes of a checkpoint or a result, it is used as it was written or set aside with a sentence."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bklm.batch.plan import read_runs
from bklm.files.atomic import read_result
from bklm.training.checkpoints import CheckpointFolder

FILES = ("model.safetensors", "state.pt", "sums.json")
SLOW_IS_FINE = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def saved(place: Path) -> CheckpointFolder:
    folder = CheckpointFolder(place, keep=2)
    for epoch in (1, 2):
        model = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(model.weight, epoch)
        folder.save(epoch, model, {"epoch": epoch, "moments": torch.full((4,), float(epoch))})
    return folder


@SLOW_IS_FINE
@given(
    st.sampled_from(FILES), st.integers(0, 10**6), st.sampled_from(["flip", "cut", "insert", "replace", "remove"]),
    st.binary(min_size=1, max_size=40),
)  # fmt: skip
def test_a_checkpoint_with_any_damage_is_set_aside_and_the_one_before_is_used(name, where, damage, data):
    with tempfile.TemporaryDirectory() as place:
        folder = saved(Path(place))
        file = Path(place) / "epoch_0002" / name
        content = file.read_bytes()
        at = where % len(content)
        file.write_bytes(
            {
                "flip": content[:at] + bytes([content[at] ^ (data[0] or 1)]) + content[at + 1 :],
                "cut": content[:at],
                "insert": content[:at] + data + content[at:],
                "replace": data,
                "remove": b"",
            }[damage]
        )
        if damage == "remove":
            file.unlink()
        model = torch.nn.Linear(3, 2)
        _, state = folder.restore(model)
        assert torch.equal(model.weight, torch.full((2, 3), float(state["epoch"])))
        assert torch.equal(state["moments"], torch.full((4,), float(state["epoch"])))
        if name != "sums.json":
            assert state["epoch"] == 1
            assert (Path(place) / "epoch_0002.damaged-1").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@SLOW_IS_FINE
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_result_of_any_bytes_is_a_mapping_with_what_is_needed_or_set_aside(content):
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "result.json"
        path.write_bytes(content)
        found = read_result(path, {"seed": int, "epochs": list})
        if found is None:
            assert (Path(place) / "result.json.damaged-1").read_bytes() == content
        else:
            assert found == json.loads(content)
            assert isinstance(found["epochs"], list)


def test_a_result_nested_deeper_than_python_reads_is_set_aside(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("[" * 100_000)
    assert read_result(path) is None
    assert (tmp_path / "result.json.damaged-1").exists()


YAML_LINES = st.lists(
    st.sampled_from(
        [
            "runs:",
            "- notebook: x.ipynb",
            "  - notebook: [1]",
            "  grid: {a: [1]}",
            "parameters: {}",
            "!!python/object:os.system {}",
        ]
    )
    | st.text(max_size=20),
    max_size=6,
)


@SLOW_IS_FINE
@given(
    YAML_LINES.map("\n".join) | JSON.map(json.dumps) | st.builds(lambda runs: json.dumps({"runs": runs}), JSON)
)
def test_any_text_in_the_place_of_parameter_sets_is_refused_in_one_sentence(text):
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "sets.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            read_runs(path)
        except ValueError as error:
            assert str(error).startswith(str(path))  # noqa: PT017
            return
    raise AssertionError("no notebook exists here, and yet there are runs")
