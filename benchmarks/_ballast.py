"""Holds so much of the first GPU that only as much is free as another card would have: `_ballast.py FREE_BYTES`.

Plain allocations in a process of its own. Prints what is free then, and holds it until stdin ends.
"""

import sys

import torch

# A piece; smaller ones at the end.
PIECE_BYTES = 1 << 30


def main() -> None:
    """Allocates, tells, waits."""
    to_leave, held, piece = int(sys.argv[1]), [], PIECE_BYTES
    torch.cuda.init()
    while piece >= 1 << 21:
        if torch.cuda.mem_get_info()[0] - piece >= to_leave:
            held.append(torch.empty(piece, dtype=torch.uint8, device="cuda"))
        else:
            piece //= 2
    print(torch.cuda.mem_get_info()[0], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
