"""`twinlens eval`: how well a model answers the questions of a published benchmark."""
