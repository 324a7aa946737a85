from bklm.harness import cli
from bklm.studies.precision import PrecisionConfig

cli.main(PrecisionConfig)
