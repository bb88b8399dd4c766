"""The errors that reach a client, as one tree.

ServingError                 the base, with a code, a stage and perhaps the index of an item
├── InvalidRequest           400 / INVALID_ARGUMENT: the request is wrong; the message says how
│   ├── UnreadableImage      400 / INVALID_ARGUMENT: an image cannot be decoded
│   ├── ContextLengthExceeded  400 / INVALID_ARGUMENT: the request does not fit into the context
│   ├── TooLarge             413 / INVALID_ARGUMENT: a body, an image or a count is over a limit
│   └── TooSlow              408 / INVALID_ARGUMENT: a request is sent too slowly
├── NotFound                 404 / NOT_FOUND: the model does not exist
├── Exhausted                429 / RESOURCE_EXHAUSTED: a queue is full
├── Unavailable              503 / UNAVAILABLE: a stage is missing, or was lost with the request
├── DeadlineExceeded         504 / DEADLINE_EXCEEDED: the deadline has passed
└── Internal                 500 / INTERNAL: there is a bug in Twinlens

A Failed message carries the name of the class, so every process knows the same errors.
"""

MAX_QUOTED_CHARS = 200


def shorten(text: str, most: int = MAX_QUOTED_CHARS) -> str:
    """Return a text from outside as an answer or a log may quote it: at most `most` characters.

    What is left out is replaced by a note of how many characters that were.
    """
    left_out = len(text) - most
    return text if left_out <= 0 else f"{text[:most]}… ({left_out:,} characters left out)"


class ServingError(ValueError):
    """The base of all errors that a client may see."""

    http_status = 500
    grpc_code = "INTERNAL"

    def __init__(
        self,
        message: str,
        stage: str = "",
        item: int | None = None,
        retry_after: float | None = None,
        cause: str = "",
    ) -> None:
        """Create an error.

        `message` says what is wrong and what to do. `stage` is the role of the service that failed,
        and `item` the index of the item that failed. `retry_after` is in seconds. `cause`
        distinguishes errors of the same class in metrics.
        """
        super().__init__(message)
        self.message = message
        self.stage = stage
        self.item = item
        self.retry_after = retry_after
        self.cause = cause

    @property
    def code(self) -> str:
        """The name of the class, which travels in messages and metrics."""
        return type(self).__name__


class InvalidRequest(ServingError):
    """The request is wrong."""

    http_status = 400
    grpc_code = "INVALID_ARGUMENT"


class UnreadableImage(InvalidRequest):
    """An image cannot be decoded."""


class TooLarge(InvalidRequest):
    """A body, an image or a count is over a limit."""

    http_status = 413


class ContextLengthExceeded(InvalidRequest):
    """The prompt, or the answer after it, does not fit into the model's context.

    Clients recognize the beginning of the message, which is that of OpenAI's, or the code.
    """

    @classmethod
    def beyond(cls, max_model_len: int, problem: str) -> "ContextLengthExceeded":
        """Return the error for a context of this many tokens; `problem` says what to do."""
        return cls(context_message(max_model_len, problem))


def context_message(max_model_len: int, problem: str) -> str:
    """Return the message of a ContextLengthExceeded."""
    return f"This model's maximum context length is {max_model_len} tokens. {problem}"


class UnsupportedType(InvalidRequest):
    """A body is not in a form, or not encoded in a way, that the server reads."""

    http_status = 415


class TooSlow(InvalidRequest):
    """A request is sent too slowly."""

    http_status = 408


class NotFound(ServingError):
    """The model that the client asks for is not served."""

    http_status = 404
    grpc_code = "NOT_FOUND"


class Exhausted(ServingError):
    """A queue is full, or cannot be worked off before the deadline."""

    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"


class Unavailable(ServingError):
    """A stage is missing, or was lost while it held the request."""

    http_status = 503
    grpc_code = "UNAVAILABLE"


class DeadlineExceeded(ServingError):
    """The deadline of the request has passed."""

    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"


class Internal(ServingError):
    """There is a bug in Twinlens."""


BY_CODE = {
    cls.__name__: cls
    for cls in (
        InvalidRequest,
        UnreadableImage,
        ContextLengthExceeded,
        TooLarge,
        UnsupportedType,
        TooSlow,
        NotFound,
        Exhausted,
        Unavailable,
        DeadlineExceeded,
        Internal,
    )
}


def from_code(
    code: str,
    message: str,
    stage: str = "",
    item: int | None = None,
    retry_after: float | None = None,
) -> ServingError:
    """Return the error that a Failed message reports; an unknown code means Internal."""
    return BY_CODE.get(code, Internal)(message, stage, item, retry_after)
