"""python -m bklm.notebook: write the form cells from the configs."""

import argparse

from bklm.notebook.form import write_forms

argparse.ArgumentParser(prog="python -m bklm.notebook", description=__doc__).parse_args()
write_forms()
