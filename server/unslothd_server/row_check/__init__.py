"""Checks uploaded rows in a process of its own: `python -m unslothd_server.row_check FORMAT FILE`.

The bytes come from anybody and meet native code here (Arrow, Parquet), so they are read neither by the server nor by a
worker, but by a process without secrets, with limits, that ends with its answer. The file may still grow: what is there
of it is told on stdin, a number of bytes a line, then "end". The answer is one line of JSON on stdout (`verdict.py`).
"""
