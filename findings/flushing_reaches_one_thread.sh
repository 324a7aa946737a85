#!/usr/bin/env bash
# torch 2.13.0: set_flush_denormal reaches the calling thread alone, so a product is half flushed, half not
#
# Source: torch.set_flush_denormal, "Disables denormal floating numbers on CPU."
# Expected: from the call on every operation of the process gives 0 below 1.2e-38; or the page names threads.
# Seen: with two threads that torch has already begun, 1e-40 times 1 is 0 in one half of a tensor and 1e-40 in the other, so that
#   bits depend on the number of threads and on what ran before. Called before torch has begun its threads, it reaches them: all
#   is 0. The same for what is slow with such numbers: a step of a saturated torch.nn.LSTM takes 4.6 s without flushing, 1.5 s
#   with flushing set late and 0.27 s with flushing set first (two threads of an Intel Xeon; not repeated below).
# bklm: a study sets it as it opens its folder, before anything is computed, and sets it back at its end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
for order in late first; do
    OMP_NUM_THREADS=2 "$folder/env/bin/python" - "$order" <<'PY'
import sys

import torch

late = sys.argv[1] == "late"
can = late or torch.set_flush_denormal(True)
tiny = torch.full((1 << 20,), 2.0**-126)
if late:
    can = torch.set_flush_denormal(True)
if not can:
    print("cannot tell: this processor cannot flush")
    raise SystemExit(2)
share = (tiny * 2.0**-4 == 0).double().mean().item()
print(f"flushing set {sys.argv[1]}: {share:.0%} of the products are 0")
assert share == (0.5 if late else 1.0)
PY
done
echo "As described above."
