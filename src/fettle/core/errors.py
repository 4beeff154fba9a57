"""The one exception that a user is meant to read."""


class FettleError(Exception):
    """A sentence that names the file, line or key, what was found, and what to do."""
