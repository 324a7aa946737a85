"""Two processes train one model together: the same curve as one process, every token scored once, one of them writes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from bklm.data import make_loader, windows
from bklm.harness import study
from bklm.harness.launch import launch
from bklm.models import GPT, GPTConfig, NewLLM, NewLLMConfig
from bklm.studies.grad_blend.config import GradBlendConfig
from bklm.training.auxiliary import WithTerm
from bklm.training.checkpoints import CheckpointFolder
from bklm.training.energy_terms import PublishedEnergy
from bklm.training.evaluation import evaluate
from bklm.training.loop import train
from bklm.training.processes import (
    broadcast,
    main_first,
    make_accelerator,
    require_launch,
    rows_of_this_process,
    sum_gradients_over_processes,
)
from bklm.training.schedules import TrainingSettings

VOCABULARY = 20
SETTINGS = TrainingSettings(epochs=3, learning_rate=3e-3, clip=1.0, weight_decay=0.0)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


def model() -> NewLLM:
    torch.manual_seed(0)
    return NewLLM(NewLLMConfig(VOCABULARY, 8, 16, 8, n_layers=2, dropout_p=0.0))


def batches(shuffle: bool):
    # 203 tokens in windows of 6: the last window is partly masked, and batches of 5 end with a smaller one.
    ids = torch.randint(VOCABULARY, (203,), generator=torch.Generator().manual_seed(1)).numpy()
    return make_loader(windows(ids, 6), 5, shuffle=shuffle, seed=3)


def in_two_processes(work, folder: Path) -> list[dict]:
    """Fork two processes that call ``work(accelerator, folder)``; what each returned, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                # Accelerate reads it, and the threads of the process that forked are not here.
                os.environ["OMP_NUM_THREADS"] = "1"
                torch.set_num_threads(1)
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                found = work(make_accelerator("cpu", "fp32"), folder)
                (folder / f"rank_{rank}.json").write_text(json.dumps(found))
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0]
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


def train_and_tell(accelerator, folder: Path) -> dict:
    checkpoints = CheckpointFolder(folder / "checkpoints", keep=9)
    saves = []
    save = checkpoints.save
    checkpoints.save = lambda *a, **k: saves.append(a[0]) or save(*a, **k)
    net = model()
    records = train(
        net, batches(True), batches(False), SETTINGS, accelerator=accelerator, unk_id=1, folder=checkpoints
    )
    score = evaluate(net, batches(False), 1, accelerator)
    return {
        "processes": accelerator.num_processes,
        "train": [r.train_loss for r in records],
        "val": [r.val_loss for r in records],
        "norms": [r.gradient_norm_mean for r in records],
        "tokens": score.tokens,
        "known": score.known_tokens,
        "saved": saves,
        "weights": [float(p.detach().double().sum()) for p in net.parameters()],
    }


def test_two_processes_give_the_curve_of_one_count_every_token_once_and_one_writes(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = train_and_tell(make_accelerator("cpu", "fp32"), tmp_path / "one")
    first, second = in_two_processes(train_and_tell, tmp_path / "two")
    assert (alone["processes"], first["processes"]) == (1, 2)
    for key in ("train", "val", "norms"):
        assert first[key] == pytest.approx(alone[key], rel=1e-5)
        assert first[key] == second[key]
    assert first["weights"] == second["weights"]
    assert (first["tokens"], first["known"]) == (alone["tokens"], alone["known"])
    assert alone["tokens"] == batches(False).dataset.num_targets == 202
    assert (first["saved"], second["saved"]) == ([1, 2, 3], [])


def resume_and_tell(accelerator, folder: Path) -> dict:
    """Train two epochs, then go on to the third as a new run would."""
    for epochs in (2, 3):
        settings = TrainingSettings(**{**vars(SETTINGS), "epochs": epochs})
        records = train(
            model(), batches(True), batches(False), settings, accelerator=accelerator, folder=folder / "c"
        )
    return {"train": [r.train_loss for r in records]}


def test_a_run_of_two_processes_goes_on_from_its_checkpoint(tmp_path):
    found, _ = in_two_processes(resume_and_tell, tmp_path)
    alone = train(model(), batches(True), batches(False), SETTINGS, accelerator=make_accelerator("cpu", "fp32"))
    assert found["train"] == pytest.approx([r.train_loss for r in alone], rel=1e-5)


def refused_with_a_state(accelerator, folder: Path) -> str:
    torch.manual_seed(0)
    net = WithTerm(GPT(GPTConfig(VOCABULARY, 8, 1, 2, 6, dropout_p=0.0)), PublishedEnergy(8, 1), 1.0)
    settings = TrainingSettings(**{**vars(SETTINGS), "accumulate": 1 + (accelerator.num_processes == 1)})
    with pytest.raises(ValueError) as refused:
        train(net, batches(True), batches(False), settings, accelerator=accelerator)
    assert int(net.term.trace.state[0]) == 0
    return str(refused.value)


def test_a_term_that_keeps_numbers_from_step_to_step_is_trained_in_one_process_and_whole_batches(tmp_path):
    said = in_two_processes(refused_with_a_state, tmp_path)
    assert said == 2 * [
        "PublishedEnergy: this term keeps numbers from step to step, but a batch is shared by 2 process(es) in 1 part(s); "
        "train it in one process with accumulate 1, or take the model inside: without_term(model)."
    ]
    assert "1 process(es) in 2 part(s)" in refused_with_a_state(make_accelerator("cpu", "fp32"), tmp_path)


def add_and_tell(accelerator, folder: Path) -> dict:
    rank = accelerator.process_index
    used, sometimes, never = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    used.grad = torch.full((2,), 1.0 + rank)
    if rank == 0:
        sometimes.grad = torch.tensor([5.0, 6.0])
    sum_gradients_over_processes(accelerator, [used, sometimes, never])
    (rows,) = rows_of_this_process(accelerator, torch.arange(5))
    with main_first(accelerator):
        order = (folder / "main_was_here").exists()
        (folder / "main_was_here").touch()
    return {
        "used": used.grad.tolist(),
        "sometimes": sometimes.grad.tolist(),
        "never": never.grad is None,
        "rows": rows.tolist(),
        "told": broadcast(accelerator, {"from": rank}),
        "came_second": order,
    }


def test_gradients_are_added_up_and_a_parameter_that_no_process_used_keeps_none(tmp_path):
    first, second = in_two_processes(add_and_tell, tmp_path)
    for found in (first, second):
        assert found["used"] == [3.0, 3.0]
        assert found["sometimes"] == [5.0, 6.0]
        assert found["never"]
        assert found["told"] == {"from": 0}
    assert sorted(first["rows"] + second["rows"]) == [0, 1, 2, 3, 4]
    assert (first["came_second"], second["came_second"]) == (False, True)


def compute_and_tell(folder: Path) -> None:
    accelerator = make_accelerator("cpu", "fp32")
    torch.randn(600, 600) @ torch.randn(600, 600)
    (folder / str(accelerator.process_index)).write_text(str(torch.get_num_threads()))


def test_a_notebook_that_has_computed_on_many_cores_launches_processes_that_compute(tmp_path, monkeypatch):
    """A forked process has none of the threads that OpenMP still counts, and would wait for them."""
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.randn(600, 600) @ torch.randn(600, 600)
        launch(GradBlendConfig(processes=2, device="cpu"), compute_and_tell, tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert [(tmp_path / name).read_text() for name in "01"] == ["1", "1"]


def end_in(how: str, folder: Path) -> None:
    (folder / os.environ["RANK"]).touch()
    if os.environ["RANK"] == "1":
        match how:
            case "a sentence":
                raise ValueError("n_layers: got 0: take 1 or more.")
            case "another error":
                raise LookupError("nothing there")
            case "an error of five parts":
                b"\xff".decode()
            case "a signal":
                os.kill(os.getpid(), signal.SIGKILL)
    # Longer than the test: the launcher stops the others.
    time.sleep(60)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("a sentence", ValueError, "^n_layers: got 0: take 1 or more.$"),
        (
            "another error",
            RuntimeError,
            "^processes: one ended .*LookupError: nothing there.*is kept.$",
        ),
        (
            "an error of five parts",
            RuntimeError,
            "^processes: one ended .*UnicodeDecodeError.*is kept.$",
        ),
        ("a signal", RuntimeError, "^processes: one ended .*SIGKILL.*is kept.$"),
    ],
)
def test_what_ends_a_process_of_a_launch_is_raised_by_its_own_sentence(tmp_path, capfd, how, error, message):
    with pytest.raises(error, match=message):
        launch(GradBlendConfig(processes=2, device="cpu"), end_in, how, tmp_path)
    assert "Traceback" not in capfd.readouterr().err


def test_a_launch_that_is_stopped_ends_as_a_run_of_one_process_does(tmp_path):
    def stop() -> None:
        while not all((tmp_path / rank).exists() for rank in "01"):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=stop, daemon=True)
    stopper.start()
    with pytest.raises(KeyboardInterrupt):
        launch(GradBlendConfig(processes=2, device="cpu"), end_in, "nothing", tmp_path)
    stopper.join(timeout=10)


def test_curves_go_to_a_tracker_from_the_launching_process_alone(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(study, "start_tracker", lambda *a: begun.append(a))
    config = GradBlendConfig(profile="smoke", device="cpu", output_dir=str(tmp_path)).resolved()
    study._work_only(config, lambda session: None, None)
    assert begun == []
    study.run_study(config, lambda session: None, lambda session, found: None)
    assert len(begun) == 1


def test_a_process_has_left_the_others_before_python_is_taken_down():
    """gloo's threads otherwise end one process in some with signal 6, whereupon torchrun stops the one that still writes."""
    code = """
import atexit, torch
from pathlib import Path
import torch.distributed as dist
def say():
    tasks = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
    print("shared at the end:", dist.is_initialized(), any("gloo" in task for task in tasks))
atexit.register(say)
from bklm.training.processes import make_accelerator, sum_over_processes
for again in range(2):
    print("sum", sum_over_processes(make_accelerator("cpu", "fp32"), torch.ones(1)).item())
weight = torch.nn.Parameter(torch.ones(1))
weight.grad = torch.ones(1)
torch.optim.AdamW([weight]).step()
"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        for env in ranks
    ]
    said = [process.communicate(timeout=120)[0].split("\n") for process in started]
    assert said == [["sum 2.0", "sum 2.0", "shared at the end: False False", ""]] * 2
    assert [process.returncode for process in started] == [0, 0]


def test_parts_of_a_batch_change_nothing_but_the_memory_it_takes():
    accelerator = make_accelerator("cpu", "fp32")
    curves = []
    for parts in (1, 3, 99):
        settings = TrainingSettings(**{**vars(SETTINGS), "accumulate": parts})
        records = train(model(), batches(True), batches(False), settings, accelerator=accelerator)
        curves.append([x for r in records for x in (r.train_loss, r.val_loss, r.gradient_norm_mean)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)
    assert all(math.isfinite(x) for x in curves[0])


@pytest.mark.parametrize(
    ("initialised", "device", "error", "message"),
    [
        (False, "auto", ValueError, "processes: got 3, but torch sees 2 GPUs"),
        (True, "cpu", RuntimeError, "already uses CUDA.*Run button.*torchrun"),
        (False, "cpu", None, ""),
    ],
)
def test_a_launch_that_could_not_work_on_the_gpus_is_refused(monkeypatch, initialised, device, error, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(error, match=message) if error else contextlib.nullcontext():
        require_launch(3, device)
