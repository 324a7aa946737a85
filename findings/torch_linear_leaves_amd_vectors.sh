#!/usr/bin/env bash
# torch 2.13.0: on an AMD with AVX-512 a float32 linear map takes MKL's generic kernel, beside a oneDNN with one twice as fast
#
# Source: torch's wheel for a CPU carries both libraries; torch.nn.functional.linear and torch.mm give float32 to oneMKL 2024.0,
#   torch.compile's CPU backend puts mkldnn::_linear_pointwise in their place.
# Expected: the eager product is by the library whose kernel fits the processor, or the page on CPU performance names the choice.
# Seen: MKL says that it is set for "Intel(R) Architecture processors", without a name of vectors, oneDNN that it takes avx512_core.
#   One thread of an AMD EPYC (family 26) took 0.45 of MKL's time for x W^T of 1024 rows, 224 to 448, with oneDNN, and 0.6 for a
#   weight's gradient (timed once; below the two are only asked what they use).
# bklm: linear maps of its models, forward and backward, go to oneDNN on a processor that is not Intel's (bklm/moe/products.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! grep -q AuthenticAMD /proc/cpuinfo || ! grep -q avx512f /proc/cpuinfo; then
    echo "cannot tell: this needs an AMD processor with AVX-512" && exit 2
fi
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
MKL_VERBOSE=1 ONEDNN_VERBOSE=1 "$folder/env/bin/python" - >"$folder/said" <<'PY'
import torch

x, w = torch.randn(512, 512), torch.randn(512, 512)
torch.nn.functional.linear(x, w)
torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
PY
grep -E "^MKL_VERBOSE|primitive,exec" "$folder/said" | cut -c1-200
# The first line of MKL names its kernels, a line with SGEMM the eager product; of oneDNN's, one is the second product.
grep -q "^MKL_VERBOSE oneMKL .* Intel(R) Architecture processors" "$folder/said"
grep -q "^MKL_VERBOSE SGEMM" "$folder/said"
if grep "^MKL_VERBOSE oneMKL" "$folder/said" | grep -q "AVX-512\|Vector Extensions"; then exit 1; fi
test "$(grep -c "primitive,exec,cpu,inner_product.*avx512_core" "$folder/said")" = 1
echo "As described above."
