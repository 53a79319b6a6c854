"""The server of unslothd: a gRPC service in front of worker processes that train with Unsloth."""
