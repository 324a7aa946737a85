"""The configuration of a ResNet-BK.

How the defaults of the mixer "solve" were chosen: validation perplexity on a WikiText-2 sample (lower case, 1,000 words,
windows of 64, batch 16, 728,904 parameters: 3 layers of width 128, 8 heads, dense; AdamW without decay, clip 1, cosine over 4
epochs after 5% warm-up, seed 0), after epoch 1 at a rate of 1e-3, 1 at 3e-3 and 4 at 3e-3. Another seed moves the first
column by 0.7. What a row does not name is as in the first one; the last row is a prototype of the same operator. The rows
that the settings below can have are trained again by ``benchmarks/reading_search.py``.

    convolution 0, least_eta 0.02, energy_span 0, hopping 0.95   34.42   34.15   27.90
    convolution 4 (taken)                                        34.30   33.76   27.44
    convolution 4, least_eta 0.1                                   -     33.56   27.18
    convolution 4, energy_span 1                                   -     34.68   27.95
    convolution 4, energy_span 1, least_eta 0.1                    -     33.42     -
    least_eta 0.1                                                34.02     -       -
    energy_span 0.7                                              34.70     -       -
    energy_span 1.6                                              35.12     -       -
    hopping 0.8                                                  34.36     -       -
    hopping 0.99                                                 34.51     -       -
    4 heads                                                      34.79     -       -
    16 heads                                                     35.09     -       -
    output's first weights N(0, 0.02), not a tenth of it         37.41     -       -
    weight decay 0.01, clip 0.5                                  34.53     -       -
    the prototype                                                36.39   34.98   27.21

Later, with convolution 4 and least_eta 0.1, after epoch 4 at 3e-3, seeds 0 and 1; edge_energy -1.8 and potential_scale 0.1
are what ``reading_settings`` takes, and a row changes what it names. Rows of 26.4 to 26.8 are within noise of each other.

    edge_energy 0, potential_scale 1                             27.22   27.09
    edge_energy 0                                                26.98     -
    edge_energy -1.8 (reading_settings)                          26.63   26.67
    least_eta 0.05                                               26.46     -
    edge_energy -1.5                                             26.39   26.76
    edge_energy -1.9                                             26.39     -
    edge_energy -1.5, potential_scale 1                          26.58     -
    edge_energy -1.5, least_eta 0.2                              26.46     -
    edge_energy -1.5, least_eta 0.05                             26.78     -
    edge_energy -1.5, least_eta 0.02                             27.05     -
    edge_energy -1.5, hopping 0.9                                26.82     -
    edge_energy -1.5, 16 heads                                   26.73     -
    hopping 0.98                                                 26.41     -
    convolution 2                                                26.41     -
    dropout before the head as well                              26.67     -
    a rate of 5e-3                                               26.66     -
    all heads at -1.8                                            26.47     -
    heads at -1.8, 0, 1.8, 0                                     26.41     -
    heads at -1.8, -1.2, -0.6, 0                                 26.43     -
    a gate on what each head writes                              26.42     -
    a gate on what each channel writes, 7% more parameters       26.32     -

A cosine over one epoch alone ends at 38.12 (1e-3) and 36.76 (3e-3): too few steps, which is no matter of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bklm.models.checks import check_choice, check_dropout, check_int, check_real

MIXERS = ("diagonal", "solve")
REAL = (
    "grad_blend", "eta", "balance", "least_eta", "energy_span", "edge_energy", "potential_scale", "hopping",
)  # fmt: skip


@dataclass(frozen=True)
class ResNetBKConfig:
    """Size and kind of a ResNet-BK; the defaults are the original's size with the corrections.

    Raises:
        ValueError, TypeError: a field outside what is allowed, named with its value.
    """

    vocab_size: int
    d_model: int = 64
    n_layers: int = 4
    # Positions with a learned embedding; None: no position embedding, any length. The mixer "solve" has none: always None.
    n_seq: int | None = 128
    num_experts: int = 4  # with the mixer "solve", 1 is a dense layer in place of the mixture
    top_k: int = 1
    dropout_p: float = 0.1
    causal: bool = True  # False: every position sees the future, so no language model; it cannot stream
    gradient: str = "exact"  # of the potential: "exact", "local" or "original", see bklm.bk_core
    # Share of hypothesis-7 in that gradient, 0 to 1; with "solve" in the derivative of the diagonal L.
    grad_blend: float = 0.0
    router_gradient: str = "exact"  # "exact", "selected" or "none", see bklm.moe
    clamps: bool = False  # the original's +-3 on the potential and +-10 on the features
    # Imaginary part of z; memory reaches at most about 1 / eta positions back, see docs/theory.md. "solve" learns it, and
    # its heads start spread from eta down to least_eta.
    eta: float = 1.0
    n_heads: int = 1  # each with a potential and a Hamiltonian of its own
    balance: float = 0.0  # weight of the experts' load-balancing loss, see bklm.moe
    mixer: str = "diagonal"  # "diagonal": the published model; "solve": the resolvent applied to values
    tied: bool | None = None  # the head is the embedding; None: with "solve" only
    # Of the mixer "solve" alone:
    least_eta: float = 0.02
    # First energies, evenly from -energy_span to energy_span; the band is -2 to 2. Learned from there.
    energy_span: float = 0.0
    # Added to every second of them, from the first head's on. At 0 what a head read turns by a quarter with each position; at
    # -2 hopping, the band's lower edge, it is summed.
    edge_energy: float = 0.0
    # Of the potentials' first weights: how far the words move them from those energies.
    potential_scale: float = 1.0
    hopping: float = 0.95  # first value of every bond, between 0 and 1
    convolution: int = 4  # positions of a short causal convolution per channel before the mixer; 0: none
    dense_width: int | None = None  # units of the dense layer; None: 4 d_model

    def __post_init__(self) -> None:
        check_int("vocab_size", self.vocab_size, 3)
        for name in ("d_model", "n_layers", "num_experts", "n_heads"):
            check_int(name, getattr(self, name), 1)
        if self.n_seq is not None:
            check_int("n_seq", self.n_seq, 1, " or None for any length")
        check_int("top_k", self.top_k, 1)
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k: got {self.top_k}; it can be at most num_experts = {self.num_experts}.")
        check_dropout(self.dropout_p)
        for name in REAL:
            check_real(name, getattr(self, name))
        if not 0.0 <= self.grad_blend <= 1.0:
            raise ValueError(f"grad_blend: got {self.grad_blend}; it must lie between 0 and 1.")
        if not 0.0 < self.eta < float("inf"):
            raise ValueError(f"eta: got {self.eta}; the resolvent needs a positive, finite imaginary shift.")
        if not 0.0 <= self.balance < float("inf"):
            raise ValueError(f"balance: got {self.balance}; it must be 0 or a positive, finite number.")
        if self.balance > 0 and self.router_gradient == "none":
            raise ValueError(
                f"balance: got {self.balance}, but router_gradient='none' leaves no router to balance."
            )
        if self.balance > 0 and self.num_experts == 1:
            raise ValueError(
                f"balance: got {self.balance}, but num_experts=1 has no router to balance; give 0, or more experts."
            )
        check_choice("gradient", self.gradient, ("exact", "local", "original"))
        check_choice("router_gradient", self.router_gradient, ("exact", "selected", "none"))
        check_choice("causal", self.causal, (True, False))
        check_choice("clamps", self.clamps, (True, False))
        check_choice("mixer", self.mixer, MIXERS)
        check_choice("tied", self.tied, (None, True, False))
        if self.tied is None:
            object.__setattr__(self, "tied", self.mixer == "solve")
        if self.mixer == "solve":
            self._check_solve()

    def _check_solve(self) -> None:
        object.__setattr__(self, "n_seq", None)
        if self.d_model % self.n_heads:
            raise ValueError(
                f"d_model: got {self.d_model}; the mixer 'solve' shares it among n_heads = {self.n_heads}; take a multiple."
            )
        unfit = {"gradient": "exact", "clamps": False}
        if not self.causal:
            unfit["grad_blend"] = 0.0
        for name, only in unfit.items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}; the mixer 'solve' with causal={self.causal} has {name}={only!r} "
                    "only: take mixer='diagonal' for others."
                )
        if not 0.0 < self.least_eta <= self.eta:
            raise ValueError(
                f"least_eta: got {self.least_eta}; it must be positive and at most eta = {self.eta}."
            )
        if not 0.0 <= self.energy_span < float("inf"):
            raise ValueError(f"energy_span: got {self.energy_span}; it must be 0 or a positive, finite number.")
        if not abs(self.edge_energy) < float("inf"):
            raise ValueError(f"edge_energy: got {self.edge_energy}; it must be a finite number.")
        if not 0.0 <= self.potential_scale < float("inf"):
            raise ValueError(
                f"potential_scale: got {self.potential_scale}; it must be 0 or a positive, finite number."
            )
        if not 0.0 < self.hopping < 1.0:
            raise ValueError(f"hopping: got {self.hopping}; a bond lies between 0 and 1, ends excluded.")
        check_int("convolution", self.convolution, 0)
        if self.dense_width is not None:
            check_int("dense_width", self.dense_width, 1, " or None for 4 d_model")

    @classmethod
    def original(cls, vocab_size: int, **changes: Any) -> ResNetBKConfig:
        """The published model: it sees the future, its gradient lacks the conjugate, its router never learns."""
        settings = {
            "causal": False,
            "gradient": "original",
            "router_gradient": "none",
            "clamps": True,
            **changes,
        }
        return cls(vocab_size, **settings)


def reading_settings(window: int) -> dict[str, Any]:
    """Fields of a ResNetBKConfig that reads windows of so many tokens, as the search above found them at 64.

    In the middle of the band the smallest eta would be a memory, to 90%, of about 4.6 / least_eta positions, three quarters of
    a window. Every second head begins just inside the band's lower edge, where it sums what it read and forgets three times as
    soon; the first, of the smallest eta, is one of these, and of eight heads the second remembers longest, half a window.
    """
    return {
        "mixer": "solve", "num_experts": 1, "least_eta": min(1.0, 6.4 / window), "edge_energy": -1.8, "potential_scale": 0.1,
    }  # fmt: skip
