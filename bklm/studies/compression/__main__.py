from bklm.harness import cli
from bklm.studies.compression import CompressionConfig

cli.main(CompressionConfig)
