"""Training of the ContextTokenLM: a context block first, without labels; then the rest, on contexts that it leaves."""
