from bklm.harness import cli

from . import ExampleConfig

cli.main(ExampleConfig)
