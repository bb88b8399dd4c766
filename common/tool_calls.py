"""What preprocess and the detokenizer both know about the calls that a model writes."""

OPEN = "<tool_call>"
"""What stands before a call. It is a token of its own in many vocabularies."""
CLOSE = "</tool_call>"
"""What stands after a call."""
