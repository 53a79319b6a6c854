"""`python -m unslothd_mcp`: the same as the command `unslothd-mcp`."""

from unslothd_mcp.cli import main

main()
