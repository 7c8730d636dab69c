"""What providers charge, and quality against cost and speed."""
