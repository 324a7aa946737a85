"""Token embeddings to start from: GPT-2's, ones factorised from the co-occurrences of a text, or random ones.

Each is a float32 array (vocab_size, dim), row i for token i.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import svds

from bklm.data.cache import load_or_build
from bklm.data.checks import require_whole
from bklm.data.hub_models import GPT2, fetch_tensor, tensor_entry

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the factorised table changes
GPT2_SHAPE = (50_257, 768)
GPT2_STD = 0.144  # of all entries of GPT-2's table: what the factorised table is scaled to
# The names under which model files keep their input embedding.
TABLE_NAMES = ("wte.weight", "transformer.wte.weight", "model.embed_tokens.weight", "embedding.weight")


def gpt2_embedding() -> np.ndarray:
    """GPT-2's token embedding (50257, 768) from the hub: 154 MB of the 548 MB file, kept in bklm's cache.

    Raises:
        ConnectionError: the hub cannot be reached.
    """

    def build() -> dict[str, np.ndarray]:
        log.info("Fetching %s's token embedding, %.0f MB", GPT2, 4 * GPT2_SHAPE[0] * GPT2_SHAPE[1] / 1e6)
        way_on = "give embedding_file a local copy, or choose embedding 'svd', which needs no network"
        table = fetch_tensor(GPT2, "model.safetensors", TABLE_NAMES[0], way_on)
        if table.shape != GPT2_SHAPE:
            raise ValueError(f"{GPT2} holds {TABLE_NAMES[0]} of shape {table.shape}, not {GPT2_SHAPE}")
        return {"bits": table.reshape(-1).view(np.uint32)}  # the cache keeps integers

    bits = load_or_build("embeddings", "gpt2-wte", ("bits",), build)["bits"]
    return np.array(bits).view(np.float32).reshape(GPT2_SHAPE)


def embedding_file_shape(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(rows, columns) of the table in a .safetensors or .npy file, from its header alone; errors as ``load_embedding``."""
    return _open(Path(path).expanduser())[0]


def load_embedding(path: str | os.PathLike[str], vocab_size: int, dim: int) -> np.ndarray:
    """The table of a .safetensors file (under one of ``TABLE_NAMES``, or its only tensor) or of a .npy file.

    Raises:
        FileNotFoundError, OSError: there is no such file, or it cannot be read.
        ValueError: it holds no table, or one for another vocabulary or width, or numbers that are not finite.
    """
    path = Path(path).expanduser()
    shape, name = _open(path)
    if shape[0] != vocab_size:
        raise ValueError(
            f"embedding_file {str(path)!r} has rows for {shape[0]:,} tokens, but the tokeniser has {vocab_size:,}; "
            f"give the table of this tokeniser, or the tokeniser of this table"
        )
    if shape[1] != dim:
        raise ValueError(
            f"embedding_file {str(path)!r} has {shape[1]} columns, but embed_dim is {dim}; set embed_dim to {shape[1]}"
        )
    if name is None:
        table = np.load(path, allow_pickle=False).astype(np.float32)
    else:
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as content:
            table = content.get_tensor(name).float().numpy()
    if not np.isfinite(table).all():
        raise ValueError(f"embedding_file {str(path)!r} holds numbers that are not finite; give another file")
    return table


def _open(path: Path) -> tuple[tuple[int, int], str | None]:
    """Shape of a file's table and its name in the file (None for .npy)."""
    where, kinds = f"embedding_file {str(path)!r}", "a .safetensors or .npy file with one row a token"
    if not path.is_file():
        raise FileNotFoundError(f"{where} does not exist; give {kinds}, or leave it empty")
    name: str | None = None
    try:
        if path.suffix == ".npy":
            shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
        elif path.suffix == ".safetensors":
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            header.pop("__metadata__", None)
            only = next(iter(header)) if len(header) == 1 else TABLE_NAMES[0]
            name = next((known for known in TABLE_NAMES if known in header), only)
            shape = tuple(tensor_entry(header, name, where)["shape"])
        else:
            raise ValueError(f"{where} is no .safetensors and no .npy file")
    except (OSError, ValueError, OverflowError, MemoryError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} cannot be read ({error}); give {kinds}") from error
    if len(shape) != 2:
        raise ValueError(f"{where} holds an array of shape {shape}; give {kinds}")
    return (shape[0], shape[1]), name


def random_embedding(vocab_size: int, dim: int, std: float, seed: int) -> np.ndarray:
    """Independent normal entries of standard deviation ``std``."""
    return np.random.default_rng(seed).normal(0.0, std, (vocab_size, dim)).astype(np.float32)


def svd_embedding(
    documents: Iterable[np.ndarray], vocab_size: int, dim: int, *, window: int = 5, seed: int = 0
) -> tuple[np.ndarray, int]:
    """Rows of a truncated SVD of the positive pointwise mutual information of tokens that occur near each other.

    Levy, Goldberg and Dagan 2015, "Improving distributional similarity with lessons learned from word embeddings":
    a neighbour at distance d in ``window`` counts 1/d, contexts are smoothed by the power 0.75, and the singular values
    enter by their square root. The table is centred and scaled to GPT-2's standard deviation, and kept in bklm's cache.

    Args:
        documents: ids (tokens,) of texts; no pair is counted across two of them.

    Returns:
        The table, and the number of tokens that the documents do not hold: their rows are random, of the same scale.

    Raises:
        ValueError: no pair of tokens, or ``dim`` not below the number of distinct tokens.
    """
    dim, window = require_whole("dim", dim, 1), require_whole("window", window, 1)
    ids = [np.asarray(document, np.int64) for document in documents]
    digest = hashlib.sha256(repr((FORMAT, vocab_size, dim, window, seed, list(map(len, ids)))).encode())
    for document in ids:
        digest.update(document)

    def build() -> dict[str, np.ndarray]:
        table, absent = _factorised(ids, vocab_size, dim, window, seed)
        return {"bits": table.reshape(-1).view(np.uint32), "absent": np.array([absent])}

    arrays = load_or_build("embeddings", f"svd-{digest.hexdigest()[:32]}", ("bits", "absent"), build)
    return np.array(arrays["bits"]).view(np.float32).reshape(vocab_size, dim), int(arrays["absent"][0])


def _factorised(
    ids: Sequence[np.ndarray], vocab_size: int, dim: int, window: int, seed: int
) -> tuple[np.ndarray, int]:
    counts = _near_pairs(ids, vocab_size, window)
    held = np.flatnonzero(counts.sum(axis=1))
    if dim >= len(held):
        raise ValueError(
            f"embed_dim: got {dim}, but the documents for the SVD hold only {len(held)} distinct tokens, and it must be "
            f"smaller; lower embed_dim, or leave more documents unused"
        )
    matrix = _positive_pmi(counts[held][:, held])
    start = np.random.default_rng(seed).normal(size=len(held))  # without it the solver draws its own
    left, values, _ = svds(matrix, k=dim, v0=start)
    order = np.argsort(-values)
    rows = left[:, order] * np.sqrt(np.maximum(values[order], 0.0))
    rows -= rows.mean(axis=0)
    table = random_embedding(vocab_size, dim, GPT2_STD, seed)
    table[held] = rows * (GPT2_STD / rows.std())
    return table, vocab_size - len(held)


def _near_pairs(ids: Sequence[np.ndarray], vocab_size: int, window: int) -> sparse.csr_matrix:
    """Symmetric counts (V, V), float64: 1/d for every two tokens at distance d <= window."""
    total = sparse.csr_matrix((vocab_size, vocab_size))
    for distance in range(1, window + 1):
        left = np.concatenate([d[:-distance] for d in ids if len(d) > distance] or [np.empty(0, np.int64)])
        right = np.concatenate([d[distance:] for d in ids if len(d) > distance] or [np.empty(0, np.int64)])
        weight = np.full(len(left), 1.0 / distance)
        total = total + sparse.coo_matrix((weight, (left, right)), shape=total.shape).tocsr()
    if total.nnz == 0:
        raise ValueError("the documents for the SVD hold no two tokens in a row; leave more documents unused")
    return (total + total.T).tocsr()


def _positive_pmi(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """max(0, log P(w, c) / (P(w) P(c)^0.75-smoothed)) where both occur together, 0 elsewhere."""
    rows = np.asarray(counts.sum(axis=1)).ravel()
    smoothed = rows**0.75
    pairs = counts.tocoo()
    pmi = np.log(pairs.data / rows[pairs.row] / (smoothed / smoothed.sum())[pairs.col])
    matrix = sparse.coo_matrix((np.maximum(pmi, 0.0), (pairs.row, pairs.col)), shape=counts.shape).tocsr()
    matrix.eliminate_zeros()
    return matrix
