"""How fast this machine trains the embedding-freeze study's models, and about how many tokens its texts have."""

from __future__ import annotations

import dataclasses
import functools
from itertools import islice

import torch

from bklm.data import load_corpus
from bklm.harness.estimate import best_of
from bklm.models import ContextTokenConfig, ContextTokenLM, linear_cross_entropy
from bklm.training.processes import make_accelerator

# Of a BPE of some thousand tokens on tokenised text; and of an UltraChat dialogue, so that an estimate downloads nothing.
TOKENS_PER_WORD, DIALOGUE_TOKENS = 1.4, 1_100
# Evaluations per token of a corpus's contexts; forward and backward against a forward pass.
SWEEPS, GRADIENT = 3, 3


@functools.lru_cache(maxsize=64)
def about_tokens(dataset: str, data_dir: str | None, longest: int, documents: int, split: str) -> float:
    """About how many tokens the first documents of a split have, cut as the study cuts them."""
    if dataset == "ultrachat" and not data_dir:
        return documents * min(longest, DIALOGUE_TOKENS)
    corpus = load_corpus(dataset, data_dir, max_documents=documents)
    words = [len(text.split()) for text in islice(corpus.documents(split), documents)]
    return sum(min(longest, TOKENS_PER_WORD * n) for n in words)


@functools.lru_cache(maxsize=64)
def seconds_per_token(
    size: ContextTokenConfig, batch_tokens: int, device: str, precision: str, freezing: str = "", head: str = ""
) -> float:
    """Seconds per token of a step of phase 2 of an arm, or without one of an evaluation of the contexts; measured once."""
    accelerator = make_accelerator(device, precision)
    with torch.random.fork_rng():
        model = ContextTokenLM(dataclasses.replace(size, tied=head == "tied")).to(accelerator.device)
        model.freeze_context()
        if freezing == "frozen":
            model.freeze_embedding()
        ids = torch.randint(size.vocab_size, (1, batch_tokens), device=accelerator.device)
        contexts = torch.randn(1, batch_tokens, size.n_layers, size.context_dim, device=accelerator.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with accelerator.autocast():
            loss = linear_cross_entropy(model.token_block(model.embed(ids), contexts), *model.head(), ids)
        loss.backward()
        optimizer.step()
        loss.item()

    def evaluate_contexts() -> None:
        with torch.no_grad():
            model.context_block.final(contexts[:, :, 0], model.embed(ids)).sum().item()

    return best_of(step if freezing else evaluate_contexts, times=3) / batch_tokens
