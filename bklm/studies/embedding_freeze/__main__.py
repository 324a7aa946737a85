from bklm.harness import cli
from bklm.studies.embedding_freeze import EmbeddingFreezeConfig

cli.main(EmbeddingFreezeConfig)
