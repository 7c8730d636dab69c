"""Loading Mixtral models, and the one place that knows how transformers lays them out."""
