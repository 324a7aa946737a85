from bklm.harness import cli
from bklm.studies.koopman import KoopmanConfig

cli.main(KoopmanConfig)
