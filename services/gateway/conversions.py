"""What is read of a Converted, checked where it enters the gateway."""

import msgspec

from common.messages import Converted
from services.gateway.deltas import read_token_ids
from services.gateway.generation import Conversion, GenerationRequest

names_decoder = msgspec.json.Decoder(list[str])


def read_converted(converted: Converted, request: GenerationRequest) -> Conversion:
    """Return the tokens or the text that a message carries.

    Raises
    ------
    ValueError
        if the message is malformed, or is not what the request asks for.
    """
    found = (converted.token_ids is not None, converted.text is not None)
    if found != (request.task == "tokenize", request.task == "detokenize") or not any(found):
        raise ValueError(f"this is not a result of the task {request.task}")
    if request.returns_token_names != (converted.token_names is not None):
        raise ValueError("the names of the tokens are missing, or were not asked for")
    ids = read_token_ids(converted.token_ids) if converted.token_ids else []
    try:
        names = names_decoder.decode(converted.token_names.data) if converted.token_names else None
        text = converted.text.text() if converted.text else ""
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as e:
        raise ValueError("the text or the names of the tokens cannot be read") from e
    if names is not None and len(names) != len(ids):
        raise ValueError(f"{len(names)} names came for {len(ids)} tokens")
    return Conversion(ids, names, text)
