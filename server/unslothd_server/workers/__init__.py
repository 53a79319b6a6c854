"""Worker processes from the outside: start, talk to, stop, tell dead from alive."""
