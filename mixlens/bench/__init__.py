"""How fast a model answers and what that costs: event records, metrics as pure functions of them, load, prices."""
