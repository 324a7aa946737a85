"""The BK-core: the resolvent of a tridiagonal matrix, its diagonal or its product with columns, differentiable, in O(N).

>>> import torch
>>> from bklm.bk_core import resolvent_diagonal
>>> resolvent_diagonal(torch.zeros(3), 1.0, 1.0, 1j)  # doctest: +SKIP
tensor([0.+0.6667j, 0.+0.3333j, 0.+0.6667j])

``resolvent_solve`` applies the resolvent to D columns, bidirectional or causal; ``solve_step`` goes on with the causal form
one position at a time, from a :class:`SolveState`.

>>> from bklm.bk_core import resolvent_solve
>>> resolvent_solve(torch.eye(3), torch.zeros(3), 1.0, 1.0, 1j).diagonal()  # doctest: +SKIP
tensor([0.+0.6667j, 0.+0.3333j, 0.+0.6667j])
"""

from bklm.bk_core import reference
from bklm.bk_core.backends import BackendUnavailableError, available_backends
from bklm.bk_core.module import BKCore
from bklm.bk_core.operator import resolvent_diagonal
from bklm.bk_core.pivots import SmallPivotError
from bklm.bk_core.solve import SolveState, resolvent_solve, solve_step

__all__ = [
    "BKCore",
    "BackendUnavailableError",
    "SmallPivotError",
    "SolveState",
    "available_backends",
    "reference",
    "resolvent_diagonal",
    "resolvent_solve",
    "solve_step",
]
