"""While a study trains, numbers below float32's range are 0: with them a saturated LSTM takes ten times as long."""

import threading

import pytest
import torch

from bklm.harness.study import run_study
from bklm.studies.grad_blend.config import GradBlendConfig
from bklm.training.denormals import flushed_denormals

# A normal float32 becomes one that is not, in an operation.
SMALL = torch.full((), 2.0**-126)


def has_small_numbers() -> bool:
    return bool(SMALL * 2.0**-4 != 0)


def test_small_numbers_are_0_inside_also_in_a_thread_begun_there_and_come_back():
    found = []
    with flushed_denormals():
        if has_small_numbers():
            pytest.skip("this processor cannot flush")
        begun = threading.Thread(target=lambda: found.append(has_small_numbers()))
        begun.start()
        begun.join()
        with flushed_denormals():
            pass
        found.append(has_small_numbers())
        with pytest.raises(KeyError), flushed_denormals(False):
            raise KeyError
        found.append(has_small_numbers())
    assert found == [False, False, False]
    assert has_small_numbers()
    with flushed_denormals(False):
        assert has_small_numbers()


@pytest.mark.parametrize("reads_a_text", [True, False])
def test_a_study_that_trains_on_a_text_flushes_and_one_of_precision_does_not(reads_a_text, tmp_path):
    with flushed_denormals():
        can = not has_small_numbers()
    config = GradBlendConfig(profile="smoke", output_dir=str(tmp_path), device="cpu", workers=1)
    seen = run_study(
        config, lambda study: has_small_numbers(), lambda study, found: found,
        prepare=(lambda config: None) if reads_a_text else None,
    )  # fmt: skip
    assert seen != (reads_a_text and can)
    assert has_small_numbers()
