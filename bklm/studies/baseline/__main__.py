from bklm.harness import cli
from bklm.studies.baseline import BaselineConfig

cli.main(BaselineConfig)
