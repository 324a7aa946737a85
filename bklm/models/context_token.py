"""ContextTokenLM: a stream of contexts that runs along the text, and token layers that read it, without attention.

With x_t = LayerNorm(embedding of token t), both streams in ``n_layers`` residual layers:

    c_{t,0} = c_{t-1,L},   c_{t,l} = LN(c_{t,l-1} + ReLU(W_l [c_{t,l-1}; x_t] + b_l))      context block
    h_{t,0} = x_t,         h_{t,l} = LN(h_{t,l-1} + ReLU(U_l [c_{t,l}; h_{t,l-1}] + d_l))  token block
    logits_t = E h_{t,L}, with E the embedding itself where ``tied``

With ``token_to="first"`` x_t enters context layer 1 alone: the weights on it of the layers above count for nothing.
Token layer l reads the output of context layer l. The final context c_{t,L} is the whole state that token t + 1 needs.
The two blocks are trained one after the other: the context block without labels, to a fixed point
(``bklm.training.two_phase.phase1``), then the token block on contexts that no longer change
(``bklm.training.two_phase.phase2``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bklm.models.base import LanguageModel
from bklm.models.checks import check_choice, check_int
from bklm.models.mixing import MixingPoint
from bklm.moe import products


@dataclass(frozen=True)
class ContextTokenConfig:
    """Size of a ContextTokenLM; the defaults are the original's, with GPT-2's vocabulary and embedding width.

    Both streams are ``context_dim`` wide. Where ``embed_dim`` differs, the token stream starts from a learned
    projection of x_t, and the head cannot be tied.

    Raises:
        ValueError, TypeError: a field outside what is allowed, named with its value.
    """

    vocab_size: int = 50_257
    embed_dim: int = 768
    context_dim: int = 768
    n_layers: int = 6
    tied: bool = True
    token_to: str = "every"  # or "first": which layers of the context block read the token

    def __post_init__(self) -> None:
        check_int("vocab_size", self.vocab_size, 2)
        for name in ("embed_dim", "context_dim", "n_layers"):
            check_int(name, getattr(self, name), 1)
        check_choice("tied", self.tied, (True, False))
        check_choice("token_to", self.token_to, ("every", "first"))
        if self.tied and self.embed_dim != self.context_dim:
            raise ValueError(
                f"tied: a tied head reads token states of width context_dim = {self.context_dim} with an embedding of "
                f"width embed_dim = {self.embed_dim}; make the two equal, or give tied=False."
            )


@dataclass(frozen=True)
class ContextTokenState:
    """All that a ContextTokenLM carries from one token to the next."""

    position: int
    context: Tensor  # (B, context_dim), the final context of the last token; zeros before the first


class _Layers(nn.Module):
    """``n_layers`` of a linear map of [context; other] to ``out`` and a LayerNorm: the weights of either block."""

    def __init__(self, context_dim: int, other_dim: int, out: int, n_layers: int) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.linears = nn.ModuleList(products.Linear(context_dim + other_dim, out) for _ in range(n_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(out) for _ in range(n_layers))

    def __len__(self) -> int:
        return len(self.norms)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The original's: weights N(0, 0.1), biases N(0, 0.01). A step is then a contraction on average, see
        ``bklm.training.two_phase.phase1``."""
        for linear, norm in zip(self.linears, self.norms, strict=True):
            nn.init.normal_(linear.weight, std=0.1)
            nn.init.normal_(linear.bias, std=0.01)
            norm.reset_parameters()


class ContextBlock(_Layers):
    """The context stream: ``forward`` where every token's left neighbour is known, ``sweep`` where it is not."""

    def __init__(self, config: ContextTokenConfig) -> None:
        super().__init__(config.context_dim, config.embed_dim, config.context_dim, config.n_layers)
        self.reading = 1 if config.token_to == "first" else config.n_layers
        # Of other positions a token hears through its left neighbour's final context alone.
        self.mixing = MixingPoint()
        # Kept with the weights: phase 2 refuses contexts of a block that no phase 1 has trained.
        self.register_buffer("fixed_point_iterations", torch.zeros((), dtype=torch.int64))

    def forward(self, previous: Tensor, x: Tensor) -> Tensor:
        """Contexts of every layer (..., L, D_c) from left neighbours' final contexts (..., D_c) and x (..., D_e)."""
        return torch.stack(self.from_inputs(previous, self.given(x)), -2)

    def final(self, previous: Tensor, x: Tensor) -> Tensor:
        """The last layer of ``forward`` alone, (..., D_c)."""
        return self.from_inputs(previous, self.given(x))[-1]

    def sweep(self, x: Tensor, start: Tensor) -> Tensor:
        """Contexts of every layer (B, N, L, D_c), token after token, from x (B, N, D_e) and the context before, (B, D_c)."""
        steps = [torch.stack(layers, -2) for layers in self.steps(x, start)]
        return torch.stack(steps, 1) if steps else x.new_empty(*x.shape[:2], len(self), self.context_dim)

    def steps(self, x: Tensor, start: Tensor) -> Iterator[list[Tensor]]:
        """``sweep``, one token at a time: the contexts of its layers, L tensors (B, D_c)."""
        inputs, context = self.given(x), start
        for t in range(x.shape[1]):
            heard = context if self.mixing.idle else self.mixing(context[:, None])[:, 0]
            layers = self.from_inputs(heard, inputs[:, t])
            context = layers[-1]
            yield layers

    def given(self, x: Tensor) -> Tensor:
        """What x (..., D_e) adds in all layers, (..., L D_c): ``from_inputs`` takes it."""
        return products.linear(x, *self.input_weights())

    def own(self, layer: int, context: Tensor) -> Tensor:
        """What a context (..., D_c) adds in a layer, (..., D_c)."""
        return products.linear(context, self.linears[layer].weight[:, : self.context_dim])

    def input_weights(self) -> tuple[Tensor, Tensor]:
        """Weight (L D_c, D_e) and bias of the one product of ``given``."""
        weights = [linear.weight[:, self.context_dim :] for linear in self.linears]
        weight = torch.cat([w if n < self.reading else torch.zeros_like(w) for n, w in enumerate(weights)])
        return weight, torch.cat([linear.bias for linear in self.linears])

    def from_inputs(self, context: Tensor, inputs: Tensor) -> list[Tensor]:
        """Contexts of the layers, L tensors (..., D_c), from the left neighbour's (..., D_c) and inputs (..., L D_c)."""
        outputs = []
        for layer, (norm, given) in enumerate(zip(self.norms, inputs.chunk(len(self), -1), strict=True)):
            context = norm(context + F.relu(self.own(layer, context) + given))
            outputs.append(context)
        return outputs


class TokenBlock(_Layers):
    """The token stream, all positions at once: layer l reads the context of layer l."""

    def __init__(self, config: ContextTokenConfig) -> None:
        super().__init__(config.context_dim, config.context_dim, config.context_dim, config.n_layers)
        same = config.embed_dim == config.context_dim
        self.project = nn.Identity() if same else products.Linear(config.embed_dim, config.context_dim)

    def forward(self, x: Tensor, contexts: Tensor) -> Tensor:
        """Token states (..., D_c) from x (..., D_e) and the contexts of every layer (..., L, D_c)."""
        h = self.project(x)
        for layer, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            h = norm(h + F.relu(linear(torch.cat([contexts[..., layer, :], h], -1))))
        return h


class ContextTokenLM(LanguageModel):
    """Embedding, LayerNorm, context block, token block, linear head without bias. Streams with one context per row.

    ``forward`` and ``loss`` start every row from the zero context and are differentiable throughout, token after token;
    training in two phases avoids that walk, see the module's text.
    """

    streams = True

    def __init__(self, config: ContextTokenConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.norm = nn.LayerNorm(config.embed_dim)
        self.context_block = ContextBlock(config)
        self.token_block = TokenBlock(config)
        self.output = None if config.tied else nn.Linear(config.context_dim, config.vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights from torch's global generator; embedding and untied head N(0, 0.02), as in GPT-2."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.norm.reset_parameters()
        self.context_block.reset_parameters()
        self.context_block.fixed_point_iterations.zero_()
        self.token_block.reset_parameters()
        if isinstance(self.token_block.project, nn.Linear):
            self.token_block.project.reset_parameters()
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=0.02)

    def num_parameters(self, trainable_only: bool = False) -> int:
        """As every model's, without the weights on a token that ``token_to`` lets count for nothing."""
        silent = self.context_block.linears[self.context_block.reading :]
        counted = sum(self.config.context_dim * self.config.embed_dim for one in silent
                      if one.weight.requires_grad or not trainable_only)  # fmt: skip
        return super().num_parameters(trainable_only) - counted

    def freeze_embedding(self) -> None:
        """Train neither the embedding (a tied head with it) nor the LayerNorm after it, so that every x_t stays as it is."""
        self.embedding.requires_grad_(False)
        self.norm.requires_grad_(False)

    def freeze_context(self) -> None:
        """Train the context block no more: phase 2."""
        self.context_block.requires_grad_(False)

    def head(self) -> tuple[Tensor, None]:
        return (self.embedding if self.output is None else self.output).weight, None

    def embed(self, input_ids: Tensor) -> Tensor:
        """x (..., D_e), what both blocks read."""
        return self.norm(self.embedding(input_ids))

    def contexts(self, input_ids: Tensor, start: Tensor | None = None) -> Tensor:
        """Contexts of every layer at every token, (B, N, L, D_c), token after token from ``start`` (B, D_c) or zeros."""
        x = self.embed(input_ids)
        return self.context_block.sweep(x, self._zeros(len(x)) if start is None else start)

    def hidden(self, input_ids: Tensor) -> Tensor:
        return self.token_block(self.embed(input_ids), self.contexts(input_ids))

    def init_state(self, batch_size: int) -> ContextTokenState:
        return ContextTokenState(0, self._zeros(batch_size))

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, ContextTokenState]:
        self.check_prompt(input_ids)
        return self._continue(input_ids, self.init_state(len(input_ids)))

    @torch.no_grad()
    def step(self, token: Tensor, state: ContextTokenState) -> tuple[Tensor, ContextTokenState]:
        self.check_token(token)
        return self._continue(token.unsqueeze(1), state)

    def state_bytes(self, position: int) -> int:
        return self.config.context_dim * self.norm.weight.element_size()

    def _continue(self, ids: Tensor, state: ContextTokenState) -> tuple[Tensor, ContextTokenState]:
        x = self.embed(ids)
        for layers in self.context_block.steps(x, state.context):
            last = layers  # one token's contexts are kept, not the text's
        h = self.token_block(x[:, -1], torch.stack(last, -2))
        return self.logits(h), ContextTokenState(state.position + ids.shape[1], last[-1])

    def _zeros(self, batch_size: int) -> Tensor:
        return self.norm.weight.new_zeros(batch_size, self.config.context_dim)
