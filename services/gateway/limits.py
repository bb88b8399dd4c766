"""The bounds of a request that hold before objects are built from it, for both APIs."""

MAX_MESSAGES = 4096
"""The most messages and parts of messages in one request, counted together."""
MAX_JSON_VALUES = 100_000
"""The most JSON values in one body, objects and arrays included. Those in unknown fields and in
schemas count, too."""
MAX_JSON_DEPTH = 64
"""The most objects and arrays inside each other."""
SMALL_BODY_BYTES = 64 * 1024
"""A body of up to this size always finds room, and does not wait for larger ones."""
MAX_HELD_BODY_BYTES = 256 * 2**20
"""The most bytes of bodies that are held at a time for requests which are not admitted yet."""
