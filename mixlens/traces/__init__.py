"""Recording what every expert does, and the trace that comes of it."""
