"""bklm: O(N) language models around the BK-core, and the studies that measure them."""

__version__ = "0.2.0"
