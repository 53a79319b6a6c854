"""The worker process: holds one model, obeys one server, writes the event log of its training."""
