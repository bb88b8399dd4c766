"""Every message between processes, one tagged union a hop and direction.

A field of type Tensor travels in a ZeroMQ frame of its own (`common/wire.py`); all other fields
make the header. Whatever grows with a request is a Tensor, so that a header's size does not depend
on it. A new field goes last and has a default.

Every message about a request carries (request_id, attempt): a receiver drops what belongs to an
older attempt.
"""

from typing import Annotated

import msgspec

from common.wire import Tensor

PROTOCOL_VERSION = 1

Name = Annotated[str, msgspec.Meta(max_length=200)]
Text = Annotated[str, msgspec.Meta(max_length=2000)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_BUCKETS = 32

Buckets = Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_BUCKETS)]


class Message(msgspec.Struct, forbid_unknown_fields=True, tag=True, kw_only=True):
    pass


class RequestMessage(Message):
    request_id: Name
    attempt: Count


class Peer(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where a member listens: its id and the ZeroMQ address of its inbox."""

    id: Name
    address: Name


class Sampling(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """How the next token is drawn. None means the model's own default, which preprocess fills
    in."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=2**31)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    num_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None


class Stopping(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """When an answer ends. `max_tokens` None means what is left of the context."""

    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    min_tokens: Count = 0
    ignore_eos: bool = False
    stop: Annotated[
        tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_STOP_STRING_CHARS)], ...],
        msgspec.Meta(max_length=MAX_STOP_STRINGS),
    ] = ()
    stop_token_ids: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_STOP_TOKEN_IDS)] = ()
    skip_special_tokens: bool = True


class Usage(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    prompt_tokens: Count = 0
    image_tokens: Count = 0
    completion_tokens: Count = 0
    cached_tokens: Count = 0


# Both ends of a fresh connection say Hello before anything else; what does not fit is refused by
# Goodbye.


class Hello(Message):
    protocol_version: Count
    id: Name
    role: Name
    fingerprint: Name
    """Of the model; empty where the role knows no model (gateway)."""


class Goodbye(Message):
    reason: Text


class Beat(Message):
    """Sent every second on every connection: the sender's lease goes on."""

    hung_seconds: Seconds = 0.0
    """For how long its work loop made no progress, where that is longer than the unit of work
    explains."""


class Draining(Message):
    """The sender finishes what it holds and then leaves: give it nothing new while another can take
    it."""


class Abort(RequestMessage):
    """Free everything that is held for the request. It may overtake, or be overtaken by, what it
    cancels."""


class Failed(RequestMessage):
    """The attempt cannot go on; `code` names a class of common.errors."""

    code: Name
    message: Text
    stage: Name
    image: Count | None = None


# gateway -> preprocess


class Submit(RequestMessage):
    """One request. `prompt_kind` says what `prompt` holds: UTF-8 JSON of chat messages, whose image
    parts are {"type": "image"} in the order of `images`; or int64 token ids with one placeholder
    an image."""

    prompt_kind: Annotated[str, msgspec.Meta(pattern="^(messages|token_ids)$")]
    prompt: Tensor
    images: tuple[Tensor, ...]
    """HandedOver image files, uint8 [bytes] each."""
    sampling: Sampling
    stopping: Stopping
    detokenizer: Peer
    timeout: Seconds
    """Seconds left until the request's deadline, counted from the receipt of this message."""
    return_prompt_token_ids: bool = False
    guide_kind: Annotated[str, msgspec.Meta(pattern="^(json_object|json_schema|regex)?$")] = ""
    guide: Tensor | None = None
    """UTF-8: the JSON schema or the regular expression that the answer must follow."""
    output_token_ids: Tensor | None = None
    """int64: of an attempt after the first, the tokens that the client has already; the answer goes
    on after them."""
    avoid: Name = ""
    """The id of the language group that the last attempt was lost with."""


GatewayToPreprocess = Hello | Beat | Submit | Abort


# preprocess -> gateway


class Routed(RequestMessage):
    """The request was handed to this LLM group: where an abort must go, and whose death ends the
    attempt."""

    llm: Peer
    prompt_token_ids: Tensor | None = None


class HandedOver(RequestMessage):
    """The language group holds the prompt and all its images: preprocess is not needed for this
    attempt any more."""


PreprocessToGateway = Hello | Goodbye | Beat | Routed | Failed | Draining | HandedOver


# preprocess -> vision


class Offer(RequestMessage):
    """One image to be encoded. It is answered at once by CacheHit, Grant or Busy, and only a Grant
    moves its pixels."""

    image: Count
    mm_hash: Name
    grid_thw: tuple[Count, Count, Count]
    num_patches: Count
    llm: Peer
    """Where the embeddings go."""
    timeout: Seconds
    skip_cache: bool = False
    """The embeddings that the replica may have of it were refused."""


class Pixels(RequestMessage):
    image: Count
    patches: Tensor
    """uint8 [num_patches, channels * patch_size * patch_size], merge-block order."""


class Decline(Message):
    """A Vacancy is not taken: nothing that waits here is for this replica now."""


PreprocessToVision = Hello | Beat | Offer | Pixels | Abort | Decline


# vision -> preprocess


class Grant(RequestMessage):
    """Send the pixels within two seconds: the room is kept for so long."""

    image: Count
    wait_seconds: Seconds = 0.0
    """Until the replica would begin another image."""
    has_room: bool = True
    """For another image of the receiver. Else a Vacancy follows when there is room."""


class CacheHit(RequestMessage):
    """No pixels are needed: the embeddings are in the replica's cache, and under way, or in work
    for another request."""

    image: Count


class Busy(RequestMessage):
    """The image is not taken, or was given back: nothing of it is held. A Vacancy follows when
    there is room."""

    image: Count
    wait_seconds: Seconds = 0.0


class Vacancy(Message):
    """There is room for one image of the receiver, which was told Busy or took the last room: an
    Offer or a Pass is due."""

    wait_seconds: Seconds = 0.0


class VisionLoad(Message):
    """What a replica can run, how long that takes, and when it would begin an image: when a
    preprocess connects, and when it changes by what another one gave."""

    buckets: Buckets = ()
    """The numbers of patches that its tower is made for, in rising order; none where any will do.
    """
    sizes: Buckets = ()
    """Measured so far: images of up to so many patches took so many `seconds` each."""
    seconds: Annotated[tuple[Seconds, ...], msgspec.Meta(max_length=MAX_BUCKETS)] = ()
    wait_seconds: Seconds = 0.0


VisionToPreprocess = (
    Hello | Goodbye | Beat | Grant | Failed | Draining | CacheHit | Busy | Vacancy | VisionLoad
)


# preprocess -> llm


class Prompt(RequestMessage):
    """The expanded prompt. Its images' embeddings come straight from vision, before or after it."""

    gateway_id: Name
    token_ids: Tensor
    """int64 [num_tokens], placeholders expanded."""
    positions: Tensor
    """int64 [3, num_tokens]: M-RoPE's temporal, height and width index of each token."""
    rope_delta: int
    """Position of a token after the prompt = its index + rope_delta."""
    placeholders: Tensor
    """int64 [num_images, 2]: offset and length of each image's placeholder range."""
    mm_hashes: Tensor
    """uint8 [num_images, 32]."""
    sampling: Sampling
    stopping: Stopping
    detokenizer: Peer
    timeout: Seconds
    timings: Tensor
    """UTF-8 JSON: stage timings so far."""
    grammar: Tensor | None = None
    """UTF-8: what the answer must follow, for llguidance."""
    output_token_ids: Tensor | None = None
    """int64: tokens of earlier attempts, which the answer goes on after."""


PreprocessToLlm = Hello | Beat | Prompt | Abort


# llm -> preprocess


class ItemReceived(RequestMessage):
    """Rank 0 holds the image's embeddings: preprocess need not keep the image."""

    image: Count


class ItemRejected(RequestMessage):
    """What came for the image cannot be used (shape, NaN)."""

    image: Count
    reason: Text


class Reserved(RequestMessage):
    """There is room for the embeddings of all of the request's images: they may be encoded."""


class LlmLoad(Message):
    """How busy the group is, for the choice among groups: when a preprocess connects, and when it
    changes."""

    running: Count
    waiting: Count
    free_tokens: Count
    """In its KV cache."""


LlmToPreprocess = (
    Hello | Goodbye | Beat | ItemReceived | ItemRejected | Draining | Reserved | LlmLoad
)


# vision -> llm


class Embeddings(RequestMessage):
    image: Count
    mm_hash: Name
    embeddings: Tensor
    """[num_image_tokens, hidden_size] in the vision tower's dtype."""
    preprocess_id: Name
    """Whose image it is: the acknowledgement goes there."""
    queue_seconds: Seconds = 0.0
    encode_seconds: Seconds = 0.0
    cached: bool = False


VisionToLlm = Hello | Beat | Embeddings
LlmToVision = Hello | Goodbye | Beat | Draining


# llm rank 0 -> the other ranks of its group


class ExecuteStep(Message):
    """What every rank computes next: the fields of services.llm.step_plan.StepPlan, int64 each."""

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_lens: Tensor
    context_lens: Tensor
    block_tables: Tensor
    embedding_rows: Tensor
    sampled_rows: Tensor
    embeddings: tuple[Tensor, ...]
    """The images' embeddings that fall into the step, in row order."""


LlmToLlm = Hello | Goodbye | Beat | ExecuteStep | Draining


# llm -> detokenizer


class Start(RequestMessage):
    """The first token is there: an answer begins whose deltas go to this gateway."""

    gateway_id: Name
    stopping: Stopping
    usage: Usage
    """Of the prompt; the completion's tokens are counted by the detokenizer."""
    timings: Tensor
    """UTF-8 JSON: the stages before the first token."""
    output_token_ids: Tensor | None = None
    """int64: tokens of earlier attempts; their text was delivered with them."""


class Tokens(RequestMessage):
    """New output tokens. With `finish_reason` it is the last message of the attempt."""

    offset: Count
    token_ids: Tensor
    """int64 [n]."""
    finish_reason: Name = ""
    """stop, length, or empty while the answer goes on."""
    logprobs: Tensor | None = None
    """float32 [n]: log-probability of each token."""
    top_token_ids: Tensor | None = None
    """int64 [n, k]."""
    top_logprobs: Tensor | None = None
    """float32 [n, k]."""


LlmToDetokenizer = Hello | Beat | Start | Tokens | Abort | Failed


# detokenizer -> llm


class StopFound(RequestMessage):
    """A stop string ends the answer: free what the request holds."""


DetokenizerToLlm = Hello | Goodbye | Beat | StopFound | Draining


# detokenizer -> gateway


class Delta(RequestMessage):
    """A piece of the answer. Text may lag behind the ids while a character or a stop string is
    incomplete."""

    offset: Count
    token_ids: Tensor
    text: Tensor
    """UTF-8."""
    finish_reason: Name = ""
    usage: Usage = Usage()
    logprobs: Tensor | None = None
    """UTF-8 JSON: a list with one OpenAI `logprobs.content` entry for each token."""
    timings: Tensor | None = None


DetokenizerToGateway = Hello | Goodbye | Beat | Delta | Failed | Draining


class Released(Message):
    """To a detokenizer that drains: no answer of the sender's is to come to it any more."""


GatewayToDetokenizer = Hello | Beat | Released


# gateway -> llm

GatewayToLlm = Hello | Beat | Abort
LlmToGateway = Hello | Goodbye | Beat | Failed | Draining

# Which union a connection decodes, by (sender's role, receiver's role). Hello comes first and tells
# the role.
HOPS = {
    ("gateway", "preprocess"): GatewayToPreprocess,
    ("preprocess", "gateway"): PreprocessToGateway,
    ("gateway", "llm"): GatewayToLlm,
    ("llm", "gateway"): LlmToGateway,
    ("gateway", "detokenizer"): GatewayToDetokenizer,
    ("detokenizer", "gateway"): DetokenizerToGateway,
    ("preprocess", "vision"): PreprocessToVision,
    ("vision", "preprocess"): VisionToPreprocess,
    ("preprocess", "llm"): PreprocessToLlm,
    ("llm", "preprocess"): LlmToPreprocess,
    ("vision", "llm"): VisionToLlm,
    ("llm", "vision"): LlmToVision,
    ("llm", "llm"): LlmToLlm,
    ("llm", "detokenizer"): LlmToDetokenizer,
    ("detokenizer", "llm"): DetokenizerToLlm,
}
