"""Text that a terminal may be given."""


def shown(text: str) -> str:
    """Text without control characters, with which a model could take hold of the terminal."""
    return "".join(c for c in text if c in "\n\t\u200d" or c.isprintable() or c.isspace() and c > "\x9f")
