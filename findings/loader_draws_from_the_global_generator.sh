#!/usr/bin/env bash
# torch 2.13.0: reading a DataLoader that shuffles nothing changes the dropout that comes after it
#
# Source: torch.utils.data.DataLoader, whose argument generator is said to be for RandomSampler and for the workers' base seed.
# Expected: with shuffle=False and num_workers=0 nothing is drawn, so that an evaluation between two epochs leaves training as it is.
# Seen: every pass over the loader draws one number from torch's global generator, for workers that are not there. Training with an
#   evaluation in between has other dropout masks than without, and one with two evaluations others again. A generator of the
#   loader's own, generator=torch.Generator(), keeps the global one as it was.
# bklm: its loaders have a generator of their own (bklm/data/loaders.py), and tests hold that scoring changes no training.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
"$folder/env/bin/python" - <<'PY'
import torch
from torch.utils.data import DataLoader


def mask_after(passes, **settings):
    """The dropout mask that follows so many passes over a loader."""
    torch.manual_seed(0)
    loader = DataLoader(range(3), shuffle=False, num_workers=0, **settings)
    for _ in range(passes):
        assert len(list(loader)) == 3
    return torch.nn.functional.dropout(torch.ones(64), 0.5).tolist()


masks = [mask_after(passes) for passes in range(3)]
print("masks after 0, 1 and 2 passes: all different" if len(set(map(tuple, masks))) == 3 else "masks agree")
assert masks[0] != masks[1] != masks[2] != masks[0]
assert mask_after(2, generator=torch.Generator()) == masks[0]
print("with a generator of the loader's own: as if nothing had been read")
print("As described above.")
PY
