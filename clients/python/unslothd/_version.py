"""Version of unslothd: contract, server, client and adapter are released as one."""

__version__ = "0.1.0"
