#!/usr/bin/env bash
# torchao 0.18.0 on torch 2.13.0: on an x86 processor without VNNI its int8 layers give wrong numbers and say nothing
#
# Source: torchao.quantization.quantize_ with Int8DynamicActivationInt8WeightConfig, whose layers sum through torch._int_mm;
#   ONEDNN_MAX_CPU_ISA=AVX2 makes oneDNN compute as a processor without VNNI does.
# Expected: sums of products of int8 numbers are whole numbers that 32 bits hold, the same on every processor; the layer differs
#   from the float one by its rounding, below 1%.
# Seen: without VNNI pairs of products are added in 16 bits and saturate. 64 products of 127 by 127 sum to less than 64 * 127**2;
#   a layer on 33 normal rows of 256 inputs has a relative error of more than 10%, where it has less than 1% with VNNI.
#   Nothing is raised and nothing warned of: two machines give a model two perplexities.
# bklm: with_torchao_products refuses such a processor; its own int8 products are asked for one sum first, and computed another way
#   where that is wrong (bklm/compression/products.py, tests/compression/test_int8_products.py).
set -euo pipefail
case "$(uname -m)" in x86_64 | amd64) ;; *) echo "cannot tell: this is about x86 processors" && exit 2 ;; esac
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet torch==2.13.0 torchao==0.18.0 numpy==2.4.6 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
cat >"$folder/ask.py" <<'PY'
import logging
import warnings

import torch

# What it says as it is imported is of other things.
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

logging.disable(logging.NOTSET)
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger().addHandler(handler)
warnings.simplefilter("always")
warnings.showwarning = lambda message, *rest: said.append(str(message))
torch.manual_seed(0)
layer = torch.nn.Sequential(torch.nn.Linear(256, 96)).eval()
rows = torch.randn(33, 256)
with torch.no_grad():
    wanted = layer(rows)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    found = layer(rows)
largest = torch.full((32, 64), 127, dtype=torch.int8)
total = int(torch._int_mm(largest, largest.t())[0, 0])
about = [words for words in said if any(w in words.lower() for w in ("saturat", "overflow", "vnni", "isa"))]
print(total, float((found - wanted).norm() / wanted.norm()), len(about))
PY
without=$(ONEDNN_MAX_CPU_ISA=AVX2 "$folder/env/bin/python" "$folder/ask.py") || { echo "asking without VNNI failed" && exit 1; }
asked=$("$folder/env/bin/python" "$folder/ask.py") || { echo "asking as it is here failed" && exit 1; }
read -r sum error said <<<"$without"
read -r here here_error _ <<<"$asked"
echo "without VNNI: 64 products of 127 by 127 sum to $sum in place of $((64 * 127 * 127)), relative error of a layer $error"
echo "as it is here: $here, $here_error"
python3 - "$sum" "$error" "$here" "$here_error" "$said" <<'PY'
import sys

total, error, here, here_error = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
assert total < 64 * 127**2
assert error > 0.1
assert int(sys.argv[5]) == 0
# With VNNI or AMX.
if here == 64 * 127**2:
    assert here_error < 0.01
print("As described above.")
PY
