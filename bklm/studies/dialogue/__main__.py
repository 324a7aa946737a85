from bklm.harness import cli
from bklm.studies.dialogue import DialogueConfig

cli.main(DialogueConfig)
