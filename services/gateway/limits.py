"""The bounds of a request that hold before objects are built from it, for both APIs."""

MAX_MESSAGES = 4096
"""The most messages and parts of messages in one request, counted together."""
MAX_JSON_VALUES = 100_000
"""The most JSON values in one body, objects and arrays included. Those in unknown fields and in
schemas count, too."""
MAX_JSON_DEPTH = 64
"""The most objects and arrays inside each other."""
MAX_TOKEN_BYTES = 256
"""The most bytes of text that one token is taken to stand for."""
MAX_GUIDE_BYTES = 2**20
"""The most bytes of a JSON schema or a regular expression that an answer must follow."""
SMALL_BODY_BYTES = 64 * 1024
"""A body of up to this size always finds room, and does not wait for larger ones."""
MAX_HELD_BODY_BYTES = 256 * 2**20
"""The most bytes of bodies that are held at a time for requests which are not admitted yet."""
MAX_ADMITTED_IMAGE_BYTES = 2**30
"""The most bytes of images that are held at a time for requests which are admitted."""

MAX_HEAD_BYTES = 64 * 1024
"""The most bytes of a request line and all headers together, and of all trailers together."""
MAX_CHUNK_EXTENSION_BYTES = 4 * 1024
"""The most bytes of all chunk extensions of one body together."""
MAX_CHUNKS = 2**18
"""The most chunks of one body."""
MAX_PIPELINED = 16
"""The most requests of one connection that wait for the answers to those before them."""
MAX_ECHOED_BYTES = 1000
"""The most bytes of a header that an answer repeats."""
HEAD_SECONDS = 10.0
"""How long a client may take for a request line and its headers."""
MIN_BODY_BYTES_PER_SECOND = 16 * 1024
BODY_PATIENCE_SECONDS = 15.0
"""How long a body may lag behind MIN_BODY_BYTES_PER_SECOND."""
DROP_SECONDS = 30.0
"""How long the rest of a refused body is read and dropped. A client that still sends would not see
the answer if the connection were closed at once."""
DROP_PATIENCE_SECONDS = 5.0
"""How long the rest of a refused body may lag behind MIN_BODY_BYTES_PER_SECOND."""
MAX_CONNECTIONS = 4096
