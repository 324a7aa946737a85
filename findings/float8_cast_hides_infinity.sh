#!/usr/bin/env bash
# torch 2.13.0: a cast to float8_e4m3fn turns infinity into 448, and one to float8_e5m2 keeps it
#
# Source: torch.float8_e4m3fn, whose "fn" stands for finite with NaN; Micikevicius et al. 2022, "FP8 formats for deep learning".
# Expected: what the format cannot hold becomes its NaN, as in ml_dtypes (JAX, TensorFlow) and in the ONNX standard without
#   saturation, so that a model that has overflowed shows.
# Seen: infinity and 1e6 become 448, the largest value, and -1e6 becomes -448; only NaN stays NaN. The same values become infinity in
#   float8_e5m2 and NaN in ml_dtypes' type of the same name, bit patterns otherwise equal.
# bklm: stores nothing in 8 bits but int8, which passes NaN and infinity on as NaN (bklm/compression/int8_linear.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ml-dtypes==0.6.0 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
"$folder/env/bin/python" - <<'PY'
import ml_dtypes
import numpy as np
import torch

values = [float("inf"), 1e6, -1e6, 1.1, 100.3, float("nan")]
ours = torch.tensor(values).to(torch.float8_e4m3fn).float()
wide = torch.tensor(values).to(torch.float8_e5m2).float()
theirs = torch.from_numpy(np.array(values, np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
for name, found in (("torch e4m3fn", ours), ("torch e5m2", wide), ("ml_dtypes e4m3fn", theirs)):
    print(f"{name}: {found.tolist()}")
assert ours[:3].tolist() == [448.0, 448.0, -448.0]
assert ours[5].isnan()
assert wide[:3].tolist() == [float("inf"), float("inf"), -float("inf")]
assert theirs[:3].isnan().all()
assert torch.equal(ours[3:5], theirs[3:5])
print("As described above.")
PY
