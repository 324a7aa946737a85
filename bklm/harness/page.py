"""report.html: what a study found, on one page that needs nothing else, written by the run itself and by no front end."""

from __future__ import annotations

import base64
import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from PIL import Image

from bklm.files.atomic import write_text

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; } .wide { overflow-x: auto; } pre { white-space: pre-wrap; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
img { max-width: 100%; height: auto; margin-top: .8rem; } code { overflow-wrap: anywhere; }
"""

# What a column of a CSV file holds, with its unit; the first that fits. A group is shown as the column's own words are.
COLUMNS = (
    (r"original_(\w+)", "{0} as the original reported it"),
    (r"claimed_(low|high)", "the original's claim, its {0} end"),
    (r"(low|high)", "{0} end: quartile of a measured ratio, or of the 95% interval of a difference or ratio"),
    (r"(\w+)_low", "lower end of the 95% interval of {0}"),
    (r"(\w+)_high", "upper end of the 95% interval of {0}"),
    (r"(\w+)_95", "half the width of the 95% interval of {0}"),
    (r"(?:val_ppl_context|turns)_(\w+)", "validation perplexity where the model sees {0} tokens (or turns)"),
    (r"(\w+)_mixer_off", "{0} with the mixer's features replaced by their mean"),
    (
        r"context_gain_nats|\w+_turns_gain|other_context_loss",
        "loss without other positions less that with, nats",
    ),
    (r"context_gain_kept", "share of that which a replacement keeps; 0 for the best that reads one position"),
    (r"(time_)?loss_difference", "validation loss less the control's of the same seeds, nats"),
    (r"ppl_ratio", "perplexity over the original's of the same seeds"),
    (r"koopman_ppl", "perplexity of the published Koopman forward"),
    (r"r2(?:_\w+)?", "share of what changes that is explained (by that); 0 for predicting no change"),
    (r"phi_variance", "variance of the lifted states"),
    (r"psi_error", "share of the states' variance that psi does not give back"),
    (r"(?:accuracy|recalled)_(\d+)", "share of right answers at distance {0}, 0 to 1"),
    (r"real|imaginary|modulus|residual", "of an eigenvalue; residual: how far its function is from one"),
    (r"context_gain", "share by which context lowers the perplexity, 0 to 1"),
    (r"perplexity_change", "change of the perplexity, as a share of float32's"),
    (r"(\w+)_without_unk", "{0} without the targets that are the unknown word"),
    (r"val_(ppl|perplexity)", "perplexity on the validation split: exp of the mean loss per token"),
    (r"perplexity", "perplexity on the first validation tokens: exp of the mean loss per token"),
    (r"(train|test|text|all_tokens)_(ppl|perplexity)", "perplexity on {0}: exp of the mean loss per token"),
    (
        r"(val|train|text|all_tokens)_loss|(last_)?loss",
        "mean -log probability per token, nats; phase 1: its own",
    ),
    (r"step", "training step at which the row was logged, from 0"),
    (r"(val_)?accuracy", "share of validation tokens that the model thinks likeliest, 0 to 1"),
    (r"seconds_per_epoch", "seconds of one pass over the training text"),
    (r"generate_seconds_(\d+)", "seconds to write a token after {0} tokens"),
    (r"state_bytes_(\d+)", "bytes that a model keeps to go on after {0} tokens"),
    (r"seconds", "computing time, seconds"),
    (r"seconds_to_loss", "computing time to the loss that is the goal, seconds"),
    (r"(packed_)?(file_)?bytes", "size of the file, bytes; packed: by zlib"),
    (r"training_bytes|bytes_\d+", "memory of a training step at its peak (with so many blocks), bytes"),
    (r"peak_mb", "memory at its peak, MB (10^6 bytes)"),
    (r"(forward_)?(ms|milliseconds)", "time of a call, milliseconds, median"),
    (r"step_ratio", "seconds of a training step over the plain model's"),
    (r"(written_|forward_)?times_faster", "how many times faster than the arm it is compared with"),
    (r"(\w+_)?(tokens|bits)_per_(second|byte)", "{1} per {2}"),
    (r"tokens_per_parameter", "training tokens for each trained parameter"),
    (r"(?:train_)?(tokens|words)", "number of {0}"),
    (r"(active_|trainable_|more_|logit_)?parameters", "number of parameters"),
    (r"(batch|batch_parts|experts|samples|seeds|steps|iterations?|calls|n_seq|n|length)", "number of {0}"),
    (r"seed", "seed of the random numbers"),
    (r"any_of", "number of arms of which any one would do, for which the interval is widened"),
    (r"diverged", "number of trainings that ended without a finite loss"),
    (r"epoch|best_epoch|convergence_epoch", "number of passes over the training text"),
    (r"learning_rate(_at_start)?", "step size of the optimiser"),
    (r"dropout", "share of units that training drops, 0 to 1"),
    (r"loss_low_alone", "lower end of a loss difference's own 95% interval, nats"),
    (r"gradient_(norm(_\w+)?|variance)", "length of the gradient of all parameters (99: of 99 steps in 100)"),
    (
        r"(seconds_)?ratio|over_control|at_edge|gap|change|verdict|claim\w*|announced|measured|compared|short|where|factor|way|conserves|within|times_smaller|"
        r"distinct_\d|(ms|bytes)_ratio|stays|trade|same_\w+|untimed|repeats_prompt|ended|recalled|asked|replied|written",
        "see the tables",
    ),
    (r"cosine", "cosine with the exact gradient, -1 to 1"),
    (r"norm(_ratio)?", "length, relative to the exact gradient's where it is a ratio"),
    (r"(value|gradient)_error(_small_rows)?|difference|gradient_difference", "relative error or difference"),
    (r"im_z", "imaginary part of z"),
    (r"effective_rank(_centred)?|context_rank", "effective rank: exp of the entropy of the singular values"),
    (r"converged|stopped_early|float_reads", "true or false; share of documents for a phase 1"),
    (r"first_(spread|ratio|share)", "{0} when the energy's training begins"),
    (r"spread_kept", "spread of the energy over its first one"),
    (r"spread_of_detached", "spread of the energy over that of the nets which no model hears of"),
    (r"drift|spread(_of_v)?", "of an energy: mean change; standard deviation over states (of V over tokens)"),
    (r"work", "mean change of an energy with the causal drive, over its spread"),
    (r"(gradient|outer_parameter|head_time|core_time|kept|word)_share", "part of the whole, 0 to 1"),
    (r"embedding_norm", "root mean square of the embedding's numbers"),
    (r"inverse_error", "largest error of states rebuilt from the last block's"),
    (r"reached", "seeds that reach the plain model's last loss"),
    (r"stayed_([\d.e-]+)", "seeds that stay finite and no worse than untrained at learning rate {0}"),
    (r"largest_rate", "largest learning rate at which all seeds do"),
    (r"growth", "memory of the most blocks over that of the fewest"),
    (r"mse|diversity|context_drift|contexts|first_contexts", "of phase 1; see docs/results.md"),
    (
        r"alpha|arm|protocol|family|model|run|name|expert|direction|weights|reference|recursion|precision|status|note|format|support|why"
        r"|block|replacement|control|weight|against|switch|study|on|off|initialisation|freezing|head|original|measured_on|trained|gradient|baseline",
        "what the row is about",
    ),
)


def meaning(column: str) -> str:
    """What a column of a CSV file holds, with its unit; "" for one that is not known."""
    for pattern, words in COLUMNS:
        if found := re.fullmatch(pattern, column):
            groups = [(g or "").replace("_", " ") for g in found.groups()]
            return words.format(*groups)
    return ""


def write_page(path: Path, result: Any, facts: Mapping[str, Any], files: Iterable[Path]) -> None:
    """Write what a study found, atomically: sentences, tables, pictures, settings, command, files.

    Args:
        result: gives ``sentences()``, ``tables()`` and ``config`` (resolved).
        facts: what manifest.json holds, with "command", "config", "corpus" and "environment".
        files: the study's own, in the order in which they were written; tables and pictures that lie beside them, such as
            what a notebook measured when somebody asked for it, follow them.
    """
    files = [file for file in files if file.exists()]
    files += [p for p in sorted(path.parent.iterdir()) if p.suffix in (".csv", ".png") and p not in files]
    tables = {name: rows for name, make in result.tables().items() if (rows := make())}
    title = f"{result.config.study.replace('_', ' ')}: what was found"
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p><strong>{escape(words)}</strong></p>" for words in result.sentences()),
        f"<p>{_when(path.parent)} Profile: {escape(facts['profile'])}.</p>",
        *(_picture(file) for file in files if file.suffix == ".png"),
        *(f"<h2>Table: {escape(name)}</h2>{_table(rows)}" for name, rows in tables.items()),
        "<h2>Settings</h2>",
        _table([{"setting": k, "value": _words(v)} for k, v in facts["config"].items() if v is not None]),
        f"<h2>The command that repeats it</h2><pre><code>{escape(facts['command'])}</code></pre>",
        f"<h2>Text and machine</h2>{_table(_about(facts))}",
        f"<h2>Files</h2><ul>{''.join(_file(file, path.parent) for file in files)}</ul>",
    ]
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
    )
    write_text(path, head + "\n".join(parts) + "</body></html>\n")


def alternative_text(picture: Path) -> str:
    """What a PNG shows, in the words that ``bklm.harness.figures.save_figure`` has written into it; else its name."""
    try:
        with Image.open(picture) as image:
            words = [image.info[key] for key in ("Title", "Description") if image.info.get(key)]
    except OSError:  # no PNG: the page says which file it is, and a browser that it cannot show it
        words = []
    return ". ".join(words) or picture.stem.replace("_", " ")


def moments(folder: Path) -> tuple[str, str] | tuple[None, None]:
    """When a study was begun and when its last part was finished, UTC; a run that only reads it back changes neither."""
    times = [p.stat().st_mtime for p in (*folder.glob("config.json"), *folder.glob("*/**/*.json"))]
    if not times:
        return None, None
    first, last = (
        datetime.datetime.fromtimestamp(t, datetime.timezone.utc).isoformat(sep=" ", timespec="seconds")
        for t in (min(times), max(times))
    )
    return first, last


def _when(folder: Path) -> str:
    begun, finished = moments(folder)
    return f"Begun {begun}, last part finished {finished} (UTC)." if begun else ""


def _picture(file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    return f'<p><img src="data:image/png;base64,{data}" alt="{escape(alternative_text(file))}"></p>'


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    found = pd.DataFrame(rows).fillna("")
    return f'<div class="wide">{found.to_html(index=False, border=0, float_format="{:.6g}".format)}</div>'


def _file(file: Path, folder: Path) -> str:
    if not file.is_relative_to(folder):  # such as a checkpoint that lies elsewhere
        return f"<li>{escape(str(file))}</li>"
    inside = file.relative_to(folder).as_posix()
    link = f'<li><a href="{escape(quote(inside))}">{escape(inside)}</a>'
    if file.suffix != ".csv":
        return f"{link}</li>"
    try:
        columns = pd.read_csv(file, nrows=0).columns
    except (ValueError, OSError):  # somebody else's
        return f"{link}</li>"
    words = [f"<code>{escape(name)}</code>: {escape(meaning(name) or 'see the tables')}" for name in columns]
    return f"{link}<details><summary>its columns</summary>{'; '.join(words)}</details></li>"


def _about(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    machine, corpus = facts["environment"], facts["corpus"]
    gpu = machine["gpu"]["name"] if machine["gpu"] else "none"
    rows = {"text": f"{corpus['name']}, from {corpus['source']}"} if corpus else {}
    rows |= {
        "computing time": f"{facts['seconds']:g} s",
        "bklm": f"{machine['bklm']}, revision {facts['git_revision']}",
        "Python, PyTorch": f"{machine['python']}, {machine['packages']['torch']}",
        "processor": f"{machine['processor']}, {machine['cores']} cores",
        "GPU": gpu,
    }
    return [{"what": name, "found": value} for name, value in rows.items()]


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
