#!/usr/bin/env bash
# torch 2.13.0: a tied model loses its tie on the way to the meta device, and torch.func's recipe for ensembles is then wrong
#
# Source: nn.Module.to and to_empty; "Model ensembling", the tutorial of torch.func: base_model = copy.deepcopy(models[0]).to("meta"),
#   then vmap of functional_call(base_model, params, (x,)) over stack_module_state(models).
# Expected: a module moves to a device with its shared parameters shared, as .double(), deepcopy and share_memory() leave them; and
#   the recipe gives what the models give one by one.
# Seen: .to("meta") and .to_empty(device="cpu") make a parameter for each name: what was one matrix is two, and after to_empty an
#   optimiser trains both. stack_module_state hands out the tied weight once, under its first name, so in the recipe the second
#   name keeps the base model's tensor without values. No error is raised, and the outputs are arbitrary numbers.
# bklm: ties are made where the weights are, and models of one ensemble are run one by one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
"$folder/env/bin/python" - <<'PY'
import copy

import torch
from torch import nn
from torch.func import functional_call, stack_module_state


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 30), nn.Linear(30, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


def is_tied(model):
    return model.head.weight is model.embedding.weight


kept = {"as made": Tied(), "double": Tied().double(), "deepcopy": copy.deepcopy(Tied())}
lost = {"to meta": Tied().to("meta"), "to_empty": Tied().to("meta").to_empty(device="cpu")}
with torch.device("meta"):
    made_there = Tied()
assert is_tied(made_there)
lost["made on meta, then to_empty"] = made_there.to_empty(device="cpu")
for name, model in {**kept, **lost}.items():
    print(f"{name}: {'one matrix' if is_tied(model) else 'two matrices'}")
assert all(map(is_tied, kept.values()))
assert not any(map(is_tied, lost.values()))

torch.manual_seed(0)
models, ids = [Tied() for _ in range(3)], torch.arange(8)
parameters, buffers = stack_module_state(models)
print("stack_module_state names", list(parameters))
assert list(parameters) == ["embedding.weight"]
one_by_one = torch.stack([model(ids) for model in models])


def ensemble(base):
    return torch.vmap(lambda p, b: functional_call(base, (p, b), (ids,)))(parameters, buffers)


assert torch.allclose(ensemble(copy.deepcopy(models[0])), one_by_one, atol=1e-5)
print("the recipe without .to('meta') gives what the models give one by one")
outputs = ensemble(copy.deepcopy(models[0]).to("meta"))
assert outputs.device.type == "cpu"
assert outputs.shape == one_by_one.shape
assert not torch.allclose(outputs, one_by_one, atol=0.1)
print("the recipe as it stands raises nothing and gives other numbers")
print("As described above.")
PY
