"""A worker of a study, started by ``bklm.harness.workers``: ``python -m bklm.harness.helper``.

It talks over its standard input and output, one line of JSON a message; the first line it reads names the study's config.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading

import torch

from bklm.harness import workers


def main() -> None:
    """Run the study; what it trains is what the study's process gives it."""
    given = json.loads(sys.stdin.readline())
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # What a library prints must not reach the messages.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    torch.set_num_threads(given["threads"])
    workers.link = workers.Link(messages)
    config = getattr(importlib.import_module(given["module"]), given["class"])(**given["config"])
    run = importlib.import_module(f"{config.package()}.run")
    getattr(run, f"run_{config.study}")(config)
    # The study ends its helpers; one that ended by itself would look like one that died.
    threading.Event().wait()


if __name__ == "__main__":
    main()
