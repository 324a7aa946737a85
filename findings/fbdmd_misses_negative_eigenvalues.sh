#!/usr/bin/env bash
# pydmd 2025.8.1: forward-backward DMD finds no eigenvalue left of the imaginary axis, and others of exact data to three digits
#
# Source: pydmd.FbDMD, "forward/backward DMD" (Dawson et al. 2016), meant to take away the bias that noise gives to DMD.
# Expected: without noise it finds what DMD finds, to rounding: for x(t + 1) = A x(t) the eigenvalues of A.
# Seen: a rotation by 2 rad a step (-0.395 +- 0.864i) is given as 0.395 +- 0.864i, one by 1 rad right; diag(-0.9, 0.7) as
#   0.764 +- 0.215i, and diag(0.9, 0.7) as 0.8993 and 0.7005. The operator is the principal square root of forward times inverse
#   backward, which has no eigenvalue on the left; and the two stand in the singular vectors of the first and of the following
#   snapshots, which differ. The reconstruction is wrong accordingly; DMD's is right to 1e-9 in all cases.
# bklm: its dmd fits forward only; noise is measured, not corrected (bklm/models/koopman.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet pydmd==2025.8.1 numpy==2.4.6 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
"$folder/env/bin/python" - <<'PY'
import warnings

import numpy as np
import pydmd

warnings.simplefilter("ignore")


def rotation(angle):
    return 0.95 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def found(kind, matrix):
    """Eigenvalues by angle, then size, and the largest error of the reconstruction of 20 exact snapshots."""
    states = [np.ones(2)]
    for _ in range(19):
        states.append(matrix @ states[-1])
    model = kind(svd_rank=2)
    model.fit(np.array(states).T)
    values = sorted(model.eigs.astype(complex), key=lambda z: (round(np.angle(z), 6), abs(z)))
    return np.array(values), np.abs(model.reconstructed_data - np.array(states).T).max()


cases = {
    "rotation by 1 rad": (rotation(1), 0.95 * np.exp([-1j, 1j]), 0.95 * np.exp([-1j, 1j])),
    "rotation by 2 rad": (rotation(2), 0.95 * np.exp([-2j, 2j]), [0.3953 - 0.8638j, 0.3953 + 0.8638j]),
    "diag(-0.9, 0.7)": (np.diag([-0.9, 0.7]), [0.7, -0.9], [0.7642 - 0.2146j, 0.7642 + 0.2146j]),
    "diag(0.9, 0.7)": (np.diag([0.9, 0.7]), [0.7, 0.9], [0.7005, 0.8993]),
}
for name, (matrix, exact, both_ways) in cases.items():
    (forward, small), (both, error) = (found(kind, matrix) for kind in (pydmd.DMD, pydmd.FbDMD))
    print(f"{name}: DMD {forward.round(4)}, FbDMD {both.round(4)}, reconstructed within {small:.0e} and {error:.0e}")
    assert np.allclose(forward, exact, atol=1e-9)
    assert small < 1e-9
    assert np.allclose(both, both_ways, atol=2e-4)
print("As described above.")
PY
