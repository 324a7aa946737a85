from bklm.harness import cli
from bklm.studies.integration import IntegrationConfig

cli.main(IntegrationConfig)
