"""Models behind a URL: requests, streams, prices, and the parameters they support."""
