"""A disk that is full for this process: RLIMIT_FSIZE, which holds on every file system and for every user."""

import resource


def limit_files(num_bytes: int | None) -> None:
    """No file of this process can grow beyond so many bytes; None lifts the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if num_bytes is None else num_bytes, hard))
