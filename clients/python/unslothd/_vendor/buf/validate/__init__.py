"""Stubs of buf.validate, under our own name."""
