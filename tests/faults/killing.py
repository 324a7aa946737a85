"""A child process that is killed with signal 9 just before the n-th line that it executes in given source files."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, ModuleType
from typing import Any


def killed_at_line(n: int, action: Callable[[], Any], modules: Iterable[ModuleType]) -> bool:
    """Run ``action`` in a forked child; True when it was killed before the n-th line in ``modules``, False at its end."""
    files = {module.__file__ for module in modules}
    child = os.fork()
    if child == 0:
        lines = 0

        def trace(frame: FrameType, event: str, value: Any) -> Any:
            nonlocal lines
            if frame.f_code.co_filename not in files:
                return None
            if event == "line":
                lines += 1
                if lines == n:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        code = 1
        try:
            sys.settrace(trace)
            action()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0, "the child failed by itself"
    return False


def every_kill(action: Callable[[], Any], *modules: ModuleType, step: int = 1) -> Iterator[int]:
    """Yield after each kill: before the first line, the (1 + step)-th ... until the action gets to its end."""
    n = 1
    while killed_at_line(n, action, modules):
        yield n
        n += step
    assert n > 1, "nothing in these modules was executed"
