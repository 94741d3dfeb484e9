"""Entry points: the ``unclip`` command. Thin on purpose; each command parses, calls one function and prints."""
