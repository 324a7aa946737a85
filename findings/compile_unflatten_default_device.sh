#!/usr/bin/env bash
# torch 2.13.0: Tensor.unflatten cannot be compiled whole while a default device is set
#
# Source: torch.compile(fullgraph=True), torch.set_default_device and Tensor.unflatten, as documented for 2.13.
# Expected: set_default_device("cpu") names the device that tensors are on anyway, so a function that only reshapes its
#   argument compiles as before.
# Seen: Dynamo raises Unsupported ("Attempted to call a super() attribute that is not a function or method"), for the default
#   device is a mode that intercepts calls, and unflatten is a method written in Python that calls super(). view compiles in
#   both cases. Setting the device back to "cpu" does not end the mode; set_default_device(None) does. So one test that sets a
#   default device and puts "cpu" back makes other tests of its process fail, in an order that only a parallel run has.
# bklm: its models use view; a test compiles each of them under a default device; fixtures end with None.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
"$folder/env/bin/python" - <<'PY'
import torch

x = torch.arange(12.0).view(2, 6)


def outcome(call):
    torch._dynamo.reset()
    try:
        return torch.compile(call, fullgraph=True, backend="eager")(x).item()
    except torch._dynamo.exc.Unsupported as error:
        return f"Unsupported: {str(error).splitlines()[0]}"


def unflatten(x):
    return x.unflatten(-1, (2, 3)).sum()


def view(x):
    return x.view(2, 2, 3).sum()


SAID = "Attempted to call a super() attribute that is not a function or method"
# In one process, in this order: None at first, then a device, the same device again, and None.
for device, compiles in ((None, True), ("cpu", False), ("cpu", False), (None, True)):
    torch.set_default_device(device)
    seen = outcome(unflatten), outcome(view)
    print(f"default device {device}: unflatten gives {seen[0]}, view gives {seen[1]}")
    assert seen[1] == 66.0
    assert seen[0] == 66.0 if compiles else SAID in seen[0]
print("As described above.")
PY
