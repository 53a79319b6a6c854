"""Descriptors for tools that ask the server for its contract, methods by their names included."""

from typing import Any

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool


class ReflectedPool:
    """A descriptor pool that also finds the file of a method.

    protobuf's pool finds services, messages, fields and enum values by name, but not "package.Service.Method", which
    ghz asks for and the reflection of other languages answers.

    Args:
        pool: Where the contract is registered.
    """

    def __init__(self, pool: DescriptorPool) -> None:
        self._pool = pool

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:
        """Returns the file that declares a symbol. Raises KeyError when no file does."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            return self._pool.FindMethodByName(symbol).containing_service.file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)
