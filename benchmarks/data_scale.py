"""From 10 to 100 MB of text to token ids and to a Kneser-Ney model of order 5: rates, memory, and how both grow.

    python benchmarks/data_scale.py                       # 10, 30 and 100 MB; two to four minutes
    python benchmarks/data_scale.py --quick               # 1 and 3 MB
    python benchmarks/data_scale.py --nltk PYTHON         # an interpreter with nltk (BKLM_NLTK_PYTHON); else nltk is missing

The text is drawn: a walk over the embedded corpus that at every second word jumps to another place with the same word (what
follows two words is that text's bigrams), and puts a name, drawn from a Zipf law over two million, for every fifth word. So
the vocabulary and the longer n-grams go on growing as in large texts; a longer sample of a fixed text would not make them.
Times are those of one thread, in processor seconds: they hold on a busy machine, too. Memory is resident memory at its
highest, above that before the stage; bytes per n-gram count all n-grams of lengths 1 to 5, in training the text's ids and in
scoring the model with them. Growth is the exponent of time over the number of words; LINEAR counts as linear, since a larger
table stays in a smaller part in the caches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _timing import duration, peak_memory, print_table, processor, target
from tokenizers import trainers

from bklm.data import KneserNey, Vocabulary, load_corpus

NAMES, STREAMS, BYTES_A_WORD = 2_000_000, 1024, 4.6
TOKENIZERS_BYTES = 20_000_000  # of text are enough to know tokenizers' rate
NLTK_WORDS, NLTK_SCORED, SCORED = 241_000, 25, 100_000
LINEAR, BYTES_AN_NGRAM, TIMES_NLTK = 1.1, 24, 1000
"""Targets."""
# Small blocks stay where they are, large ones go back at once, so that resident memory tells of each stage.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_THRESHOLD_": str(2**22),
    "MALLOC_TRIM_THRESHOLD_": str(2**22),
}
NLTK = """
import json, sys, time
from nltk.lm import KneserNeyInterpolated, Vocabulary
from nltk.util import everygrams
train, asked = json.load(sys.stdin)
model = KneserNeyInterpolated(3, discount=0.75)
model.fit([everygrams(train, max_len=3)], Vocabulary(train))
started = time.process_time()
scores = [model.score(asked[i], asked[max(0, i - 2) : i]) for i in range(1, len(asked))]
print(json.dumps([(time.process_time() - started) / len(scores), scores]))
"""


def lines_of(size: int, seed: int) -> Iterator[str]:
    """Lines of a drawn text of about ``size`` bytes."""
    source = [word for line in load_corpus("embedded").train for word in line.split()]
    words = sorted(set(source))
    number = {word: i for i, word in enumerate(words)}
    ids = np.array([number[word] for word in source])
    by_word, begin = np.argsort(ids, kind="stable"), np.searchsorted(np.sort(ids), np.arange(len(words) + 1))
    draw = np.random.default_rng(seed)
    places = draw.integers(len(ids), size=STREAMS)
    walk = np.empty((int(size / BYTES_A_WORD / STREAMS) + 1, STREAMS), np.int64)
    for step in walk:
        step[:] = ids[places]
        there = begin[step] + (draw.random(STREAMS) * np.diff(begin)[step]).astype(np.int64)
        places = (np.where(draw.random(STREAMS) < 0.5, by_word[there], places) + 1) % len(ids)
    is_name = draw.random(walk.shape) < 0.2
    walk[is_name] = -1 - draw.zipf(1.25, np.count_nonzero(is_name)) % NAMES
    for stream in walk.T:
        text = [words[i] if i >= 0 else f"n{-i:x}" for i in stream.tolist()]
        ends = np.cumsum(draw.integers(3, 200, size=len(text) // 100 + 2)).tolist()
        for first, last in zip([0, *ends], [*ends, len(text)], strict=True):
            if line := " ".join(text[first:last]):
                yield line


def write_text(folder: Path, size: int, seed: int) -> None:
    lines = list(lines_of(size, seed))
    held = max(1, len(lines) // 100)
    for name, part in (
        ("train", lines[: -2 * held]),
        ("valid", lines[-2 * held : -held]),
        ("test", lines[-held:]),
    ):
        (folder / f"{name}.txt").write_text("\n".join(part) + "\n", encoding="utf-8")


def stage(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """What ``work`` gives, processor seconds, bytes at its peak."""
    found: list[Any] = []

    def call() -> None:
        started = time.process_time()
        found.extend((work(), time.process_time() - started))

    peak = peak_memory(call)
    return found[0], found[1], peak or 0


def measured(folder: Path) -> dict[str, Any]:
    """All stages on the text in ``folder``, in this process."""
    row: dict[str, Any] = {"bytes": sum(file.stat().st_size for file in folder.iterdir())}
    vocab, ids, valid = text_stages(folder, row)
    model, row["fit"], row["fit_peak"] = stage(lambda: KneserNey(5, "modified").fit(ids, len(vocab)))
    row["ngrams"] = [len(level.words) for level in model.levels]
    row["model"] = sum(level.nbytes for level in model.levels)
    row["fit_peak"] += ids.nbytes
    _, row["score"], peak = stage(lambda: model.log_probs(valid))
    row["score_peak"] = row["model"] + valid.nbytes + peak
    return row | {"tokens": len(ids), "words": len(vocab), "scored": len(valid)}


def text_stages(folder: Path, row: dict[str, Any]) -> tuple[Vocabulary, np.ndarray, np.ndarray]:
    """From files to ids: the vocabulary, the ids of the training text and of the validation text."""
    corpus, row["load"], row["load_peak"] = stage(lambda: load_corpus("wikitext-2", folder))
    train = corpus.train
    vocab, row["vocabulary"], row["vocabulary_peak"] = stage(lambda: Vocabulary.train(train, 2**31 - 1))
    ids, row["ids"], row["ids_peak"] = stage(lambda: vocab.encode(train))
    begun = np.cumsum([len(line) for line in train])
    row |= rates_of_tokenizers(train[: int(np.searchsorted(begun, TOKENIZERS_BYTES)) + 1], vocab)
    return vocab, ids, vocab.encode(corpus.valid)


def rates_of_tokenizers(lines: list[str], vocab: Vocabulary) -> dict[str, float]:
    """Processor seconds a word that ``tokenizers`` takes to find the same vocabulary, and to encode with it."""
    trainer = trainers.WordLevelTrainer(vocab_size=len(vocab), special_tokens=[], show_progress=False)
    trained, given = vocab.tokenizer, vocab.tokenizer
    # This text needs no normaliser, and tokenizers is faster without.
    trained.normalizer = given.normalizer = None

    def encode() -> int:
        parts = (lines[i : i + 1000] for i in range(0, len(lines), 1000))
        return sum(
            len(e.ids) for part in parts for e in given.encode_batch_fast(part, add_special_tokens=False)
        )

    words, seconds, _ = stage(encode)
    _, training, _ = stage(lambda: trained.train_from_iterator(lines, trainer))
    return {"their_vocabulary": training / words, "their_ids": seconds / words}


def kenlm_bytes(ngrams: list[int], words: int) -> tuple[float, float]:
    """Bytes per n-gram of KenLM's two structures without quantisation, by their published layout.

    Heafield 2011, "KenLM: Faster and Smaller Language Model Queries", section 2, and kheafield.com/code/kenlm/structures:
    probing keeps a unigram in 8 B, longer ones in a table of 1.5 places each, 16 B a place and 12 B for the longest; the
    trie a unigram in 16 B, longer ones in bits: word, 31 for a probability, 32 for a backoff, and where its block begins.
    """
    first, *middle, longest = ngrams
    probing = 8 * first + 1.5 * (16 * sum(middle) + 12 * longest)
    bits = sum(
        n * (words.bit_length() + 63 + after.bit_length()) for n, after in zip(middle, ngrams[2:], strict=True)
    )
    trie = 16 * first + (bits + longest * (words.bit_length() + 31)) / 8
    return probing / sum(ngrams), trie / sum(ngrams)


def against_nltk(folder: Path, python: str) -> tuple[list[dict[str, str]], float | None]:
    """Order 3, discount 0.75, NLTK_WORDS words: the time of one word, and how many times as fast ours is.

    Both score text that follows the training text, nltk NLTK_SCORED words of it, on which both must give the same numbers,
    ours SCORED words.
    """
    corpus = load_corpus("wikitext-2", folder)
    text = [word for line in corpus.train for word in line.split()][: NLTK_WORDS + SCORED]
    train, after = text[:NLTK_WORDS], text[NLTK_WORDS:]
    vocab = Vocabulary.train([" ".join(train)], 2**31 - 1)
    after = [word for word in after if word in vocab.ids]
    asked = after[:NLTK_SCORED]
    # Neither pad nor unk is a word of nltk's: ours has as many words when both are left out.
    model = KneserNey(3, 0.75).fit(vocab.encode([" ".join(train)]).astype(np.int64) - 2, len(vocab) - 2)
    many = vocab.encode([" ".join(after)]).astype(np.int64) - 2
    ids = many[: len(asked)]
    started = time.process_time()
    model.log_probs(many)
    ours = (time.process_time() - started) / (len(many) - 1)
    rows = [{"tool": "bklm", "a word": duration(ours), "x": "1", "words": f"{len(train):,}"}]
    done = subprocess.run(
        [python, "-c", NLTK], input=json.dumps([train, asked]), capture_output=True, text=True
    )
    if done.returncode:
        told = "not installed here" if "No module named 'nltk'" in done.stderr else done.stderr[-300:]
        return [*rows, {"tool": "nltk", "a word": told}], None
    theirs, scores = json.loads(done.stdout)
    np.testing.assert_allclose(np.exp(model.log_probs(ids)), scores, rtol=1e-6)
    last = {"tool": "nltk", "a word": duration(theirs), "x": f"1 / {theirs / ours:,.0f}"}
    return [*rows, last | {"words": f"{len(train):,}"}], theirs / ours


def show(found: list[dict[str, Any]]) -> None:
    def per_token(row: dict[str, Any], key: str) -> str:
        return f"{row[key] / row['tokens'] * 1e9:.0f} ns"

    print_table(
        "text to ids, one thread: nanoseconds of the processor per word; peak memory in bytes per byte of text",
        [
            {
                "text": f"{row['bytes'] / 1e6:.1f} MB",
                "words": f"{row['tokens']:,}",
                "distinct": f"{row['words']:,}",
                "load_corpus": per_token(row, "load"),
                "vocabulary": per_token(row, "vocabulary"),
                "tokenizers' trainer": f"{row['their_vocabulary'] * 1e9:.0f} ns",
                "ids": per_token(row, "ids"),
                "tokenizers' encoding": f"{row['their_ids'] * 1e9:.0f} ns",
                "peak": " / ".join(
                    f"{row[f'{s}_peak'] / row['bytes']:.1f}" for s in ("load", "vocabulary", "ids")
                ),
            }
            for row in found
        ],
    )
    rows = []
    for row in found:
        total = sum(row["ngrams"])
        probing, trie = kenlm_bytes(row["ngrams"], row["words"])
        rows.append(
            {
                "text": f"{row['bytes'] / 1e6:.1f} MB",
                "n-grams": f"{total:,}",
                "of lengths 1 to 5, per word": " ".join(f"{n / row['tokens']:.2f}" for n in row["ngrams"]),
                "training, a word": per_token(row, "fit"),
                "training's peak": f"{row['fit_peak'] / total:.1f} B",
                "scoring's peak": f"{row['score_peak'] / total:.1f} B",
                "model": f"{row['model'] / total:.1f} B",
                "KenLM probing": f"{probing:.1f} B",
                "KenLM trie": f"{trie:.1f} B",
                "scoring, a word": f"{row['score'] / row['scored'] * 1e9:.0f} ns",
            }
        )
    print_table(
        "Kneser-Ney of order 5, modified discounts, one thread; bytes per n-gram (target: at most 24)", rows
    )


def exponent(found: list[dict[str, Any]], key: str, words: str) -> float | None:
    """Of the seconds or bytes at ``key`` over the number of words, by least squares through the logarithms."""
    if len(found) < 2:
        return None
    sizes, values = ([row[name] for row in found] for name in (words, key))
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def judge(found: list[dict[str, Any]], over_nltk: float | None) -> None:
    """Print every target and whether it is held, memory at its worst."""
    print()
    for what, key, words in (
        ("reading the text", "load", "tokens"),
        ("the vocabulary", "vocabulary", "tokens"),
        ("the ids", "ids", "tokens"),
        ("training", "fit", "tokens"),
        ("scoring", "score", "scored"),
    ):
        target(f"exponent of the time of {what} over the words", exponent(found, key, words), most=LINEAR)
    for what, key in (("training", "fit_peak"), ("the model", "model"), ("scoring", "score_peak")):
        target(f"exponent of the memory of {what} over the words", exponent(found, key, "tokens"), most=LINEAR)
        worst = max(row[key] / sum(row["ngrams"]) for row in found)
        target(f"bytes an n-gram of {what}", worst, most=BYTES_AN_NGRAM)
    target("times as fast as nltk", over_nltk, least=TIMES_NLTK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[10, 30, 100])
    parser.add_argument("--quick", action="store_true", help="1 and 3 MB")
    parser.add_argument("--nltk", default=os.environ.get("BKLM_NLTK_PYTHON", sys.executable), metavar="PYTHON")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments.one)))
        return
    print(f"{processor()}, 1 thread, numpy {np.__version__}")
    found = []
    with tempfile.TemporaryDirectory() as place:
        for size in (1, 3) if arguments.quick else arguments.megabytes:
            folder = Path(place) / f"text_{size:g}"
            folder.mkdir()
            write_text(folder, int(size * 1e6), seed=0)
            done = subprocess.run(
                [sys.executable, __file__, "--one", str(folder)],
                env={**os.environ, **SETTINGS},
                stdout=subprocess.PIPE,
                check=True,
            )
            found.append(json.loads(done.stdout))
        show(found)
        rows, over_nltk = against_nltk(folder, arguments.nltk)
        print_table("scoring with order 3, discount 0.75, against nltk (the same numbers)", rows)
        judge(found, over_nltk)


if __name__ == "__main__":
    main()
