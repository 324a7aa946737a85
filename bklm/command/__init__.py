"""The command ``bklm``: every study, and what was trained, from a shell."""
