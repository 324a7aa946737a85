"""The bar and the time left: what helpers do beside a trial counts once, whatever the trial's own process does."""

from __future__ import annotations

import pytest
from accelerate import Accelerator

from bklm.harness.progress import Progress
from bklm.harness.session import Session


@pytest.mark.parametrize("epochs", [1, 3])
def test_steps_of_helpers_stay_counted_when_a_trial_beside_them_ends(tiny_config, tmp_path, epochs):
    planned, of_helper = 30, 7
    with Session(tiny_config.resolved(), None, Accelerator(cpu=True), tmp_path, None) as session:
        session.progress = progress = Progress(2 * planned, shown=False)

        def train(folder):
            # Stopped early, or to the end; meanwhile a helper trains another one.
            progress.step(10 * epochs)
            progress.step_of_helper(of_helper)
            return {"val_ppl": 5.0, "seconds": 1.0}

        session.trial("trials/seed_0", {"seed": 0}, planned, train, {})
        assert (progress.done, progress.trained) == (planned + of_helper, 10 * epochs + of_helper)
        # The helper's own, once it is done: of its steps some were told.
        session._helped["trials/seed_1"] = of_helper
        (tmp_path / "trials" / "seed_1").mkdir()
        (tmp_path / "trials" / "seed_1" / "result.json").write_text('{"val_ppl": 5.0, "seconds": 1.0}')
        session.trial("trials/seed_1", {"seed": 1}, planned, train, {})
        assert progress.done == 2 * planned
        assert progress.time_left() == "; about 0 s left"
