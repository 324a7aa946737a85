"""Parts for notebooks alone: one handle on its study, form cells and controls, live figures, and the download at the end."""

from bklm.files.lazy import lazy

__getattr__, __all__ = lazy(
    __name__,
    {
        "cells": (
            "LiveFigure", "config_from", "download", "finish", "mount_drive", "run", "say", "show_picture", "show_table",
            "where",
        ),
        "controls": ("Controls",),
        "form": ("FORMS", "form_cells"),
        "handle": ("Study", "study"),
        "selftest": ("SelfTest",),
    },
)  # fmt: skip
