"""Vision towers, one file a model family."""
