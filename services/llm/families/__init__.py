"""Language models, one file a model family."""
