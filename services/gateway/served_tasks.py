"""What the served model does, and which requests it can therefore answer."""

from collections.abc import Sequence

from common.errors import InvalidRequest
from common.messages import Task
from services.gateway.generation import GenerationRequest

DOORS: dict[str, str] = {
    "generate": "generates text: send POST /v1/chat/completions, or gRPC Generate",
    "classify": "classifies: send POST /v1/classify, or gRPC Classify",
    "embed": "computes embeddings: send POST /v1/embeddings, or gRPC Embed",
}
"""What a model with each task does, and where to ask for it."""


def task_for(request: GenerationRequest, tasks: Sequence[str]) -> Task:
    """Return what a model that can do `tasks` is asked for, to answer the request.

    Any model has tokens. The text of a classifier is its best label.

    Raises
    ------
    InvalidRequest
        if the model cannot answer the request.
    """
    if request.task in (*tasks, "tokenize", "detokenize"):
        return request.task
    if request.task == "generate" and "classify" in tasks:
        refuse_what_labels_lack(request)
        return "classify"
    does = ", and ".join(DOORS[task] for task in tasks if task in DOORS)
    raise InvalidRequest(f"this model {does}", stage="gateway")


def refuse_what_labels_lack(request: GenerationRequest) -> None:
    """Raise InvalidRequest if the request asks for what only generated text has."""
    sampling = request.sampling
    stopping = request.stopping
    asked = {
        "an output format": bool(request.guide_kind),
        "log-probabilities": sampling.num_logprobs is not None,
        "penalties": any(
            (
                sampling.presence_penalty,
                sampling.frequency_penalty,
                sampling.repetition_penalty not in (None, 1),
            )
        ),
        "stop strings and stop tokens": bool(stopping.stop or stopping.stop_token_ids),
        "min_tokens": bool(stopping.min_tokens),
        "prompt token ids": request.return_prompt_token_ids,
        "several answers": request.n > 1,
    }
    if refused := [name for name, is_asked in asked.items() if is_asked]:
        raise InvalidRequest(
            f"this model answers with one of its labels, so there is no room for "
            f"{' or '.join(refused)}: leave that out, or {DOORS['classify'].partition(': ')[2]}",
            stage="gateway",
        )
