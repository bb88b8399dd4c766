"""The errors that reach a client, as one tree.

ServingError                 what a client may be told: a code, the stage, perhaps an item's index
├── InvalidRequest           400 / INVALID_ARGUMENT: the client's mistake; says what to do
│   ├── UnreadableImage      422 / INVALID_ARGUMENT: the bytes of one image cannot be used
│   └── TooLarge             413 / INVALID_ARGUMENT: a body, an image or a count beyond a limit
├── NotFound                 404 / NOT_FOUND: no such model
├── Exhausted                429 / RESOURCE_EXHAUSTED: the bound of a queue is reached
├── Unavailable              503 / UNAVAILABLE: a stage is not there, or died with the work in hand
├── DeadlineExceeded         504 / DEADLINE_EXCEEDED
└── Internal                 500 / INTERNAL: our own mistake

The names of the classes are what travels in a Failed message, so every process raises and reads the
same errors.
"""


class ServingError(ValueError):
    """Base of all errors that a client is told."""

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
        """`cause` tells refusals of one code apart in metrics."""
        super().__init__(message)
        self.message = message
        self.stage = stage
        self.item = item
        self.retry_after = retry_after
        self.cause = cause

    @property
    def code(self) -> str:
        return type(self).__name__


class InvalidRequest(ServingError):
    http_status = 400
    grpc_code = "INVALID_ARGUMENT"


class UnreadableImage(InvalidRequest):
    http_status = 422


class TooLarge(InvalidRequest):
    http_status = 413


class NotFound(ServingError):
    http_status = 404
    grpc_code = "NOT_FOUND"


class Exhausted(ServingError):
    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"


class Unavailable(ServingError):
    http_status = 503
    grpc_code = "UNAVAILABLE"


class DeadlineExceeded(ServingError):
    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"


class Internal(ServingError):
    pass


BY_CODE = {
    cls.__name__: cls
    for cls in (
        InvalidRequest,
        UnreadableImage,
        TooLarge,
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
    """The error that a Failed message tells of; an unknown code is Internal."""
    return BY_CODE.get(code, Internal)(message, stage, item, retry_after)
