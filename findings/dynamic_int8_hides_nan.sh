#!/usr/bin/env bash
# torch 2.13.0, x86 engine: a dynamically quantised linear layer answers NaN and infinity with ordinary numbers
#
# Source: torch.ao.quantization.quantize_dynamic of nn.Linear to int8, whose scale is taken from the input of each call.
# Expected: a row that holds NaN gives NaN, as the layer in float does, so that a model that has diverged shows.
# Seen: every output is finite for an input with NaN, and signs differ from the float layer's for an infinite one; nothing is
#   raised or warned of. A perplexity computed through such layers looks healthy where the model in float has none.
# bklm: its int8 modules check the range of what they are given and pass NaN on (bklm/compression/int8_linear.py, tests/test_int8_range.py).
set -euo pipefail
case "$(uname -m)" in x86_64 | amd64) ;; *) echo "for x86 processors only" && exit 0 ;; esac
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/env/bin/python" -W ignore - <<'PY'
import torch

torch.manual_seed(0)
layer = torch.nn.Sequential(torch.nn.Linear(4, 3))
small = torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, torch.qint8)
print("engine", torch.backends.quantized.engine)
row = torch.tensor([[1.0, float("nan"), 2.0, 3.0]])
with torch.no_grad():
    in_float, in_int8 = layer(row), small(row)
print("float:", in_float.tolist(), "int8:", in_int8.tolist())
assert in_float.isnan().all()
assert in_int8.isfinite().all()
print("As described above.")
PY
