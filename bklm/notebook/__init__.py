"""What only a notebook needs: where it runs, its form cell and controls, live figures, and the download at the end."""

from bklm.notebook.cells import (
    LiveFigure,
    download,
    finish,
    mount_drive,
    run,
    say,
    show_picture,
    show_table,
    where,
)
from bklm.notebook.controls import Controls
from bklm.notebook.form import FORMS, config_from, form_cell

__all__ = [
    "FORMS",
    "Controls",
    "LiveFigure",
    "config_from",
    "download",
    "finish",
    "form_cell",
    "mount_drive",
    "run",
    "say",
    "show_picture",
    "show_table",
    "where",
]
