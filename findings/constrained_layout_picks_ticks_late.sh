#!/usr/bin/env bash
# matplotlib 3.11.2: layout="constrained" leaves room for the ticks of the axes' old width, and the new last one is cut
#
# Source: matplotlib.org, constrained layout guide: axes are adjusted so that tick labels, axis labels, legends and titles fit;
#   since pull request 11062 the layout is computed twice at each drawing.
# Expected: whatever is drawn lies within the figure at the first savefig.
# Seen: of two panels the right one's axis has other ticks once the layout has made it narrower, a label of the last of them
#   reaches over the figure's right edge, and it is saved so. Drawn a second time, the same figure is whole.
# bklm: save_figure draws once before it saves, and a test looks at the edges of every kept picture.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet matplotlib==3.11.2 numpy==2.4.6 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
"$folder/env/bin/python" - <<'PY'
import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

matplotlib.rcParams["font.size"] = 13


def last_label_ends(draws):
    """Pixels beyond the figure's right edge (below 0: within it) of the last visible tick label, and its words."""
    figure = Figure(figsize=(7.2, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    left, right = figure.subplots(1, 2, sharey=True)
    left.plot([0, 1], [0, 1])
    left.set_yticks([0, 1], ["n" * 20, "k"])
    right.plot([0.61, 1.22], [0, 1])
    for _ in range(draws):
        canvas.draw()
    low, high = right.get_xlim()
    shown = [t for t in right.get_xticklabels() if low <= t.get_position()[0] <= high]
    return shown[-1].get_window_extent(canvas.get_renderer()).x1 - figure.bbox.width, shown[-1].get_text()


once, words = last_label_ends(1)
twice, _ = last_label_ends(2)
print(f"the label {words} ends {once:.1f} pixels beyond the figure drawn once, {twice:.1f} drawn twice")
assert once > 0
assert twice <= 0
print("As described above.")
PY
