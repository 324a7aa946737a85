"""Training under compression: weights that are rounded, or partly zero, whenever the model runs, while it goes on learning.

Both are a model around a model. Its weights pass through a change before each forward; the gradient goes to the weights as
they were (straight-through, Bengio et al. 2013). ``baked`` gives the plain model with the change made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bklm.compression.coded_model import copy_of, forget_codes, matrices, put
from bklm.compression.coding import check_rounding, integers
from bklm.compression.pruning import largest_kept, masks_of, scoped
from bklm.compression.weights import quantise
from bklm.models import LanguageModel, TokenLosses
from bklm.models.checks import is_without_numbers
from bklm.moe.ops import in_backward

STEPS_BETWEEN_SCALES = 4  # of training: fewer would cost more than a step of a small model
MASKS = 50  # a schedule, at least, unless it has fewer steps: with few of them the law is a jump


class _Rounded(torch.autograd.Function):
    """round(w / s) s between -levels and levels; the gradient passes where nothing was clipped."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, scale: Tensor, levels: int) -> Tensor:
        return (weight / scale).round().clamp(-levels, levels) * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        weight, scale, levels = inputs
        ctx.save_for_backward((weight / scale).round().abs() <= levels)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.saved_tensors[0], None, None


def rounded(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Weights at the nearest of 2^bits - 1 steps of a scale (broadcastable, positive), differentiable straight through."""
    return _Rounded.apply(weight, scale, 2 ** (bits - 1) - 1)


class _Caller(nn.Module):
    """A model as functional_call wants it: what is called is a forward."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: str, *given: Any, **options: Any) -> Any:
        return getattr(self.model, method)(*given, **options)


class Changed(LanguageModel):
    """``model`` with its weights passed through ``change`` whenever it runs; a subclass says how."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.caller = _Caller(model)
        forget_codes(model)
        self.config, self.vocab_size, self.n_seq = model.config, model.vocab_size, model.n_seq
        self.streams, self.sees_future = model.streams, model.sees_future
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        # In evaluation nothing changes between batches, unless weights are loaded or moved.
        self._kept: dict[str, Tensor] | None = None

    @property
    def model(self) -> LanguageModel:
        return self.caller.model

    @property
    def loss_is_likelihood(self) -> bool:
        return self.model.loss_is_likelihood

    def change(self) -> dict[str, Tensor]:
        """The weights that are another in use, by their name in the model."""
        raise NotImplementedError

    def plain(self) -> LanguageModel:
        """A copy of the model with the change made, on the CPU."""
        changed = {name: weight.cpu() for name, weight in self.change().items()}
        made = copy_of(self.model)
        for name, p in made.named_parameters():
            if name in changed:
                p.copy_(changed[name])
        put(made, {})
        return made

    def train(self, mode: bool = True) -> Changed:
        self._kept = None
        return super().train(mode)

    def _forget(self) -> None:
        """What was found of the weights as they were, or where they were."""
        self._kept = None

    def _apply(self, *given: Any, **options: Any) -> Changed:
        self._forget()
        return super()._apply(*given, **options)

    def _load_from_state_dict(self, *given: Any, **options: Any) -> None:
        # What ``load_state_dict`` calls, of this module or of one around it.
        self._forget()
        super()._load_from_state_dict(*given, **options)

    def loss(self, input_ids: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        self._require_numbers()
        # What activation checkpointing computes again is no other step.
        if self.training and torch.is_grad_enabled() and not in_backward():
            self.steps += 1
        return self._call("loss", input_ids, targets, reduction=reduction)

    def hidden(self, input_ids: Tensor) -> Tensor:
        return self._call("hidden", input_ids)

    def head(self) -> tuple[Tensor, Tensor | None]:
        return self._call("head")

    @torch.no_grad()
    def token_losses(self, input_ids: Tensor, targets: Tensor) -> TokenLosses:
        return self._call("token_losses", input_ids, targets)

    def init_state(self, batch_size: int) -> Any:
        return self._call("init_state", batch_size)

    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Any]:
        return self._call("prefill", input_ids)

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self._call("step", token, state)

    def state_bytes(self, position: int) -> int:
        return self._call("state_bytes", position)

    def num_parameters(self, trainable_only: bool = False) -> int:
        return self.model.num_parameters(trainable_only)

    def parameters_apart(self) -> Sequence[nn.Parameter]:
        return self.model.parameters_apart()

    def reset_expert_counts(self, counts: Any = ()) -> None:
        self.model.reset_expert_counts(counts)

    def expert_counts(self) -> list[list[int]]:
        return self.model.expert_counts()

    def _require_numbers(self) -> None:
        if is_without_numbers(self.steps):
            raise RuntimeError(
                f"{type(self).__name__}: this model looks at its weights to change them, and torch.func, torch.export, a "
                "tracer or tensors without values give no numbers; take the plain model, baked(model)."
            )

    def _call(self, method: str, *given: Any, **options: Any) -> Any:
        self._require_numbers()
        if self.training:
            changed = self.change()
        else:
            with torch.no_grad():
                self._kept = changed = self._kept or self.change()
        weights = {f"model.{name}": weight for name, weight in changed.items()}
        return torch.func.functional_call(self.caller, weights, (method, *given), options)


class RoundedModel(Changed):
    """Its matrices in ``bits`` bits, a scale a row or for every ``group`` inputs; scales follow every fourth step.

    Args:
        model: learns in place; its matrices with at least 8 inputs and outputs are rounded.
        bits: of a weight, 2 to 8.
        group: inputs that share a scale; None: a scale a row.

    Raises:
        ValueError: bits or group outside what is allowed.
    """

    def __init__(self, model: LanguageModel, bits: int, group: int | None = None) -> None:
        check_rounding(bits, group)
        super().__init__(model)
        self.bits, self.group = bits, group
        self._scales: dict[str, Tensor] = {}

    def _forget(self) -> None:
        super()._forget()
        self._scales = {}

    def change(self) -> dict[str, Tensor]:
        weights = matrices(self.model)
        if not self._scales or not self.training or int(self.steps) % STEPS_BETWEEN_SCALES == 0:
            self._scales = {n: _scale_of_each(w, self.bits, self.group) for n, w in weights.items()}
        return {n: rounded(w, self._scales[n], self.bits) for n, w in weights.items()}

    def plain(self) -> LanguageModel:
        return quantise(self.model, self.bits, self.group, rest="float32")


class PrunedModel(Changed):
    """Part of its weights zero: more and more of them, on the way to ``sparsity`` after ``steps`` steps (Zhu and Gupta 2017),

        s_t = s_f + (s_i - s_f) (1 - t / T)^3,   s_i = 0

    by magnitude; or, with a seed, on the same schedule at random; or, where masks are given, these from the start. Masks are
    found anew MASKS times on the way, after every step of a schedule of fewer. What was set to zero stays zero.

    Args:
        model: learns in place.
        sparsity: of the matrices in scope, 0 to below 1; masks that are given say themselves how many.
        steps: of training, after which no more weights become zero.
        scope: "body": all but embeddings and head; "outer": these; "all".
        masks: which weights stay, bool of each matrix's shape, by its name in the model: of all in scope and of no other.
        seed: of zeros at random.

    Raises:
        ValueError: sparsity, steps or scope outside what is allowed; masks of other names, shapes or dtypes; both masks and a
            seed.
    """

    def __init__(
        self,
        model: LanguageModel,
        sparsity: float,
        steps: int,
        *,
        scope: str = "body",
        masks: Mapping[str, Tensor] | None = None,
        seed: int | None = None,
    ) -> None:
        if masks is not None and seed is not None:
            raise ValueError(f"seed: got {seed} and masks, which leave nothing to draw; give one of them.")
        if steps < 0:
            raise ValueError(f"steps: got {steps}; the schedule ends after 0 or more steps of training.")
        masks_of(model, sparsity, scope=scope)
        weights = scoped(model, scope)
        if masks is not None:
            _check_masks(masks, weights)
        super().__init__(model)
        self.sparsity, self.whole, self.gradual = sparsity, steps, masks is None
        self.steps_between = max(1, steps // MASKS)
        self.scope, self.seed = scope, seed
        self._names, self._has_ended = list(weights), False
        for i, (name, weight) in enumerate(weights.items()):
            whole = torch.ones_like(weight, dtype=torch.bool)
            self.register_buffer(f"mask_{i}", whole if masks is None else whole & masks[name].to(weight.device))

    def _forget(self) -> None:
        super()._forget()
        self._has_ended = False

    def sparsity_at(self, step: int) -> float:
        """s_t."""
        done = 1.0 if step >= self.whole else step / self.whole
        return self.sparsity * (1 - (1 - done) ** 3)

    def change(self) -> dict[str, Tensor]:
        named = dict(self.model.named_parameters())
        step = int(self.steps)
        ends = step >= self.whole
        due = not self._has_ended if ends else step % self.steps_between == 0 or not self.training
        masks = [self._mask(i) for i in range(len(self._names))]
        if self.gradual and due:
            found = list(self._masks_at(self.sparsity_at(step), named).values())
            # Scoring looks ahead and keeps nothing: whoever scores more often trains the same model.
            if self.training:
                self._has_ended = ends
                for mask, new in zip(masks, found, strict=True):
                    mask.copy_(new)
            else:
                masks = [new.to(mask.device) for mask, new in zip(masks, found, strict=True)]
        return {name: named[name] * mask for name, mask in zip(self._names, masks, strict=True)}

    def _masks_at(self, sparsity: float, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.seed is not None:
            # Of one seed's scores the smallest go first, so fewer zeros are among more.
            return masks_of(self.model, sparsity, "random", scope=self.scope, seed=self.seed)
        sizes = {n: named[n].detach().abs() * self._mask(i) for i, n in enumerate(self._names)}
        return largest_kept(sizes, sparsity)

    def _mask(self, i: int) -> Tensor:
        return getattr(self, f"mask_{i}")


def _check_masks(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    if other := sorted(masks.keys() ^ weights.keys()):
        what = "no mask of" if other[0] in weights else "one of"
        raise ValueError(
            f"masks: got {what} {other[0]!r}; give one of each matrix in scope and of no other, as masks_of does."
        )
    for name, mask in masks.items():
        if mask.dtype != torch.bool or mask.shape != weights[name].shape:
            raise ValueError(
                f"masks: that of {name!r} is {mask.dtype} of shape {tuple(mask.shape)}; it must be torch.bool of the weight's "
                f"shape, {tuple(weights[name].shape)}."
            )


@torch.no_grad()
def baked(model: LanguageModel) -> LanguageModel:
    """The plain model of a ``Changed`` one, with the change made, on the CPU; any other as it is."""
    return model.eval().plain() if isinstance(model, Changed) else model


@torch.no_grad()
def _scale_of_each(weight: Tensor, bits: int, group: int | None) -> Tensor:
    """The scale of every weight, of the weight's shape, as ``integers`` would choose it."""
    if not bool(weight.isfinite().all()):
        # A model that diverges in training shows it by its loss, and the loop says so.
        return torch.full_like(weight, torch.nan)
    coded = integers(weight, bits, group)
    width = coded.values.shape[1]
    each = coded.scales.repeat_interleave(coded.group, 1)[:, :width]
    return each.clamp_min(torch.finfo(torch.float32).tiny).reshape(weight.shape).to(weight.device)
