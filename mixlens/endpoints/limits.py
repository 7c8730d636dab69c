"""Limits on answers of a server, so that a hostile one cannot fill the memory.

A JSON document grows up to thirty times in memory, and a text four times, so an answer at these limits takes less than
300 MB.
"""

from __future__ import annotations

# Of an answer that comes whole, of one event of a stream, and of the text that a stream amounts to.
MAX_BODY_BYTES = 8 << 20
# Of a stream, both as received and decompressed.
MAX_STREAM_BYTES = 256 << 20
MAX_EVENTS = 250_000
# Of a model's, a provider's and a reason's name.
MAX_NAME_CHARS = 200
# Headers are limited to 100 KiB by h11, which httpx reads them with.


class TooLarge(Exception):
    """An answer exceeded a limit; the message says which."""
