"""One process at a time in a folder, also where the folder is a mounted Drive."""

from __future__ import annotations

import errno
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

# What flock says on mounts that do not offer it. (filelock itself deals with a third answer, ENOSYS.)
_NO_FLOCK = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)


def lock(path: Path, refusal: str) -> BaseFileLock:
    """Lock ``path`` for this process, or refuse at once; the caller releases what is returned.

    Where the mount has no flock, a file ``<path>.soft`` that only one process can create stands in for it. A killed
    process leaves that file behind; filelock removes it where it can see that its maker is dead, which needs the same
    machine. For the other case the refusal says which file to delete.

    Raises:
        RuntimeError: another process has it; ``refusal`` is the sentence, without its full stop.
        OSError: the folder cannot be written.
    """
    held: BaseFileLock = FileLock(path)
    try:
        try:
            held.acquire(timeout=0)
        except OSError as error:
            if isinstance(error, Timeout) or error.errno not in _NO_FLOCK:
                raise
            held = SoftFileLock(path.with_name(f"{path.name}.soft"))
            held.acquire(timeout=0)
    except Timeout:
        left = f" (if none is running, a killed one left {held.lock_file}: delete that file)"
        raise RuntimeError(f"{refusal}{left if isinstance(held, SoftFileLock) else ''}.") from None
    return held
