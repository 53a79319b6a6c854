"""Bytes that are almost a message: what a broken or hostile encoder could send."""

from random import Random

_HOSTILE = (
    b"\x0a\xff\xff\xff\xff\x0f",  # a field of 4 GiB
    b"\x0b" * 200,  # groups that begin and never end
    b"\x0c",  # the end of a group that never began
    b"\x08" + b"\xff" * 11,  # a number without end
    b"\x0a\x02\xc3\x28",  # text that is not UTF-8
    b"\x0a\x03\xed\xa0\x80",  # half of a surrogate pair
    b"\xfa\xff\xff\xff\x0f\x01x",  # a field of the highest number
    b"\x00\x00",  # field number 0
)


def mutated(data: bytes, random: Random) -> bytes:
    """Changes one to four places of a message, or adds to it."""
    result = bytearray(data)
    for _ in range(random.randint(1, 4)):
        place = random.randint(0, len(result))
        match random.randrange(6):
            case 0 if result:
                result[place % len(result)] ^= 1 << random.randrange(8)
            case 1:
                del result[place : place + random.randint(1, 8)]
            case 2:
                result[place:place] = random.randbytes(random.randint(1, 8))
            case 3:
                result[place:place] = random.choice(_HOSTILE)
            case 4:
                result += result[:place]  # fields twice
            case _:
                del result[place:]
    return bytes(result[:200_000])


def noise(random: Random) -> bytes:
    """Bytes that no message ever was."""
    return random.choice((random.randbytes(random.randint(0, 300)), random.choice(_HOSTILE), b"\0" * 1000))
