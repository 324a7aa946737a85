"""python -m bklm.notebook: write the form cells from the configs."""

from bklm.notebook.form import write_forms

write_forms()
