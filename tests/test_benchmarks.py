"""Every benchmark that a document names runs to its end and prints what it is read for, here at its smallest size."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bklm.models import GPT, GPTConfig
from bklm.studies import BaselineConfig, run_baseline
from bklm.studies.baseline import run as baseline

ROOT = Path(__file__).resolve().parents[1]
RUNS = {
    "train_step": ("--quick --rounds 2", "tokens/s"),
    "baseline_step": ("--quick --seconds 1", "of the floor"),
    "products": ("--quick", "taken / faster"),
    "freeze_phase2": ("--quick --seconds 1", "kept contexts"),
    "scaling": ("--parts training --rounds 1 --workers 1 --profile smoke", "1 process, 1 thread each"),
    "resolvent_solve": ("--quick --seconds 0.2", "scipy / ours"),
    "reading_step": ("--quick", "exponent of the step time over N"),
    "reading_search": ("--quick --model gpt --only taken", "Validation perplexity after epoch 1"),
    "sweep_storm": ("--quick", "under the study's lock"),
    "data_scale": ("--quick", "KenLM trie"),
    "moe_perplexity": ("--quick --epochs 1 --seeds 0 1 --output_dir OUTPUT", "exact router gradient"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_runs_to_its_end(name, tmp_path):
    words, printed = RUNS[name]
    words = words.replace("OUTPUT", str(tmp_path)).split()
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    if "PostgreSQL is not installed here" in done.stderr:
        pytest.skip("PostgreSQL is not installed here")
    assert done.returncode == 0, done.stderr[-2000:]
    assert printed in done.stdout
    if name == "sweep_storm":
        assert re.findall(r"target: points (lost|stored twice) in the storm, .*, (held|missed)", done.stdout) == [
            ("lost", "held"), ("stored twice", "held")
        ]  # fmt: skip


def test_quick_sweep_compares_medians_of_both_revisions(monkeypatch, capsys):
    """Half an hour and the history of the project are more than a test has: clones and runs are stood in for."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quick_sweep

    seconds = {"old": iter([99.0, 30.0, 36.0, 33.0]), "new": iter([99.0, 11.0, 10.0, 60.0])}
    monkeypatch.setattr(quick_sweep, "checkout", lambda revision, folder: folder)
    monkeypatch.setattr(
        quick_sweep, "seconds_of", lambda folder, profile, output, more: next(seconds[folder.name])
    )
    monkeypatch.setattr(sys, "argv", ["quick_sweep", "--rounds", "3"])
    quick_sweep.main()
    assert "at least 1.5, measured: 3, held" in capsys.readouterr().out


def benchmarks_page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("benchmarks")


def test_the_page_is_made_of_the_kept_outputs_and_says_first_which_targets_are_missed(monkeypatch, tmp_path):
    script = benchmarks_page(monkeypatch)
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == script.page()
    monkeypatch.setattr(script, "OUTPUTS", tmp_path)
    (tmp_path / "moe.txt").write_text(
        "$ python benchmarks/moe.py    # 2026-11-30, revision 0123456789ab\nAMD EPYC, vectors of 512 bits, 2 cores\n\n"
        "target: a, b (c), at least 1,000, measured: 1,200, held\n"
        "target: d, at most 0.3, measured: 0.4, missed\ntarget: e, at most 1, measured: not in this run\n"
    )
    page = script.page()
    assert "1 targets are held, 1 are missed, 1 were not measured." in page
    assert "| [moe](#moe) | d | at most 0.3 | 0.4 |" in page
    assert "| [moe](#moe) | 2026-11-30 | 0123456789ab | AMD EPYC |" in page
    assert script.WHY["moe"] in page
    assert "`bk_core`" in page.rpartition("Of ")[2]


def test_a_script_whose_peer_is_not_given_is_refused_before_it_overwrites_what_was_measured(
    monkeypatch, capsys
):
    script = benchmarks_page(monkeypatch)
    monkeypatch.setattr(script, "run", lambda *a: pytest.fail("ran"))
    for words, told in (
        (["bk_core"], "bk_core needs --jax PYTHON"),
        (["nothing"], "got nothing; there are bk_core"),
    ):
        monkeypatch.setattr(sys, "argv", ["benchmarks.py", *words])
        with pytest.raises(SystemExit):
            script.main()
        assert told in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["benchmarks.py", "moe"])
    monkeypatch.setattr(script, "git_revision", lambda: "0123456789abcdef+changes")
    with pytest.raises(SystemExit):
        script.main()
    assert "changes that are not committed" in capsys.readouterr().err


def test_a_search_is_kept_under_the_command_line_that_ran_it_without_a_path_of_this_machine(
    monkeypatch, tmp_path
):
    script = benchmarks_page(monkeypatch)
    ran = []

    def fake(command, **_):
        ran.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="a table\n")

    monkeypatch.setattr(script.subprocess, "run", fake)
    monkeypatch.setattr(script, "git_revision", lambda: "0123456789abcdef")
    monkeypatch.setattr(script, "OUTPUTS", tmp_path)
    script.run("gpt_search", {"text": "/home/someone/text"})
    assert ran[-1][1:4] == ["benchmarks/reading_search.py", "--model", "gpt"]
    assert ran[-1][-2:] == ["--data_dir", "/home/someone/text"]
    head, table = (tmp_path / "gpt_search.txt").read_text().splitlines()
    assert head.startswith("$ python benchmarks/reading_search.py --model gpt --epochs 8")
    assert "'head of its own' --data_dir FOLDER    # " in head
    assert (head.endswith("revision 0123456789ab"), table) == (True, "a table")


@pytest.mark.parametrize("workers", [1, 3, 40])
def test_the_storms_model_is_that_of_workers_who_queue_for_one_lock(monkeypatch, workers):
    """Against the stationary law of that queue (M/M/1 with so many customers), of which k workers wait with weight w_k."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    storm = pytest.importorskip("sweep_storm")
    think, lock = 2.0, 0.1
    weights = [math.perm(workers, k) * (lock / think) ** k for k in range(workers + 1)]
    expected = (1 - weights[0] / sum(weights)) / lock
    assert storm.throughput(workers, think, lock, 0.0, 8) == pytest.approx(expected)
    # A core that serves ten times as long is the limit in its place; eight of them are a little faster than the lock.
    assert storm.throughput(1000, think, lock, 1.0, 1) == pytest.approx(1.0, rel=0.01)
    assert storm.throughput(1000, think, lock, 0.7, 8) == pytest.approx(1 / lock, rel=0.01)


EXCUSED = {"bk_core_gpu": "wants a GPU, and ends with a sentence without one"}


def test_every_benchmark_is_run_by_a_test():
    """In ``RUNS``, or a test starts its file, or calls its main: to be named somewhere is not enough."""
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py")}
    run = {name for name in scripts if re.search(rf'"(benchmarks/)?{name}\.py"|\b{name}\.main\(', tests)}
    assert scripts - run - RUNS.keys() == EXCUSED.keys()


@pytest.fixture
def other_tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("other_tools")


def test_the_page_of_other_tools_holds_the_rows_that_were_measured(other_tools, monkeypatch, tmp_path):
    written = other_tools.PAGE.read_text(encoding="utf-8")
    emptied = re.sub(r"(<!-- (\w+) -->\n).*?(<!-- end of \2 -->)", r"\1\3", written, flags=re.DOTALL)
    assert len(emptied) < len(written) / 2
    monkeypatch.setattr(other_tools, "PAGE", tmp_path / "numbers.md")
    other_tools.PAGE.write_text(emptied, encoding="utf-8")
    other_tools.page(list(csv.DictReader(other_tools.ROWS.open(encoding="utf-8"))))
    assert other_tools.PAGE.read_text(encoding="utf-8") == written


def test_other_tools_score_by_transformers_recipe_and_name_what_is_missing(other_tools):
    torch.manual_seed(0)
    model = GPT(GPTConfig(20, 16, 1, 2, n_seq=8)).eval()
    ids = torch.randint(20, (1, 29))

    class Wrapped:
        config = SimpleNamespace(max_position_embeddings=8)

        def __call__(self, part, labels):
            logits, targets = model(part)[0, :-1], labels[0, 1:]
            return SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100))

    rows = {what: value for _, what, value, _ in other_tools.by_transformers(Wrapped(), ids)}
    windows = [ids[:, i : i + 8] for i in range(0, 29, 8)]
    losses = [model.token_losses(w[:, :-1], w[:, 1:]).nll for w in windows]
    assert rows["recipe, stride 8"] == pytest.approx(float(torch.cat(losses, 1).mean().exp()), rel=1e-5)
    means = float(torch.stack([part.mean() for part in losses]).mean().exp())
    assert rows["recipe as it stood before, stride 8"] == pytest.approx(means, rel=1e-5)
    arms = list(other_tools._int8_of_other_tools.rows(model, torch.randint(20, (8 * 9 + 1,))))
    assert [arm[0] for arm in arms[:3]] == ["bklm, float32", "bklm", "torch"]
    assert all(float(value) > 1 for _, _, value, _ in arms[:3])
    absent = [arm[0] for arm in arms if arm[2] == "not installed"]
    modules = {"torchao": "torchao", "optimum-quanto": "optimum", "bitsandbytes": "bitsandbytes"}
    wanted = {tool for tool, module in modules.items() if importlib.util.find_spec(module) is None}
    assert {tool.split(",")[0] for tool in absent} == wanted


@pytest.fixture
def run_of_a_gpt(tmp_path, monkeypatch):
    """A folder of text, its words as frequent as English ones, and the results of study 03 with a GPT on it."""
    monkeypatch.setenv("BKLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(baseline, "measure_models", lambda *runs, **settings: {})
    words, rng = [f"w{n}" for n in range(120)], random.Random(0)
    for name, lines in (("train", 300), ("valid", 40), ("test", 20)):
        drawn = (rng.choices(words, [1 / (1 + n) for n in range(120)], k=10) for _ in range(lines))
        (tmp_path / f"{name}.txt").write_text(
            " = Words = \n" + "".join(f" {' '.join(line)} \n" for line in drawn)
        )
    run_baseline(
        BaselineConfig(
            profile="smoke", data_dir=str(tmp_path), output_dir=str(tmp_path / "out"), device="cpu", workers=1, model="gpt",
            seeds=(0,), epochs=1, learning_rates=(1e-2,), batch_size=8, n_layers=1, max_train_tokens=800, vocab_size=100,
            embed_dim=16, hidden_dim=16, context_dim=16, generate_tokens=2, context_tokens=100, seq_len=16,
        )
    )  # fmt: skip
    return tmp_path, tmp_path / "out" / "baseline"


@pytest.mark.slow
def test_other_tools_write_a_row_for_every_tool_and_one_that_says_so_where_it_is_missing(
    other_tools, run_of_a_gpt, monkeypatch, tmp_path
):
    text, run = run_of_a_gpt
    page = other_tools.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(other_tools, "ROWS", tmp_path / "rows.csv")
    monkeypatch.setattr(other_tools, "PAGE", tmp_path / "numbers.md")
    other_tools.PAGE.write_text(page, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["other_tools", "--data_dir", str(text), "--run", str(run)])
    threads, during = torch.get_num_threads(), []
    scored = other_tools._int8_of_other_tools.loss
    monkeypatch.setattr(
        other_tools._int8_of_other_tools,
        "loss",
        lambda *a: during.append(torch.get_num_threads()) or scored(*a),
    )
    other_tools.main()
    assert set(during) == {1}
    assert torch.get_num_threads() == threads
    rows = list(csv.DictReader(other_tools.ROWS.open(encoding="utf-8")))
    assert {row["table"] for row in rows if row["tool"].startswith("bklm")} == set(other_tools.TABLES)
    absent = {row["tool"].split(",")[0] for row in rows if row["value"] == "not installed"}
    tools = {"optimum-quanto": "optimum"} | {
        name: name for name in ("transformers", "lm_eval", "kenlm", "nltk", "torchao", "bitsandbytes")
    }
    missing = {tool for tool, module in tools.items() if importlib.util.find_spec(module) is None}
    # Without transformers there is no model for lm_eval to score.
    assert absent == missing - ({"lm_eval"} if "transformers" in missing else set())
    assert {row["tool"].split(",")[0] for row in rows} >= tools.keys() - (
        {"lm_eval"} if "transformers" in missing else set()
    )
    written = other_tools.PAGE.read_text(encoding="utf-8")
    assert all(f"| {row['what']} |" in written for row in rows)
