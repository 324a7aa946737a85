"""A model's weights in a safetensors file: the same whether or not torch.compile wraps it, refused by another model, and by
one of another vocabulary where the file says of which one it is."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model


class OtherModelError(ValueError):
    """A file holds the weights of another model; the message is one sentence that names the first difference."""


def save_weights(model: torch.nn.Module, path: Path, vocabulary: str | None = None) -> None:
    """Write the weights by the names of the plain model, a shared one once; ``vocabulary`` is the hash of theirs."""
    save_model(_Uncompiled(model), str(path), {"vocabulary": vocabulary} if vocabulary else None)


def load_weights(model: torch.nn.Module, path: Path, vocabulary: str | None = None) -> None:
    """Read what ``save_weights`` wrote, into a model that torch.compile may have wrapped.

    Raises:
        OtherModelError: names or shapes differ, or ``vocabulary`` is given and is not the one that the file names: its ids
            would mean other words. The model is then left as it is.
    """
    if vocabulary is not None:
        require_vocabulary(path, vocabulary)
    with safe_open(str(path), "pt") as file:
        held = {plain_name(name): tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    own = _Uncompiled(model).state_dict()
    written = {own[name].data_ptr() for name in held.keys() & own.keys()}
    # Of tensors that share memory the file has one.
    wanted = {n: tuple(t.shape) for n, t in own.items() if n in held or t.data_ptr() not in written}
    for name in sorted(held.keys() | wanted.keys()):
        there, here = (str(shapes[name]) if name in shapes else "nothing" for shapes in (held, wanted))
        if there != here:
            raise OtherModelError(
                f"{path} holds the weights of another model: {name} is {there} there and {here} in this "
                f"{_class_name(model)}; build the model with the vocabulary and sizes of the one that was saved, or take "
                "another folder."
            )
    load_model(_Uncompiled(model), str(path))


def require_vocabulary(path: Path, vocabulary: str, unless_unnamed: bool = False) -> None:
    """Refuse, by an OtherModelError, weights that were trained with another vocabulary than that of this hash, or with one
    that their file does not name (but with ``unless_unnamed``)."""
    with safe_open(str(path), "pt") as file:
        named = (file.metadata() or {}).get("vocabulary")
    if named != vocabulary and not (unless_unnamed and named is None):
        there = f"{named[:12]}..." if named else "none that it names"
        raise OtherModelError(
            f"{path} holds weights of another vocabulary ({there} there, {vocabulary[:12]}... here), whose ids mean other "
            "words; take weights that were trained with this vocabulary, or train them again with it."
        )


def hash_of_tokenizer(path: Path) -> str:
    """The hash of a vocabulary from its tokenizer.json, hex: that which ``save_weights`` is given."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def plain_name(name: str) -> str:
    """The name of a weight without what torch.compile puts into it, of the model or of a part of it."""
    return name.replace("_orig_mod.", "")


class _Uncompiled:
    """A model under its plain names, as far as safetensors' functions ask."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {plain_name(name): value for name, value in self.model.state_dict().items()}

    def load_state_dict(
        self, state: dict[str, torch.Tensor], strict: bool = True
    ) -> tuple[list[str], list[str]]:
        """As the model's own; a file that was written with torch.compile's names is read all the same."""
        own = {plain_name(name): name for name in self.model.state_dict()}
        given = {own.get(plain_name(name), name): value for name, value in state.items()}
        missing, unexpected = self.model.load_state_dict(given, strict=strict)
        return [plain_name(name) for name in missing], list(unexpected)


def _class_name(model: torch.nn.Module) -> str:
    return type(getattr(model, "_orig_mod", model)).__name__
