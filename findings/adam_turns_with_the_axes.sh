#!/usr/bin/env bash
# torch 2.13.0: Adam treats a complex parameter as two real ones, so its path depends on where the phase's zero is put
#
# Source: torch.optim, "Adam", and the notes on complex autograd: optimisers "work with complex parameters".
# Expected: a problem with every number multiplied by one phase is the same problem, and what scales a step is |gradient|^2; so
#   the parameters, turned back, are the same.
# Seen: after five steps of 0.1 from 0 towards 3 + 4i the parameter is 0.498 + 0.499i. With the target turned by 0.7 rad it is,
#   turned back, 0.012 + 0.642i: the real and the imaginary part have second moments of their own, and each moves by the learning
#   rate along its axis. SGD gives the same path in both. Adagrad, RMSprop, Adamax, NAdam and Rprop differ as Adam does.
# bklm: no model of it has a complex parameter; resolvents are complex functions of real ones.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
"$folder/env/bin/python" - <<'PY'
import cmath

import torch


def path(kind, phase):
    """Where five steps lead from 0 towards (3 + 4i) phase, turned back."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.complex128))
    optimiser = kind([weight], lr=0.1)
    for _ in range(5):
        optimiser.zero_grad()
        ((weight - (3 + 4j) * phase).abs() ** 2).sum().backward()
        optimiser.step()
    return complex(weight.detach()[0] / phase)


turn = cmath.exp(0.7j)
plain, turned = path(torch.optim.Adam, 1), path(torch.optim.Adam, turn)
print(f"Adam: {plain:.3f} as it is, {turned:.3f} turned by 0.7 rad and back")
assert abs(plain - (0.498 + 0.499j)) < 2e-3
assert abs(turned - (0.012 + 0.642j)) < 2e-3
assert abs(path(torch.optim.SGD, 1) - path(torch.optim.SGD, turn)) < 1e-12
print("SGD: the same path in both")
for name in ("Adagrad", "RMSprop", "Adamax", "NAdam", "Rprop"):
    apart = abs(path(getattr(torch.optim, name), 1) - path(getattr(torch.optim, name), turn))
    print(f"{name}: {apart:.2f} apart")
    assert apart > 0.05
print("As described above.")
PY
