"""Checks of settings and host, for `unslothd serve --check` and `unslothd doctor`; none of them changes anything."""
