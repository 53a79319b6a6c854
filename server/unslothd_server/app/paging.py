"""Pages of a list: the token of a page is the last id of the one before, so that new entries shift nothing."""

import base64
import binascii
from collections.abc import Sequence

from unslothd_server.errors import FieldViolation, InvalidFieldsError

DEFAULT_PAGE_SIZE = 100


def page(newest_first: Sequence[str], page_size: int, page_token: str) -> tuple[list[str], str]:
    """Returns the ids of one page and the token of the next.

    Args:
        newest_first: All ids, in descending order.
        page_size: Most ids; 0 = 100.
        page_token: From the page before; empty = the first page.

    Raises:
        InvalidFieldsError: The token was not made here.
    """
    rest = list(newest_first)
    if page_token:
        try:
            last = base64.b64decode(page_token, altchars=b"-_", validate=True).decode()
        except (binascii.Error, ValueError):
            raise InvalidFieldsError(
                [FieldViolation("page_token", "must be the next_page_token of an earlier answer, unchanged")]
            ) from None
        rest = [each for each in rest if each < last]
    size = page_size or DEFAULT_PAGE_SIZE
    chosen = rest[:size]
    more = len(rest) > size
    return chosen, base64.urlsafe_b64encode(chosen[-1].encode()).decode() if more else ""
