"""Size limits on answers of servers, so that a hostile server cannot exhaust memory.

Parsed JSON takes up to thirty times the memory of its text, and decoded text four times that of its bytes. An answer at
these limits takes less than 300 MB.
"""

from __future__ import annotations

# Limit on an unstreamed answer, on one event of a stream, and on the total text of a stream.
MAX_BODY_BYTES = 8 << 20
# Limit on a stream, both as received and decompressed.
MAX_STREAM_BYTES = 256 << 20
MAX_EVENTS = 250_000
# Limit on the name of a model, a provider or a finish reason.
MAX_NAME_CHARS = 200
# h11, which httpx uses, limits headers to 100 KiB.


class TooLarge(Exception):
    """Raised when an answer exceeds a limit, which the message names."""
