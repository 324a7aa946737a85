"""Figures are whole: nothing that is drawn leaves the picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from bklm.studies.integration.figures import draw_switches

RESULTS = Path(__file__).parents[2] / "docs" / "results"
KEPT = sorted(RESULTS.glob("*.png"))
EDGE = 3  # pixels


def is_cut(path):
    picture = imread(path)[..., :3]
    inside = picture[EDGE:-EDGE, EDGE:-EDGE]
    return np.count_nonzero(picture < 0.98) > np.count_nonzero(inside < 0.98)


def test_a_tick_that_is_chosen_for_the_axes_last_width_lies_in_the_picture(tmp_path):
    """As laid out once, the last tick of the times left the picture."""
    rows = json.loads((RESULTS / "integration_summary.json").read_text(encoding="utf-8"))["switches"]
    assert not is_cut(draw_switches(tmp_path / "a.png", rows, "What stays", "Five seeds."))


@pytest.mark.parametrize("path", KEPT, ids=[path.stem for path in KEPT])
def test_no_kept_figure_is_cut(path):
    assert not is_cut(path)
