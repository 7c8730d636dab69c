"""Recording what a model does: hooks, the Recorder, and whole corpora in shards."""
