"""GPT: a small GPT-2, the competitor at equal size.

Pre-norm transformer of Radford et al. (2019): learned positions, per block x += Attention(LN(x)) and
x += W_2 gelu(W_1 LN(x)), a final LayerNorm, and an output head tied to the token embedding, without bias. Attention is
torch's ``scaled_dot_product_attention`` with its causal mask. Dropout acts on the embedding and on what each branch adds,
not on the attention weights, where it would keep torch's fused kernel away on a CPU (a quarter of the tokens per second
at 1,024 positions); gelu is the exact one, of which GPT-2's is an approximation that takes torch twice the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.models.base import LanguageModel
from bklm.models.checks import check_dropout, check_int
from bklm.models.dropout import add_dropout, dropout
from bklm.models.mixing import MixingPoint
from bklm.moe.products import Linear

INITIAL_STD = 0.02


@dataclass(frozen=True)
class GPTConfig:
    """Size of a GPT.

    Raises:
        ValueError, TypeError: a field outside what is allowed, named with its value.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_seq: int  # positions with a learned embedding; there the model ends
    dropout_p: float = 0.1

    def __post_init__(self) -> None:
        check_int("vocab_size", self.vocab_size, 2)
        for name in ("d_model", "n_layers", "n_heads", "n_seq"):
            check_int(name, getattr(self, name), 1)
        if self.d_model % self.n_heads:
            raise ValueError(
                f"d_model: got {self.d_model}; it must be a multiple of n_heads = {self.n_heads}, whose outputs it joins."
            )
        check_dropout(self.dropout_p)


class KVCache:
    """Keys and values of one layer, (B, heads, capacity, head width), which grow at the end and are never changed.

    Several states may share one cache, each with its own length: whoever appends right behind the last entry
    writes in place; a state that lies further back (the same state stepped twice) gets a copy first.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values, self._filled = keys, values, keys.shape[2]

    def append(self, length: int, key: Tensor, value: Tensor) -> KVCache:
        """The cache that holds this one's first ``length`` entries and then key and value, (B, heads, 1, head width)."""
        if length != self._filled or length == self._keys.shape[2]:
            spare = key.new_empty(*key.shape[:2], max(16, length), key.shape[3])
            cache = KVCache(
                torch.cat((self._keys[:, :, :length], spare), 2),
                torch.cat((self._values[:, :, :length], spare), 2),
            )
        else:
            cache = self
        cache._keys[:, :, length], cache._values[:, :, length] = key[:, :, 0], value[:, :, 0]
        cache._filled = length + 1
        return cache

    def read(self, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` keys and values."""
        return self._keys[:, :, :length], self._values[:, :, :length]


@dataclass(frozen=True)
class GPTState:
    """All that a GPT carries from one token to the next: it grows by a key and a value per layer with each."""

    position: int  # of the next token
    caches: tuple[KVCache, ...]


class GPTBlock(nn.Module):
    """One transformer block, (B, N, D) -> (B, N, D)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d = config.d_model
        self.n_heads, self.dropout_p = config.n_heads, config.dropout_p
        self.attention_norm = nn.LayerNorm(d)
        self.qkv = Linear(d, 3 * d)
        self.mixed = MixingPoint()
        self.attention_output = Linear(d, d)
        self.mlp_norm = nn.LayerNorm(d)
        self.up = Linear(d, 4 * d)
        self.down = Linear(4 * d, d)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output (B, N, D), and the keys and values (B, heads, N, head width)."""
        query, key, value = self._heads(x)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self._add(x, mixed), key, value

    def step(self, x: Tensor, cache: KVCache, position: int) -> tuple[Tensor, KVCache]:
        """One position x (B, 1, D) after the ``position`` ones in the cache."""
        query, key, value = self._heads(x)
        cache = cache.append(position, key, value)
        return self._add(x, F.scaled_dot_product_attention(query, *cache.read(position + 1))), cache

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = self.qkv(self.attention_norm(x)).chunk(3, -1)
        # Not unflatten: torch.compile cannot follow it where a default device is set (torch 2.13).
        return tuple(part.view(*x.shape[:-1], self.n_heads, -1).transpose(1, 2) for part in parts)

    def _add(self, x: Tensor, mixed: Tensor) -> Tensor:
        p, training = self.dropout_p, self.training
        mixed = self.mixed(mixed.transpose(1, 2).flatten(2))
        x = add_dropout(x, self.attention_output(mixed), p, training)
        h = F.gelu(self.up(self.mlp_norm(x)))
        return add_dropout(x, self.down(h), p, training)


class GPT(LanguageModel):
    """The model of this module. Streams with a key-value cache, whose size and whose cost per token grow with the
    position, up to n_seq."""

    streams = True

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.n_seq = config.vocab_size, config.n_seq
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.n_seq, config.d_model)
        self.blocks = nn.ModuleList(GPTBlock(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights from torch's global generator, as GPT-2: N(0, 0.02), biases 0, and the last layer of each
        residual branch smaller by the square root of the number of branches."""
        branches = 2 * self.config.n_layers
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            if isinstance(module, nn.Linear | nn.Embedding):
                last = name.endswith((".attention_output", ".down"))
                nn.init.normal_(module.weight, std=INITIAL_STD / math.sqrt(branches) if last else INITIAL_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def head(self) -> tuple[Tensor, None]:
        return self.embedding.weight, None

    def hidden(self, input_ids: Tensor) -> Tensor:
        return self._run(input_ids)[0]

    def init_state(self, batch_size: int) -> GPTState:
        heads = self.config.n_heads
        shape = (batch_size, heads, 0, self.config.d_model // heads)
        empty = self.norm.weight.new_empty(shape)
        return GPTState(0, tuple(KVCache(empty, empty) for _ in self.blocks))

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, GPTState]:
        self.check_prompt(input_ids)
        hidden, pairs = self._run(input_ids)
        state = GPTState(input_ids.shape[1], tuple(KVCache(key, value) for key, value in pairs))
        return self.logits(hidden[:, -1]), state

    @torch.no_grad()
    def step(self, token: Tensor, state: GPTState) -> tuple[Tensor, GPTState]:
        self.check_token(token)
        self.check_positions(state.position + 1)
        x = self._embed(token.unsqueeze(1), state.position)
        caches = []
        for block, cache in zip(self.blocks, state.caches, strict=True):
            x, cache = block.step(x, cache, state.position)
            caches.append(cache)
        return self.logits(self.norm(x)[:, 0]), GPTState(state.position + 1, tuple(caches))

    def state_bytes(self, position: int) -> int:
        self.check_positions(position)
        per_token = self.config.n_layers * 2 * self.config.d_model * self.norm.weight.element_size()
        return position * per_token

    def _embed(self, input_ids: Tensor, first_position: int = 0) -> Tensor:
        positions = self.positions.weight[first_position : first_position + input_ids.shape[1]]
        return dropout(self.embedding(input_ids) + positions, self.config.dropout_p, self.training)

    def _run(self, input_ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        x, pairs = self._embed(input_ids), []
        for block in self.blocks:
            x, key, value = block(x)
            pairs.append((key, value))
        return self.norm(x), pairs
