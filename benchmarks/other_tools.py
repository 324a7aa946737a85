"""The same model, text and counts measured by bklm and by other tools: where their numbers differ, and why.

    python benchmarks/other_tools.py --data_dir FOLDER --run RUN       all tables; RUN: results of study 03 with a GPT
    python benchmarks/other_tools.py --page                            only docs/numbers.md, from what was measured last

Every tool is used where it is installed, and named as missing where it is not: transformers, lm_eval, nltk, kenlm, torchao,
optimum-quanto, bitsandbytes, all outside bklm's requirements. Their rows go to docs/results/other_tools.csv, and from there
into docs/numbers.md.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import _int8_of_other_tools
import numpy as np
import torch

import bklm
from bklm.data import KneserNey, load_corpus, tokenize_corpus
from bklm.data.arpa import write_arpa
from bklm.trained.exporting import export

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "docs" / "results" / "other_tools.csv"
PAGE = ROOT / "docs" / "numbers.md"
FIELDS = ("table", "tool", "version", "what", "value", "why")
NLTK_TOKENS = 400  # nltk takes a tenth of a second a word
INT8_TOKENS = 6144
Row = tuple[str, str, float | str, str]  # tool, what, value, why


def version(tool: str) -> str:
    try:
        return importlib.metadata.version(tool)
    except importlib.metadata.PackageNotFoundError:
        return ""


def whole(nll: float, count: int) -> float:
    return math.exp(nll / count)


def by_ours(trained: bklm.trained.model.Trained, file: Path) -> Iterator[Row]:
    score, longest = trained.score(file), trained.model.n_seq
    yield (
        "bklm", "score of the file", score.perplexity,
        f"every token after the first is a target once; windows of {longest} overlap by one token",
    )  # fmt: skip
    yield (
        "bklm", "score of the file, without unknown words", score.perplexity_without_unk,
        "targets that are the unknown word are left out",
    )  # fmt: skip
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    nll, count, first = 0.0, 0, 0
    with torch.no_grad():
        for line in lines:
            ids = trained.encode(line)[:, :longest]
            first += 1
            if ids.shape[1] > 1:
                losses = trained.model.token_losses(ids[:, :-1], ids[:, 1:]).nll
                nll, count = nll + float(losses.sum()), count + losses.numel()
    yield (
        "bklm", f"each line by itself (its first {longest} tokens)", whole(nll, count),
        f"no context from the line before; the first token of each of the {first:,} lines is no target",
    )  # fmt: skip


def by_transformers(model, ids: torch.Tensor) -> Iterator[Row]:
    """The recipe of transformers' page "Perplexity of fixed-length models", as it stands and as it stood until 2024."""
    longest, tokens = model.config.max_position_embeddings, ids.shape[1]
    for stride in (longest, longest // 2, longest // 4):
        sums, counts, means, before = 0.0, 0, [], 0
        for begin in range(0, tokens, stride):
            end = min(begin + longest, tokens)
            part, new = ids[:, begin:end], end - before
            targets = part.clone()
            targets[:, :-new] = -100
            with torch.no_grad():
                loss = float(model(part, labels=targets).loss)
            count = int((targets != -100).sum()) - 1
            if count > 0:
                sums, counts = sums + loss * count, counts + count
                means.append(loss)
            before = end
            if end == tokens:
                break
        yield (
            "transformers", f"recipe, stride {stride}", whole(sums, counts),
            f"{tokens - 1 - counts:,} targets fewer than bklm's: the first of a window has nothing before it"
            if stride == longest
            else f"at least {longest - stride} tokens of context for each; a window weighs one target less than it has",
        )  # fmt: skip
        yield (
            "transformers", f"recipe as it stood before, stride {stride}", math.exp(sum(means) / len(means)),
            "the mean of the windows' means: a short last window counts as a whole one",
        )  # fmt: skip


def by_lm_eval(model, tokenizer, documents: dict[str, list[str]]) -> Iterator[Row]:
    from datasets import Dataset
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        has_prefix = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal").prefix_token_id is not None
    except AttributeError:
        has_prefix = False
    prefix = None if has_prefix else tokenizer.unk_token_id
    told = (
        "its own" if has_prefix else "the unknown word, named by us: the tokenizer has no start and end of text"
    )
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=16, prefix_token_id=prefix)
    for name, texts in documents.items():
        task = {
            "task": f"perplexity_{len(texts)}",
            "custom_dataset": lambda texts=texts, **_: {"test": Dataset.from_dict({"page": texts})},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "page",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
        }
        found = simple_evaluate(lm, tasks=[task], bootstrap_iters=0, verbosity="ERROR")
        result = next(iter(found["results"].values()))
        words, by_bytes = (result[f"{m}_perplexity,none"] for m in ("word", "byte"))
        nll = math.log(by_bytes) * sum(len(text.encode()) for text in texts)
        tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        each = f"{name}, {len(texts):,} document{'s' * (len(texts) != 1)}"
        yield (
            "lm_eval", f"per token, {each}", whole(nll, tokens),
            f"the first token of a document is a target, too, after a prefix ({told}); windows are disjoint",
        )  # fmt: skip
        yield (
            "lm_eval", f"word_perplexity, {each}", words,
            "the same sum per \"word\": what white space cuts, empty words at both ends of a document counted",
        )  # fmt: skip
        yield "lm_eval", f"byte_perplexity, {each}", by_bytes, "the same sum per byte of UTF-8"


def perplexity_table(trained, data_dir: Path) -> Iterator[Row]:
    file = data_dir / "valid.txt"
    yield from by_ours(trained, file)
    text = file.read_text(encoding="utf-8")
    corpus = load_corpus("wikitext-2", data_dir)
    with tempfile.TemporaryDirectory() as folder:
        export(trained, folder)
        try:
            from transformers import PreTrainedTokenizerFast

            from bklm.trained.transformers_files.modeling_bklm import BklmForCausalLM
        except ImportError:
            yield missing("transformers")
            return
        model = BklmForCausalLM.from_pretrained(folder).eval()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        yield from by_transformers(model, torch.tensor([tokenizer(text)["input_ids"]]))
        documents = {
            "the whole file": [text],
            "articles": list(corpus.documents("valid")),
            "lines as they are": [line for line in text.split("\n") if line.strip()],
        }
        try:
            yield from by_lm_eval(model, tokenizer, documents)
        except ImportError:
            yield missing("lm_eval")
    yield (
        "evaluate", "metric perplexity", "not run",
        "its script is fetched from the hub; it puts a start token before each text and means the texts' perplexities",
    )  # fmt: skip


def missing(tool: str) -> Row:
    return tool, "-", "not installed", "pip could not install it here, or it was not asked to"


def kneser_ney_table(data_dir: Path) -> Iterator[Row]:
    tokens = tokenize_corpus(load_corpus("wikitext-2", data_dir), vocab_size_limit=100_000)
    words = tokens.vocab.words
    valid, start = tokens.valid, tokens.valid[:NLTK_TOKENS]
    models = {d: KneserNey(3, d).fit(tokens.train, len(words)) for d in (0.75, "modified")}
    for discount, model in models.items():
        for part, name in ((valid, "valid"), (start, f"first {NLTK_TOKENS} tokens")):
            yield "bklm", f"3-gram, discount {discount}, {name}", model.perplexity(part), "one stream of tokens"
    try:
        import kenlm

        with tempfile.TemporaryDirectory() as folder:
            for discount, model in models.items():
                read = kenlm.Model(str(write_arpa(model, words, Path(folder) / "model.arpa")))
                spoken = [words[i] for i in valid]
                yield (
                    "kenlm", f"bklm's ARPA file, discount {discount}, valid", kenlm_stream(kenlm, read, spoken),
                    "the same stream, without sentence starts and ends: equal but for the file's 7 digits",
                )  # fmt: skip
                lines = [line.split() for line in (data_dir / "valid.txt").read_text("utf-8").split("\n")]
                known = set(words)
                lines = [[w if w in known else "<unk>" for w in line] for line in lines if line]
                total = sum(read.score(" ".join(line)) for line in lines)
                yield (
                    "kenlm", f"the same file, score() of each line, discount {discount}",
                    10 ** (-total / sum(len(line) + 1 for line in lines)),
                    "score() begins a line with `<s>` and counts `</s>` after it, to which a model of a stream gives 10^-99",
                )  # fmt: skip
    except ImportError:
        yield missing("kenlm")
    try:
        yield from by_nltk([words[i] for i in tokens.train], [words[i] for i in start])
    except ImportError:
        yield missing("nltk")


def kenlm_stream(kenlm, model, words: list[str]) -> float:
    state, total = kenlm.State(), 0.0
    model.NullContextWrite(state)
    for place, word in enumerate(words):
        after = kenlm.State()
        score = model.BaseScore(state, word, after)
        total, state = total + score * (place > 0), after
    return 10 ** (-total / (len(words) - 1))


def by_nltk(train: list[str], valid: list[str]) -> Iterator[Row]:
    from nltk.lm import KneserNeyInterpolated, Vocabulary
    from nltk.util import everygrams

    for discount in (0.1, 0.75):
        model = KneserNeyInterpolated(3, discount=discount)
        model.fit([everygrams(train, max_len=3)], Vocabulary(train))
        log2 = sum(model.logscore(valid[i], valid[max(0, i - 2) : i]) for i in range(1, len(valid)))
        yield (
            "nltk", f"KneserNeyInterpolated(3, discount={discount}), first {NLTK_TOKENS} tokens",
            2 ** (-log2 / (len(valid) - 1)),
            "0.1 is its default and far too small" if discount == 0.1 else "bklm's number of the same tokens",
        )  # fmt: skip


def int8_table(trained, data_dir: Path) -> Iterator[Row]:
    ids = trained.encode((data_dir / "valid.txt").read_text(encoding="utf-8"))[0, : INT8_TOKENS + 1]
    ids = ids[: (len(ids) - 1) // trained.model.n_seq * trained.model.n_seq + 1]
    yield from _int8_of_other_tools.rows(trained.model, ids.long())


def page(rows: list[dict[str, str]]) -> None:
    """Write the tables of docs/numbers.md between their marks."""
    text = PAGE.read_text(encoding="utf-8")
    for table in TABLES:
        begin, end = f"<!-- {table} -->\n", f"<!-- end of {table} -->"
        lines = ["| tool | what | number | why |", "|---|---|---|---|"]
        for row in (r for r in rows if r["table"] == table):
            name, comma, rest = row["tool"].partition(",")
            tool = f"{name} {row['version']}".strip() + comma + rest
            lines.append(f"| {tool} | {row['what']} | {shown(row['value'])} | {row['why']} |")
        head, rest = text.split(begin)
        text = head + begin + "\n".join(lines) + "\n" + end + rest.split(end, 1)[1]
    PAGE.write_text(text, encoding="utf-8")


def shown(value: str) -> str:
    try:
        number = float(value)
    except ValueError:
        return value
    return f"{number:.4f}" if number < 10 else f"{number:.2f}"


TABLES = ("perplexity", "kneser_ney", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--run", help="zip or folder of a run of bklm.studies.baseline with a GPT")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args()
    rows = list(csv.DictReader(ROWS.open(encoding="utf-8"))) if ROWS.exists() else []
    if not arguments.page:
        if arguments.data_dir is None or arguments.run is None:
            sys.exit("give --data_dir and --run, or --page")
        trained = bklm.load(arguments.run)
        make: dict[str, Callable[[], Iterator[Row]]] = {
            "perplexity": lambda: perplexity_table(trained, arguments.data_dir),
            "kneser_ney": lambda: kneser_ney_table(arguments.data_dir),
            "int8": lambda: int8_table(trained, arguments.data_dir),
        }
        for table in arguments.tables:
            rows = [row for row in rows if row["table"] != table]
            for tool, what, value, why in make[table]():
                number = f"{value:.6g}" if isinstance(value, float | np.floating) else value
                known = {"bklm": bklm.__version__}.get(tool) or version(tool.split(",")[0])
                rows.append(dict(zip(FIELDS, (table, tool, known, what, number, why), strict=True)))
                print(*rows[-1].values(), sep=" | ", flush=True)
        rows.sort(key=lambda row: TABLES.index(row["table"]))
        with ROWS.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    page(rows)


if __name__ == "__main__":
    main()
