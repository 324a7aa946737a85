#!/usr/bin/env bash
# torch 2.13.0, x86 engine: a dynamically quantised linear layer answers NaN with ordinary numbers, and infinity spoils other rows
#
# Source: torch.ao.quantization.quantize_dynamic of nn.Linear to int8, whose scale is taken from the input of each call.
# Expected: a row that holds NaN gives NaN and one that holds infinity gives infinity of the weight's sign, as the layer in float
#   does, so that a model that has diverged shows; other rows are as they are alone.
# Seen: [1, NaN, 2, 3] gives finite numbers. [1, infinity, 2, 3] gives infinities, several of the wrong sign, and the finite row
#   beside it in the same call gives infinity and NaN. The calls raise nothing and warn of nothing (quantize_dynamic itself warns
#   that it will move to torchao). A perplexity computed through such layers looks healthy where the model in float has none.
# bklm: its int8 modules check the range of what they are given and pass NaN on (bklm/compression/int8_linear.py, tests/test_int8_range.py).
set -euo pipefail
case "$(uname -m)" in x86_64 | amd64) ;; *) echo "cannot tell: this is about x86 processors" && exit 2 ;; esac
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
"$folder/env/bin/python" - <<'PY'
import warnings

import torch

torch.manual_seed(0)
layer = torch.nn.Sequential(torch.nn.Linear(4, 6))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    small = torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, torch.qint8)
print("engine", torch.backends.quantized.engine)
good = torch.tensor([[1.0, 2.0, 3.0, 4.0]])


def outputs(bad):
    """Of a row with this value, and of the good row beside it, in float and in int8."""
    rows = torch.cat((torch.tensor([[1.0, bad, 2.0, 3.0]]), good))
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        in_float, in_int8 = layer(rows), small(rows)
    assert not said
    print(f"{bad}: in float {in_float[0].tolist()}, in int8 {in_int8[0].tolist()}, the row beside it {in_int8[1].tolist()}")
    return in_float[0], *in_int8


with torch.no_grad():
    alone = small(good)[0]
in_float, in_int8, beside = outputs(float("nan"))
assert in_float.isnan().all()
assert in_int8.isfinite().all()
assert torch.allclose(beside, alone)
in_float, in_int8, beside = outputs(float("inf"))
assert in_float.isinf().all()
assert (in_int8.sign() != in_float.sign()).any()
assert not beside.isfinite().any()
print("As described above.")
PY
