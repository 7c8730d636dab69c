"""Models behind a URL: how they are asked, what they stream, what they cost and which parameters they heed."""
