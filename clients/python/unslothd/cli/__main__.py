"""`python -m unslothd.cli` is the command `unslothd`."""

from unslothd.cli import main

main()
