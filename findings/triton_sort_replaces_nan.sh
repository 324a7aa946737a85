#!/usr/bin/env bash
# triton 3.9.0, interpreter: tl.sort of a row with NaN returns a row that is no permutation of it
#
# Source: triton.language.sort, "sorts a tensor along a specified dimension".
# Expected: NaN goes to one end, as with torch.sort and numpy.sort, or stays somewhere; the other values are all there.
# Seen: [3, NaN, -1, 2] gives [-1, 2, 3, 3]: the NaN is gone and 3 stands twice. The network of comparisons takes the smaller and the
#   larger of each pair by functions that skip NaN, so that both are the number. A top-k of such a row, a router's for instance,
#   looks healthy.
# bklm: its kernels sort nothing, and a model that has diverged is found by its loss.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 triton==3.9.0 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
"$folder/env/bin/python" - <<'PY'
import os
import sys
import tempfile

# Triton reads a kernel's source from its file.
KERNEL = """
import torch
import triton
import triton.language as tl


@triton.jit
def kernel(source, target, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(target + place, tl.sort(tl.load(source + place)))


def sort(row):
    result = torch.empty_like(row)
    kernel[(1,)](row, result, len(row))
    return result
"""
os.environ["TRITON_INTERPRET"] = "1"
with tempfile.TemporaryDirectory() as folder:
    with open(os.path.join(folder, "sorting.py"), "w") as file:
        file.write(KERNEL)
    sys.path.insert(0, folder)
    import torch
    from sorting import sort

    plain = sort(torch.tensor([3.0, 5.0, -1.0, 2.0])).tolist()
    with_nan = sort(torch.tensor([3.0, float("nan"), -1.0, 2.0])).tolist()
print(f"[3, 5, -1, 2] gives {plain}; [3, NaN, -1, 2] gives {with_nan}")
assert plain == [-1.0, 2.0, 3.0, 5.0]
assert with_nan == [-1.0, 2.0, 3.0, 3.0]
print("As described above.")
PY
