"""Stand-ins for heavy parts, for fast tests."""
