"""Errors about the files of a source that several readers of them meet."""

from everstep.trainer.errors import DataError


def unreadable(
    path: str, error: OSError, way_out: str = "make it readable or leave it out"
) -> DataError:
    """A file that cannot be opened or read."""
    why = error.strerror or error
    return DataError(f"data.source: cannot read '{path}': {why}; {way_out}")


def not_text(path: str, why: str) -> DataError:
    """A file that the user named as text, and that is none; ``why`` says where."""
    return DataError(
        f"data.source: '{path}' is not UTF-8 text ({why}); convert it (for example with iconv), "
        "name its format, or leave it out"
    )


def changing(path: str) -> DataError:
    """A file that is not what it was a moment ago."""
    return DataError(
        f"data.source: '{path}' changes while it is being read; start again when nothing writes "
        "to it, or leave it out"
    )
