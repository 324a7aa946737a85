"""A second way to multiply in int8: through torchao, where it is installed; to be measured beside the package's own.

torchao is the successor of torch.ao. It rounds weights per output and activations per token, as ``with_int8_products`` does;
the head stays in float. It is no dependency: ``pip install torchao``.

It sums through torch's int8 product, which saturates on a processor without VNNI and says nothing: it is refused there.
Measured with torchao 0.18.0 and torch 2.13 on normal numbers, 33 rows of 256 inputs: a relative error of 0.008, and of 0.14
where ONEDNN_MAX_CPU_ISA=AVX2 keeps oneDNN from VNNI (findings/torchao_saturates_without_vnni.sh).
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from typing import Any

from torch import Tensor, nn

from bklm.compression.coded_model import MULTIPLIED, copy_of, like, maps_of, model_of
from bklm.compression.products import multiplies_exactly


def has_torchao() -> bool:
    """Whether torchao is installed."""
    return importlib.util.find_spec("torchao") is not None


class _Called(nn.Module):
    """A linear map that is called and not looked into: its weight is a tensor of torchao's."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def with_torchao_products(model: Any) -> Any:
    """A copy on the CPU whose linear maps, but the head, multiply in int8 through torchao, for inference.

    It is measured and not saved: torchao's tensors are none of a safetensors file. The model is left as it is.

    Raises:
        RuntimeError: torchao is not installed, or torch's int8 product is wrong on this processor. TypeError: a model without
            such maps.
    """
    plain = model_of(model, "with_torchao_products")
    if not has_torchao():
        raise RuntimeError(
            "with_torchao_products: torchao is not installed; pip install torchao, or take with_int8_products."
        )
    if not multiplies_exactly():
        raise RuntimeError(
            "with_torchao_products: torch's int8 product saturates on this processor, which lacks VNNI or is kept from it by "
            "ONEDNN_MAX_CPU_ISA; take with_int8_products, which is right here too."
        )
    made = copy_of(plain).requires_grad_(False)
    head = made.head()[0]
    places = [name for name in maps_of(made) if made.get_submodule(name).weight is not head]
    if not places:
        raise TypeError(
            f"with_torchao_products: this {type(plain).__name__} has no maps of its own with at least {MULTIPLIED} inputs and "
            "outputs; round its weights alone with quantise(model)."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # It says at import which of its GPU libraries do not load.
        logging.getLogger("torchao").setLevel(logging.ERROR)
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        for place in places:
            parent, _, last = place.rpartition(".")
            called = _Called(made.get_submodule(place))
            quantize_(called, Int8DynamicActivationInt8WeightConfig())
            setattr(made.get_submodule(parent), last, called)
    return like(model, made)
