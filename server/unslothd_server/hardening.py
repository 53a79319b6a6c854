"""What a process does before it touches a secret or a file: no core dumps, and files that only its user can read."""

import os
import resource


def harden_process() -> None:
    """Hardens this process and all that it starts.

    A core dump would hold tokens, prompts and rows; and whatever a library writes, under whatever umask the operator's
    shell has, is for the server's user alone.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
