"""Phase 2 of the context-token model: the context block is frozen, so contexts are computed once, kept, and read.

``build`` runs the context block along each text once (``bklm.training.two_phase.contexts``) and returns a
``CachedContextLM``: a language model over *positions* of those texts instead of token ids, which ``bklm.training.train``
trains like any other. An epoch is then plain batched training of the token block, on the numbers that the walk from
token to token would give. What is kept of them, and where, ``bklm.training.two_phase.store`` chooses.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from bklm.data import IGNORED, Windows, make_loader
from bklm.models import ContextTokenLM, LanguageModel
from bklm.training.two_phase.contexts import CorpusContexts, checked_ids, corpus_contexts
from bklm.training.two_phase.store import Plan, choose_plan, empty_store

log = logging.getLogger(__name__)

SHORTEST_SEGMENT, LONGEST_SEGMENT = 8192, 2**18  # tokens whose contexts are found in one piece
SEGMENT_BYTES = 2**27  # of such a piece's final contexts; what finds them takes some sixteen times that
CHUNK = 2048  # tokens whose layers are computed at once


def build(
    model: ContextTokenLM,
    texts: Mapping[str, Any],
    *,
    document_starts: Mapping[str, Any] | None = None,
    memory_bytes: int | None = None,
    refresh: bool = False,
    tolerance: float = 1e-4,
) -> CachedContextLM:
    """Freeze ``model``'s context block, compute the contexts of every text, and return what phase 2 trains.

        cached = build(model, {"train": train_ids, "valid": valid_ids})
        train(cached, cached.batches("train", seed=0), cached.batches("valid"), settings, accelerator=...)

    Args:
        texts: name -> (T,) token ids. Every text starts from the zero context; within one the state runs on.
        document_starts: name -> positions at which it starts from zeros again.
        memory_bytes: what the cache may take, if need be in half precision. None: contexts are kept as computed, in a file
            where memory is short, so that no number depends on what is free.
        refresh: compute the contexts anew whenever an epoch has changed the embedding or the LayerNorm after it (they are
            otherwise those of the embedding as it is now). Said in the log each time.
        tolerance: of the contexts, see ``corpus_contexts``.

    Raises:
        ValueError: no phase 1 has trained the context block, nothing is left to train, or a text that cannot be used.
    """
    if int(model.context_block.fixed_point_iterations) == 0:
        raise ValueError(
            "model: its context block is as it was drawn, and phase 2 would freeze it so; run phase 1 first, "
            "bklm.training.two_phase.phase1.train_context(model, token_ids)."
        )
    model.freeze_context()
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "model: every parameter is frozen, so phase 2 has nothing to train; leave the token block trainable."
        )
    unknown = set(document_starts or {}) - set(texts)
    if unknown:
        raise ValueError(f"document_starts: got {sorted(unknown)}; the texts are {sorted(texts)}.")
    checked = {
        name: checked_ids(model, ids, None if document_starts is None else document_starts.get(name))
        for name, ids in texts.items()
    }
    if not checked:
        raise ValueError("texts: got none; give at least one, such as {'train': token_ids}.")
    tokens = sum(len(ids) for ids, _ in checked.values())
    plan = choose_plan(model, tokens, memory_bytes)
    return CachedContextLM(model, checked, plan, refresh, tolerance)


class CachedContextLM(LanguageModel):
    """A ContextTokenLM over positions of texts whose contexts are kept; what ``build`` returns.

    ``input_ids`` are positions (B, N) in all texts laid end to end, as ``batches`` gives them; targets are token ids.
    Its parameters are the model's own: training it trains ``model``. A context is a constant, so a trained embedding gets
    its gradient through x and a tied head, not through earlier tokens.

    Attributes:
        model: the ContextTokenLM.
        plan: how contexts are kept; ``str`` gives it in words.
        reports: per text how its contexts were found, a segment each; of the contexts only the last is in it.
        recomputed: how often the contexts were computed again because the embedding had changed.
    """

    def __init__(
        self,
        model: ContextTokenLM,
        texts: dict[str, tuple[Tensor, Tensor]],
        plan: Plan,
        refresh: bool,
        tolerance: float,
    ) -> None:
        super().__init__()
        self.model, self.plan, self.refresh, self.tolerance = model, plan, refresh, tolerance
        self.vocab_size = model.vocab_size
        self.recomputed = 0
        self._texts = texts
        self._spans, stop = {}, 0
        for name, (ids, _) in texts.items():
            self._spans[name] = range(stop, stop := stop + len(ids))
        self._ids = torch.cat([ids for ids, _ in texts.values()]).to(plan.device)
        firsts = [torch.tensor([span.start], device="cpu") for span in self._spans.values()]
        restarts = [starts.cpu() + self._spans[name].start for name, (_, starts) in texts.items()]
        self._alone = torch.zeros(stop, dtype=torch.bool, device=plan.device)  # tokens without left neighbour
        self._alone[torch.cat(firsts + restarts).to(plan.device)] = True
        self._store = empty_store(plan, stop, model)
        self.reports: dict[str, list[CorpusContexts]] = {}
        self._fill()
        log.info("context cache: %d tokens, %s, %.2f GiB.", stop, plan, plan.bytes(stop, model) / 2**30)

    def batches(
        self, text: str, tokens: int = 512, *, rows: int = 1, shuffle: bool = False, seed: int = 0
    ) -> DataLoader:
        """A loader of (positions, target ids), each (rows, tokens) consecutive tokens of ``text``, to train and evaluate on.

        Every token after the first is a target once. Shuffled, the order of batches is a function of (seed, epoch).

        Raises:
            ValueError: an unknown text, or a batch longer than it.
        """
        if text not in self._spans:
            raise ValueError(f"text: got {text!r}; allowed are {', '.join(map(repr, self._spans))}.")
        span, ids = self._spans[text], self._texts[text][0].cpu().numpy()
        length = min(tokens, len(span) - 1)
        windows = _PositionWindows(span.start, ids, length)
        return make_loader(windows, min(rows, len(windows)), shuffle=shuffle, seed=seed)

    def hidden(self, positions: Tensor) -> Tensor:
        ids = self._ids[positions.to(self._ids.device)].to(positions.device)
        return self.model.token_block(self.model.embed(ids), self.contexts(positions))

    def contexts(self, positions: Tensor) -> Tensor:
        """Contexts of every layer (B, N, L, D_c) at ``positions`` (B, N), on their device, in the model's dtype."""
        like, block = self.model.embedding.weight, self.model.context_block
        if self.plan.layers and block.mixing.idle:
            return self._read(positions).to(positions.device, like.dtype, non_blocking=True)
        places = positions.to(self.plan.device)
        alone = self._alone[places].unsqueeze(-1).to(positions.device)
        before = self._read((places - 1).clamp_min(0)).to(positions.device, like.dtype, non_blocking=True)
        before = before[..., -1, :] if self.plan.layers else before
        with torch.no_grad():
            x = self._x_of_the_contexts(self._ids[places].to(positions.device))
            return block(block.mixing(before.masked_fill(alone, 0.0)), x)

    def head(self) -> tuple[Tensor, Tensor | None]:
        return self.model.head()

    def check_ids(self, input_ids: Tensor) -> None:
        """Refuse positions of a wrong dtype, rank or (on a CPU) range."""
        if input_ids.dtype != torch.int64 or input_ids.ndim != 2:
            raise TypeError(
                f"positions: got {input_ids.dtype} of shape {tuple(input_ids.shape)}; they must be int64 (batch, length)."
            )
        if input_ids.device.type == "cpu" and input_ids.numel():
            low, high = int(input_ids.min()), int(input_ids.max())
            if not 0 <= low <= high < len(self._ids):
                raise ValueError(f"positions: got {low} to {high}; allowed is 0 to {len(self._ids) - 1}.")

    def generate(self, *args: Any, **options: Any) -> Tensor:
        """Refused: positions of kept texts cannot be continued."""
        raise TypeError("a CachedContextLM reads positions of kept texts; generate with its .model instead.")

    def train(self, mode: bool = True) -> CachedContextLM:
        """Switch the mode; here contexts are refreshed, because training and evaluation both begin with it."""
        super().train(mode)
        if self.refresh and not self._is_fresh():
            self._fill()
            self.recomputed += 1
            log.info("context cache: the embedding has changed; contexts computed again (%d).", self.recomputed)
        return self

    @torch.no_grad()
    def _fill(self) -> None:
        block, encoder = self.model.context_block, (self.model.embedding, self.model.norm)
        parameters = [p for module in encoder for p in module.parameters()]
        # Where they are trained, contexts belong to the values of this moment, whatever is recomputed from them later.
        trained = any(p.requires_grad for p in parameters)
        self._encoder = [p.detach().clone() for p in parameters] if trained else parameters
        for name, (ids, restarts) in self._texts.items():
            self.reports[name], before = [], ids.new_zeros(self.model.config.context_dim)
            for first, part in _segments(ids, self.model):
                inside = restarts[(restarts >= first) & (restarts < first + len(part))] - first
                found = corpus_contexts(
                    self.model, part, start=before, document_starts=inside, tolerance=self.tolerance
                )
                offset = self._spans[name].start + first
                if self.plan.layers:
                    previous = torch.cat([before.to(found.final)[None], found.final[:-1]])
                    previous[inside] = 0.0
                    for i in range(0, len(part), CHUNK):
                        layers = block(previous[i : i + CHUNK], self.model.embed(part[i : i + CHUNK]))
                        self._store[offset + i : offset + i + len(layers)] = layers.to(self._store)
                else:
                    self._store[offset : offset + len(part)] = found.final.to(self._store)
                before = found.final[-1].clone()
                self.reports[name].append(dataclasses.replace(found, final=before[None]))
                log.info("context cache: %s from token %d: %s", name, first, found)

    def _is_fresh(self) -> bool:
        now = [*self.model.embedding.parameters(), *self.model.norm.parameters()]
        return all(a is b or torch.equal(a.to(b.device), b) for a, b in zip(self._encoder, now, strict=True))

    def _x_of_the_contexts(self, ids: Tensor) -> Tensor:
        """x as it was when the contexts were computed."""
        weight, *norm = (p.to(ids.device) for p in self._encoder)
        return F.layer_norm(F.embedding(ids, weight), weight.shape[1:], *norm, self.model.norm.eps)

    def _read(self, places: Tensor) -> Tensor:
        return self._store[places.to(self._store.device)]


class _PositionWindows(Windows):
    """Windows of positions ``first`` ..., whose targets are the token ids there."""

    def __init__(self, first: int, ids: np.ndarray, length: int) -> None:
        super().__init__(np.arange(first, first + len(ids)), length, pad_id=first)
        self.first, self.tokens = first, ids

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        x, places = super().__getitems__(indices)
        targets = torch.from_numpy(self.tokens[(places.clamp_min(self.first) - self.first).numpy()])
        return x, targets.masked_fill(places == IGNORED, IGNORED)


def _segments(ids: Tensor, model: ContextTokenLM) -> Iterator[tuple[int, Tensor]]:
    """(first position, ids) of parts, cut by the model's size alone: where they are cut moves contexts by the tolerance."""
    per_token = model.config.context_dim * model.embedding.weight.element_size()
    size = max(SHORTEST_SEGMENT, min(LONGEST_SEGMENT, SEGMENT_BYTES // per_token))
    for first in range(0, len(ids), size):
        yield first, ids[first : first + size]
