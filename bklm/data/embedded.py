"""The embedded corpus: the language reference that every CPython carries for ``help()``, as WikiText-style lines.

It needs no network and no file of ours, and it is real English; it is small (about 60,000 training words) and
differs a little from one Python version to the next, so results on it are demonstrations. ``source`` names the
version, ``sha256`` the exact text.
"""

from __future__ import annotations

import platform
import re
import textwrap
from collections.abc import Iterator, Mapping

from bklm.data.corpus import LICENCES, SPLITS, Corpus

SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}

_TOKEN = re.compile(r"\w+(?:['’]\w+)*|\.\.\.|[^\w\s]")
_RULE = re.compile(r"[-=+*~^\"|\s]{4,}")
_EMPHASIS = re.compile(r"\*\*?(?=\S)([^*\n]*[^*\s])\*\*?")


def embedded_corpus() -> Corpus:
    """``pydoc_data.topics`` as a corpus: a level-1 heading a topic, a line a paragraph, words and punctuation apart."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError(
            'the "embedded" corpus reads pydoc_data.topics, which this Python was built without; '
            'use another Python, data_dir, or corpus "hmm"'
        ) from None
    splits = split_topics(distinct_paragraphs(topics))
    lines = {
        split: [line for topic, body in chosen.items() for line in (f" = {topic} = ", *body)]
        for split, chosen in splits.items()
    }
    source = f"pydoc_data.topics of Python {platform.python_version()}"
    return Corpus("embedded", source, **lines, licence=LICENCES["embedded"])


def distinct_paragraphs(topics: Mapping[str, str]) -> dict[str, list[str]]:
    """The topics as lists of tokenised paragraphs, each paragraph in one topic only, in order of topic name.

    Long topics quote short ones whole ("compound" holds "if", "for", "try" ...). Were the copies kept, a
    validation topic could stand in the training text word for word; so the shortest topic with a paragraph
    keeps it.
    """
    seen: set[str] = set()
    kept: dict[str, list[str]] = {}
    for topic in sorted(topics, key=lambda topic: (len(topics[topic]), topic)):
        kept[topic] = []
        for line in _paragraphs(topics[topic]):
            if line not in seen:
                seen.add(line)
                kept[topic].append(line)
    return {topic: kept[topic] for topic in sorted(kept) if kept[topic]}


def split_topics(bodies: Mapping[str, list[str]]) -> dict[str, dict[str, list[str]]]:
    """Whole topics to train, valid and test, 80, 10 and 10% of the words.

    The rule: topics from the longest to the shortest, each to the split that is furthest below its share so
    far. It has no random part and stays balanced whatever the sizes are.
    """
    words = {topic: sum(len(line.split()) for line in body) for topic, body in bodies.items()}
    filled = dict.fromkeys(SPLITS, 0)
    split_of: dict[str, str] = {}
    for topic in sorted(words, key=lambda topic: (-words[topic], topic)):
        emptiest = min(SPLITS, key=lambda split: filled[split] / SHARES[split])
        split_of[topic] = emptiest
        filled[emptiest] += words[topic]
    return {
        split: {topic: body for topic, body in bodies.items() if split_of[topic] == split} for split in SPLITS
    }


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a reStructuredText page as lines of tokens; underlined titles become `` = = Title = = ``."""
    for block in re.split(r"\n\s*\n", textwrap.dedent(text)):
        rows = block.split("\n")
        underlined = len(rows) > 1 and len(set(rows[-1].strip())) == 1 and _RULE.fullmatch(rows[-1])
        plain = " ".join(row for row in rows if not _RULE.fullmatch(row))
        tokens = _TOKEN.findall(_EMPHASIS.sub(r"\1", plain))
        if tokens:
            body = " ".join(tokens)
            yield f" = = {body} = = " if underlined else f" {body} "
