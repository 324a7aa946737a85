"""The BK-core: the diagonal of the resolvent of a tridiagonal matrix, with exact gradients, in O(N).

>>> import torch
>>> from bklm.bk_core import resolvent_diagonal
>>> resolvent_diagonal(torch.zeros(3), 1.0, 1.0, 1j)  # doctest: +SKIP
tensor([0.+0.6667j, 0.+0.3333j, 0.+0.6667j])
"""

from bklm.bk_core import reference
from bklm.bk_core.backends import BackendUnavailableError, available_backends
from bklm.bk_core.module import BKCore
from bklm.bk_core.operator import resolvent_diagonal
from bklm.bk_core.pivots import SmallPivotError

__all__ = [
    "BKCore",
    "BackendUnavailableError",
    "SmallPivotError",
    "available_backends",
    "reference",
    "resolvent_diagonal",
]
