"""Hostile callers: requests made from the contract's descriptors, broken bytes on the port (`make fuzz`)."""
