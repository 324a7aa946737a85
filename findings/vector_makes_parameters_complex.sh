#!/usr/bin/env bash
# torch 2.13.0: parameters_to_vector and back make the real parameters of a module complex
#
# Source: torch.nn.utils.parameters_to_vector and vector_to_parameters, "copy slices of a vector into an iterable of parameters".
# Expected: a module with real and complex parameters gets its own back, each with its dtype; or the vector, which has one dtype, is
#   refused.
# Seen: the vector is complex, and so is every parameter after it: its data is replaced, not copied into. An optimiser that held
#   the real parameter goes on with a complex one, a forward that multiplied real numbers gives complex ones, and nothing is said.
#   The same happens to a float32 parameter beside a float64 one, which comes back as float64.
# bklm: states that hold both are kept by name and dtype, never as one vector.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
"$folder/env/bin/python" - <<'PY'
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters


class Mixed(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.real, self.other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3, dtype=other))


for other in (torch.complex64, torch.float64):
    module = Mixed(other)
    vector_to_parameters(parameters_to_vector(module.parameters()), module.parameters())
    print(f"float32 beside {other} comes back as {module.real.dtype}")
    assert module.real.dtype == other
    assert isinstance(module.real, nn.Parameter)
print("As described above.")
PY
