"""The gRPC face: one short method an RPC, validation, and errors as statuses."""
