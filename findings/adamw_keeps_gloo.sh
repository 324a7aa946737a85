#!/usr/bin/env bash
# torch 2.13.0: a first AdamW step after init_process_group keeps gloo's threads past destroy_process_group
#
# Source: AdamW's step imports torch._dynamo, and that torch.distributed.nn.functional, whose ten functions have
#   group=group.WORLD as default argument. A default is computed at import: None before init_process_group, after it the group.
# Expected: destroy_process_group lets go of the default group and joins its threads, as it does where no optimiser has stepped.
# Seen: the group stays alive as those defaults, and so do gloo_tcp_loop and the pt_gloo_runloop threads, while is_initialized()
#   says False. With an import of torch.distributed.nn.functional before init_process_group no thread is left.
# bklm: bklm/training/processes.py imports it first, so that no thread is left when Python ends; a test counts them after AdamW.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env" || { echo "cannot tell: no virtual environment can be made" && exit 2; }
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ||
    { echo "cannot tell: the packages could not be installed" && exit 2; }
cat >"$folder/try.py" <<'PY'
import os
import pathlib
import sys

import torch
import torch.distributed as dist

how, store = sys.argv[1:]
if how == "import, step":
    import torch.distributed.nn.functional
dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
dist.all_reduce(torch.ones(1))
if how != "no step":
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    torch.optim.AdamW([weight]).step()
dist.destroy_process_group()
names = [task.read_text().strip() for task in pathlib.Path("/proc/self/task").glob("*/comm")]
print(f"{how}: initialised {dist.is_initialized()}, threads of gloo {sum('gloo' in name for name in names)}", flush=True)
os._exit(0)
PY
for how in "no step" "step" "import, step"; do
    "$folder/env/bin/python" "$folder/try.py" "$how" "$folder/store of $how" 2>>"$folder/errors"
done | tee "$folder/said"
grep -qx "no step: initialised False, threads of gloo 0" "$folder/said"
grep -qxE "step: initialised False, threads of gloo [1-9]" "$folder/said"
grep -qx "import, step: initialised False, threads of gloo 0" "$folder/said"
echo "As described above."
