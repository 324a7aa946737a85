"""What an exported model takes along: the code with which transformers loads it. Copied by ``bklm.trained.exporting``."""
