"""Every message between processes, as one tagged union per hop and direction.

A field of type Tensor travels in a ZeroMQ frame of its own (`common/wire.py`). All other fields
form the header. Whatever grows with a request is a Tensor, so the size of a header does not depend
on it. A new field goes last and has a default.

A request is made of a prompt and *items*, which are images and videos. An item is named by its
index in the request.

Every message about a request carries (request_id, attempt). A receiver drops what belongs to an
older attempt.
"""

from typing import Annotated, Any, Literal, TypedDict, get_args

import msgspec

from common.wire import Tensor

PROTOCOL_VERSION = 6

MAX_TEXT_CHARS = 2000

NO_CONTROL_CHARACTERS = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z"
"""What a name is made of, because names stand in logs and addresses."""

Name = Annotated[str, msgspec.Meta(max_length=200, pattern=NO_CONTROL_CHARACTERS)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT_CHARS)]
Salt = Annotated[bytes, msgspec.Meta(max_length=64)]
Offset = Annotated[int, msgspec.Meta(ge=-(2**48), le=2**48)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_PROMPT_LOGPROBS = 2**16
"""The most log-probabilities of a prompt. Writing them takes the detokenizer 0.2 s."""
MAX_BIASES = 1024
"""The most tokens whose logits a request changes. OpenAI's own service accepts 300."""
MAX_LOGIT_BIAS = 100
"""The largest bias. It leaves a token no rival, and its negative rules the token out."""
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
MAX_BUCKETS = 32

TRACEPARENT = r"^(00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-01)?\Z"
TraceParent = Annotated[str, msgspec.Meta(max_length=55, pattern=TRACEPARENT)]
"""The span that the receiver's spans are children of, in W3C's form; empty if nobody records the
request."""

GuideKind = Annotated[
    str, msgspec.Meta(pattern="^(json_object|json_schema|regex|choice|grammar|tool_calls)?$")
]
"""What an answer must follow: any JSON object, a JSON schema, a regular expression, one of the
texts of a JSON list, a grammar (Lark or GBNF), or the form of calls of tools. Empty for a free
answer."""

Buckets = Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_BUCKETS)]

ItemKind = Literal["image", "video"]
"""What an item is. Each kind has a preparation in preprocess and an encoder in vision."""

MIN_FPS = 0.01
MAX_FPS = 1000.0
Fps = Annotated[float, msgspec.Meta(ge=MIN_FPS, le=MAX_FPS)]
"""Frames per second of a video."""
MAX_FRAMES = 768
"""The most frames of all videos of a request together, and the most that are taken of a file."""

ModelTask = Literal["generate", "classify", "embed"]
"""What is asked of the model: a text, the probabilities of its labels, or a feature vector."""
TASKS: tuple[ModelTask, ...] = get_args(ModelTask)
Task = ModelTask | Literal["tokenize", "detokenize"]
"""What is asked for. Preprocess itself answers what needs no model: the tokens of a prompt, or the
text of tokens."""

RequestKey = tuple[str, int]
"""(request_id, attempt): names one attempt of a request."""
ItemKey = tuple[str, int, int]
"""(request_id, attempt, item): names one item of one attempt."""


class RequestIds(TypedDict):
    """The fields by which a message names its request, to build a message from another one."""

    request_id: str
    attempt: int


class ItemIds(RequestIds):
    """The fields by which a message names its item, to build a message from another one."""

    item: int


def request_ids(key: RequestKey) -> RequestIds:
    """Return the fields that name the request `key`."""
    request_id, attempt = key
    return {"request_id": request_id, "attempt": attempt}


class Message(msgspec.Struct, forbid_unknown_fields=True, tag=True, kw_only=True):
    """The base of all messages."""


class RequestMessage(Message):
    """A message about one attempt of one request."""

    request_id: Name
    attempt: Count

    @property
    def key(self) -> RequestKey:
        return self.request_id, self.attempt

    @property
    def ids(self) -> RequestIds:
        return {"request_id": self.request_id, "attempt": self.attempt}


class ItemMessage(RequestMessage):
    """A message about one item of one attempt of a request."""

    item: Count

    @property
    def item_key(self) -> ItemKey:
        return self.request_id, self.attempt, self.item

    @property
    def item_ids(self) -> ItemIds:
        return {"request_id": self.request_id, "attempt": self.attempt, "item": self.item}


class Peer(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where a member listens: its id and the ZeroMQ address of its inbox."""

    id: Name
    address: Name


NO_PEER = Peer("", "")
"""Stands for the detokenizer of a request that needs none."""


class Item(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One item of a request as the client sent it."""

    kind: ItemKind
    data: Tensor
    """uint8 [bytes]: the encoded file; with `frame_lengths`, the files of all frames, one after the
    other."""
    frame_lengths: Tensor | None = None
    """int64 [num_frames]: the bytes of each frame of a video that comes as encoded images."""
    fps: Fps | None = None
    """How many of the given frames make a second, or how many frames to take from each second of a
    file. None for the default."""
    min_pixels: Count | None = None
    """The fewest pixels that the client wants the resized item to have; None for the model's."""
    max_pixels: Count | None = None
    """The most pixels that the client wants the resized item to have; None for the model's."""


class Sampling(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """How the next token is drawn.

    None means the default of the model, which preprocess fills in.
    """

    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    """0 leaves only the most likely token."""
    top_k: Annotated[int, msgspec.Meta(ge=0, le=2**31)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    num_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    num_prompt_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    """Like `num_logprobs`, for the tokens of the prompt."""


MAX_NGRAM_SIZE = 1024


class TokenRules(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Which tokens an answer prefers, and which it may not have."""

    bias_token_ids: Tensor | None = None
    """int64 [n]: tokens whose logits are changed."""
    bias_values: Tensor | None = None
    """float32 [n]: what is added to the logit of each of them. A token with MAX_LOGIT_BIAS has only
    rivals with the same, and one with -MAX_LOGIT_BIAS is never drawn."""
    allowed_token_ids: Tensor | None = None
    """int64 [n]: the only tokens that may be drawn; None for all."""
    bad_words: Tensor | None = None
    """UTF-8 JSON: a list of the texts that the answer may not have. In a Prompt it is a list of the
    token sequences that spell them."""
    no_repeat_ngram_size: Annotated[int, msgspec.Meta(ge=0, le=MAX_NGRAM_SIZE)] = 0
    """No sequence of this many tokens comes twice in the answer; 0 if any may."""


class Repetition(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """When an answer counts as caught in a loop: its last tokens are one pattern of
    `min_pattern_size` to `max_pattern_size` tokens, `min_count` times in a row."""

    max_pattern_size: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    """0 if loops do not end the answer."""
    min_pattern_size: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    """0 means 1."""
    min_count: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0

    @property
    def objection(self) -> str:
        """Why the values do not fit together; empty if they do."""
        if self.min_pattern_size > self.max_pattern_size:
            return (
                f"min_pattern_size is {self.min_pattern_size} and max_pattern_size "
                f"{self.max_pattern_size}; it may not be larger"
            )
        if self.max_pattern_size and self.min_count < 2:
            return f"min_count is {self.min_count}; a loop repeats itself 2 times or more"
        return ""


class Stopping(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """When an answer ends. If `max_tokens` is None, the rest of the context is the limit."""

    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)] | None = None
    min_tokens: Count = 0
    ignore_eos: bool = False
    stop: Annotated[
        tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_STOP_STRING_CHARS)], ...],
        msgspec.Meta(max_length=MAX_STOP_STRINGS),
    ] = ()
    stop_token_ids: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_STOP_TOKEN_IDS)] = ()
    skip_special_tokens: bool = True
    include_stop: bool = False
    """Whether the text ends with the stop string that ended it."""
    repetition: Repetition | None = None
    """Which loops end the answer; None for the model's default, and in a Prompt for no loops."""


class Sibling(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Another answer to the same prompt, which is computed once for all of them."""

    request_id: Name
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


MAX_CHOICES = 16
"""The most answers to one prompt."""
Siblings = Annotated[tuple[Sibling, ...], msgspec.Meta(max_length=MAX_CHOICES - 1)]
MIN_PRIORITY = -(2**31)
MAX_PRIORITY = 2**31 - 1
Priority = Annotated[int, msgspec.Meta(ge=MIN_PRIORITY, le=MAX_PRIORITY)]
"""Requests with lower values come first."""


MAX_ADAPTERS = 32
"""The most LoRA adapters of a language group."""
MAX_PATH_BYTES = 240
"""The longest path of an adapter, so that all of a group fit into one message."""
AdapterPath = Annotated[str, msgspec.Meta(max_length=MAX_PATH_BYTES)]


class Adapter(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A LoRA adapter that requests may choose."""

    name: Name
    path: AdapterPath
    """Its directory on the hosts of the language group, as it was given."""


class Usage(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Token counts of a request."""

    prompt_tokens: Count = 0
    image_tokens: Count = 0
    completion_tokens: Count = 0
    cached_tokens: Count = 0


# Messages of the connection itself. Both ends of a new connection send Hello before anything else.
# A peer that does not fit is refused with Goodbye.


class Hello(Message):
    """The first message in both directions of a connection."""

    protocol_version: Count
    id: Name
    role: Name
    fingerprint: Name
    """Fingerprint of the model; empty if the role knows no model (gateway)."""


class Goodbye(Message):
    """The sender refuses the connection."""

    reason: Text

    def __post_init__(self) -> None:
        self.reason = self.reason[:MAX_TEXT_CHARS]


class Beat(Message):
    """The heartbeat sent every second on every connection; it renews the sender's lease."""

    hung_seconds: Seconds = 0.0
    """How long the sender's work loop has made no progress, if longer than its work explains."""


class Draining(Message):
    """The sender finishes what it holds and then leaves.

    It gets new work only if no other member can take it.
    """


FromConnector = Hello | Beat
"""What the connecting end of any hop may send besides the messages of the hop."""
FromInbox = Hello | Goodbye | Beat | Draining
"""What the end that owns the inbox may send besides the messages of the hop."""


# Messages of several hops


class Abort(RequestMessage):
    """Free everything that is held for the request. It may arrive before what it cancels."""


class Failed(RequestMessage):
    """The attempt cannot go on; `code` names a class of common.errors."""

    code: Name
    message: Text
    stage: Name
    item: Count | None = None
    """Index of the item that failed; None if the request as a whole did."""

    def __post_init__(self) -> None:
        # It may quote the reason of another peer, which has the length of a Text already.
        self.message = self.message[:MAX_TEXT_CHARS]


class Alone(RequestMessage):
    """The sender works on nothing but this request as soon as the receiver has answered Noted.

    If the sender dies then, no other request is to blame. preprocess and llm send it to the gateway
    for a request that is `apart`, and again each second until the answer.
    """


class Noted(RequestMessage):
    """The answer to Alone: the gateway knows which request the receiver works on."""


class Cleared(RequestMessage):
    """The gateway has seen the request pass the receiver's stage, so others may go on there."""


# gateway -> preprocess


class Submit(RequestMessage):
    """One request.

    `prompt_kind` says what `prompt` holds. "messages" is UTF-8 JSON of chat messages, in which an
    item stands as {"type": <its kind>}, in the order of `items`. "text" is UTF-8, read as the
    tokenizer reads it. "token_ids" is int64 token ids with one placeholder for each item.
    """

    prompt_kind: Annotated[str, msgspec.Meta(pattern="^(messages|text|token_ids)$")]
    prompt: Tensor
    items: tuple[Item, ...]
    sampling: Sampling
    stopping: Stopping
    detokenizer: Peer
    """NO_PEER if the task generates no text."""
    timeout: Seconds
    """Seconds until the request's deadline, counted from the receipt of this message."""
    return_prompt_token_ids: bool = False
    guide_kind: GuideKind = ""
    guide: Tensor | None = None
    """UTF-8: what the answer must follow, by its kind."""
    output_token_ids: Tensor | None = None
    """int64: the tokens that earlier attempts delivered; the answer continues after them."""
    avoid: Name = ""
    """Id of the language group that the previous attempt was lost with."""
    apart: bool = False
    """Prepare the request while nothing else is prepared, because it may end the process."""
    apart_in_llm: bool = False
    """The `apart` of its Prompt."""
    task: Task = "generate"
    traceparent: TraceParent = ""
    guide_whitespace: Annotated[str, msgspec.Meta(max_length=256)] = ""
    """Regular expression of the white space between the tokens of guided JSON; empty for none."""
    token_rules: TokenRules | None = None
    priority: Priority = 0
    siblings: Siblings = ()
    """The other answers to the prompt. Each is a request of its own behind preprocess."""
    adapter: Name = ""
    """The LoRA adapter that the request asks for; empty for the model itself."""
    reads_tool_calls: bool = False
    """Whether the tool calls of the answer are taken out of its text."""
    chat_options: Tensor | None = None
    """UTF-8 JSON of the `ChatOptions` (`common/chat.py`) of messages; None for the defaults."""
    returns_token_names: bool = False
    """Whether the tokens of the task tokenize are named."""


GatewayToPreprocess = Submit | Abort | Noted | Cleared


# preprocess -> gateway


class Routed(RequestMessage):
    """The request was handed to this language group: send aborts there, and its death ends the
    attempt."""

    llm: Peer
    prompt_token_ids: Tensor | None = None
    item_sizes: Tensor | None = None
    """int64 [num_items, 2]: height and width in pixels of each item as the client sent it, upright
    as its Exif orientation says."""


class HandedOver(RequestMessage):
    """The language group holds the prompt and all items, so the attempt no longer needs
    preprocess."""


class ItemsLeft(RequestMessage):
    """The language group got one more item of the request, and some are left. It only informs."""

    count: Count = 1
    """The number of items that are left."""


class Converted(RequestMessage):
    """The result of the tasks tokenize and detokenize. It is the last message of the attempt."""

    token_ids: Tensor | None = None
    """int64 [n]: the tokens of the prompt, in which a placeholder stands as often as its item has
    tokens. None for the task detokenize."""
    token_names: Tensor | None = None
    """UTF-8 JSON: a list of the names of the n tokens in the vocabulary, if they were asked for."""
    text: Tensor | None = None
    """UTF-8: the text of the tokens. None for the task tokenize."""


PreprocessToGateway = Routed | Failed | HandedOver | Alone | ItemsLeft | Converted


# preprocess -> vision


class Offer(ItemMessage):
    """One item to be encoded.

    The replica answers at once with CacheHit, Grant or Busy. Only a Grant moves pixels.
    """

    mm_hash: Name
    """Name of the item's content (`common/item_hash.py`). Pixels that have another are refused."""
    grid_thw: tuple[Count, Count, Count]
    """The grid of patches: steps in time, rows, columns."""
    num_patches: Count
    llm: Peer
    """The language group that gets the embeddings."""
    timeout: Seconds
    skip_cache: bool = False
    """The embeddings that the replica may have cached were rejected: encode the item again."""
    kind: ItemKind = "image"
    content_size: tuple[Count, Count] = (0, 0)
    """Height and width of the content in pixels. It is smaller than the grid if the item is
    padded."""
    apart: bool = False
    """Accept the item only while the replica holds no other, because it may end the process."""
    traceparent: TraceParent = ""
    priority: Priority = 0


class Pixels(ItemMessage):
    """The patches of a granted item."""

    patches: Tensor
    """uint8 [num_patches, values per patch], in the order that the family's tower expects."""


class Decline(Message):
    """The answer to a Vacancy if no item waits for this replica."""


PreprocessToVision = Offer | Pixels | Abort | Decline


# vision -> preprocess


class Grant(ItemMessage):
    """The item is accepted. Send the pixels within two seconds; the room is kept that long."""

    wait_seconds: Seconds = 0.0
    """Seconds until the replica would start another item."""
    has_room: bool = True
    """Whether the receiver may offer another item. If not, a Vacancy follows when there is room."""


class CacheHit(ItemMessage):
    """No pixels are needed: the embeddings are cached, or being computed for an equal item."""


class Busy(ItemMessage):
    """The item is not accepted, or is returned. A Vacancy follows when there is room."""

    wait_seconds: Seconds = 0.0


class Vacancy(Message):
    """There is room for one item of the receiver, which must answer with an Offer or Decline."""

    wait_seconds: Seconds = 0.0


class VisionLoad(Message):
    """What a replica can run, how long that takes, and when it would start an item.

    Sent when a preprocess connects, and when work of another preprocess changes the figures. If
    many preprocesses share the replica, only a few learn that it has become idle.
    """

    buckets: Buckets = ()
    """Patch counts that the tower is compiled for, in rising order; empty if it takes any."""
    sizes: Buckets = ()
    """Patch counts measured so far: items of up to `sizes[i]` patches took `seconds[i]`."""
    seconds: Annotated[tuple[Seconds, ...], msgspec.Meta(max_length=MAX_BUCKETS)] = ()
    wait_seconds: Seconds = 0.0
    is_shared: bool = False
    """More preprocesses use the replica than it notifies of every item, so it may be busy."""
    is_idle: bool = False
    """The receiver is one of the few that learn that the shared replica is idle."""


VisionToPreprocess = Grant | CacheHit | Busy | Vacancy | VisionLoad | Failed


# preprocess -> llm


class Prompt(RequestMessage):
    """The expanded prompt. The embeddings of its items come from vision once they are Reserved."""

    gateway_id: Name
    token_ids: Tensor
    """int64 [num_tokens], placeholders expanded."""
    positions: Tensor
    """int64 [num_components, num_tokens]: the position of each token, by the family's rule."""
    rope_delta: Offset
    """The position of a token after the prompt is its index + rope_delta, in every component."""
    placeholders: Tensor
    """int64 [num_items, 2]: offset and length of each item's placeholder range."""
    mm_hashes: Tensor
    """uint8 [num_items, 32]: the names of the items' contents. Embeddings under another name are
    not those of the item."""
    sampling: Sampling
    stopping: Stopping
    detokenizer: Peer
    """NO_PEER if the task generates no text."""
    timeout: Seconds
    timings: Tensor
    """UTF-8 JSON: the stage timings so far."""
    grammar: Tensor | None = None
    """UTF-8: the llguidance grammar that the answer must follow."""
    output_token_ids: Tensor | None = None
    """int64: the tokens of earlier attempts; the answer continues after them."""
    cache_salt: Salt = b""
    """Root of the prefix cache's names. Preprocess must derive it from whatever changes the keys
    and values of equal tokens. So far that is the rope parameter."""
    rope_parameter: Count = 0
    """A parameter of the rotary embedding that belongs to the request; 0 if its family has none."""
    adapter: Name = ""
    """The LoRA adapter that the request asks for; empty for the model itself."""
    whole: bool = False
    """The prompt must be computed in one step, without chunks and without the prefix cache."""
    apart: bool = False
    """Compute the request in steps of its own until it is cleared, because it may end the group."""
    task: ModelTask = "generate"
    traceparent: TraceParent = ""
    token_rules: TokenRules | None = None
    priority: Priority = 0
    siblings: Siblings = ()
    """The other answers to the prompt. They share its items and its deadline."""
    reads_tool_calls: bool = False
    """The `reads_tool_calls` of its Start."""


# llm -> preprocess


class ItemReceived(ItemMessage):
    """Rank 0 holds the item's embeddings, so preprocess need not keep the item."""


class ItemRejected(ItemMessage):
    """The embeddings of the item cannot be used (shape, NaN)."""

    reason: Text

    def __post_init__(self) -> None:
        self.reason = self.reason[:MAX_TEXT_CHARS]


class Reserved(RequestMessage):
    """The embeddings of all items of the request have room, so the items may be encoded."""


class LlmLoad(Message):
    """How busy a language group is.

    Preprocess chooses among groups by these figures, and gateways serve them as metrics. Sent when
    one of them connects, and when the figures change.
    """

    running: Count
    waiting: Count
    free_tokens: Count
    """Free tokens in the KV cache."""
    capacity_tokens: Count = 0
    """Tokens that the KV cache has room for."""


class Adapters(Message):
    """The LoRA adapters that requests to a language group may choose.

    Sent to preprocesses and gateways when one of them connects, and when the adapters change.
    """

    adapters: Annotated[tuple[Adapter, ...], msgspec.Meta(max_length=MAX_ADAPTERS)]


LlmToPreprocess = ItemReceived | ItemRejected | Reserved | LlmLoad | Adapters


# vision -> llm


class Embeddings(ItemMessage):
    """The embeddings of one item."""

    mm_hash: Name
    embeddings: Tensor
    """[num_item_tokens, input width of the language model], in the vision tower's dtype."""
    preprocess_id: Name
    """The preprocess that offered the item. The acknowledgement goes to the one that brought the
    prompt."""
    queue_seconds: Seconds = 0.0
    encode_seconds: Seconds = 0.0
    cached: bool = False


VisionToLlm = Embeddings
PreprocessToLlm = Prompt | Abort | Embeddings
"""Preprocess sends the patches of items itself to a model without a vision tower."""


# llm rank 0 -> the other ranks of its group


class ExecuteStep(Message):
    """What every rank computes next: the fields of services.llm.step_plan.StepPlan, int64 each."""

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_lens: Tensor
    context_lens: Tensor
    block_tables: Tensor
    item_rows: Tensor
    sampled_rows: Tensor
    rope_parameters: Tensor
    adapters: Tensor
    block_copies: Tensor
    embeddings: tuple[Tensor, ...]
    """The parts of the items' embeddings that fall into the step, in row order."""


class PrepareAdapter(Message):
    """Read your share of an adapter, off the loop of steps, and answer with AdapterPrepared."""

    adapter: Count
    """The number of the adapter in step plans. It is never given again."""
    path: AdapterPath


class AdapterPrepared(Message):
    """A rank has read its share of an adapter, or cannot."""

    adapter: Count
    identity: Annotated[bytes, msgspec.Meta(max_length=32)] = b""
    """Hash of the files that the rank has read. All ranks must have read the same."""
    error: Text = ""
    """Why the rank cannot use the adapter; empty if it can."""

    def __post_init__(self) -> None:
        self.error = self.error[:MAX_TEXT_CHARS]


class UseAdapter(Message):
    """Steps after this message may name the adapter, which was prepared."""

    adapter: Count


class DropAdapter(Message):
    """No step after this message names the adapter: free it, whether it was used or prepared."""

    adapter: Count


LlmToLlm = ExecuteStep | PrepareAdapter | AdapterPrepared | UseAdapter | DropAdapter
RankZeroToLlm = ExecuteStep | PrepareAdapter | UseAdapter | DropAdapter


# llm -> detokenizer


class Start(RequestMessage):
    """An answer begins, because its first token exists. Its deltas go to `gateway_id`."""

    gateway_id: Name
    stopping: Stopping
    usage: Usage
    """Token counts of the prompt; the detokenizer counts the completion."""
    timings: Tensor
    """UTF-8 JSON: the stages before the first token."""
    output_token_ids: Tensor | None = None
    """int64: the tokens of earlier attempts, whose text was delivered with them."""
    timeout: Seconds = 3600.0
    """Seconds until the request's deadline, counted from the receipt of this message."""
    traceparent: TraceParent = ""
    reads_tool_calls: bool = False
    """Whether the tool calls of the answer are taken out of its text."""
    prompt_token_ids: Tensor | None = None
    """int64 [p]: the prompt, if its log-probabilities were asked for."""
    prompt_logprobs: Tensor | None = None
    """float32 [p - 1]: log-probability of each token of the prompt but the first."""
    prompt_top_token_ids: Tensor | None = None
    """int64 [p - 1, k]."""
    prompt_top_logprobs: Tensor | None = None
    """float32 [p - 1, k]."""
    prompt_ranks: Tensor | None = None
    """int64 [p - 1]: how likely each token was in its place; 1 for the most likely one."""


class Tokens(RequestMessage):
    """New output tokens. With a `finish_reason` it is the last message of the attempt."""

    offset: Count
    token_ids: Tensor
    """int64 [n]."""
    finish_reason: Name = ""
    """stop, length, repetition, or empty while the answer goes on."""
    logprobs: Tensor | None = None
    """float32 [n]: log-probability of each token."""
    top_token_ids: Tensor | None = None
    """int64 [n, k]."""
    top_logprobs: Tensor | None = None
    """float32 [n, k]."""


LlmToDetokenizer = Start | Tokens | Abort | Failed


# detokenizer -> llm


class StopFound(RequestMessage):
    """A stop string ends the answer, so the language group frees what the request holds."""


DetokenizerToLlm = StopFound


# detokenizer -> gateway


class Delta(RequestMessage):
    """A piece of the answer. Text lags behind the ids while a character or a stop string is
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
    """UTF-8 JSON: the stage timings so far. With the first piece and with the last one."""
    boxes: Tensor | None = None
    """UTF-8 JSON: the boxes of the whole answer, on the grid of its family (`common/boxes.py`).
    With the last piece only, and only if the family's answers hold boxes."""
    tool_calls: Tensor | None = None
    """UTF-8 JSON: the parts of tool calls that became certain, a list of objects, at most one of
    each call. A part has the `index` of its call and more of its `arguments`. The first part of a
    call has its `id` and `name`, too. A part may have a `text`, which follows it in the answer. A
    call with a part that is `withdrawn` was malformed, and the text that follows has it whole."""
    prompt_logprobs: Tensor | None = None
    """UTF-8 JSON: a list with one OpenAI `logprobs.content` entry for each token of the prompt, and
    null for the first one. An entry has a `rank`, too. With the first piece only."""


DetokenizerToGateway = Delta | Failed


# gateway -> detokenizer


class Released(Message):
    """The receiver, a draining detokenizer, will get no more answers of the sender."""


GatewayToDetokenizer = Released


# gateway <-> llm


class LoadAdapter(Message):
    """Load an adapter for requests that name it. The answer is AdapterChanged."""

    task: Name
    """Names the task in the answer."""
    name: Name
    path: AdapterPath
    replace: bool = False
    """Whether an adapter of this name may be replaced. Its requests go on with the old one."""


class UnloadAdapter(Message):
    """Accept no further requests for an adapter, and free it once those that run have ended."""

    task: Name
    name: Name


class AdapterChanged(Message):
    """The answer to LoadAdapter or UnloadAdapter."""

    task: Name
    code: Name = ""
    """The class of common.errors that says why nothing changed; empty if the task is done."""
    reason: Text = ""

    def __post_init__(self) -> None:
        self.reason = self.reason[:MAX_TEXT_CHARS]


GatewayToLlm = Abort | Noted | Cleared | LoadAdapter | UnloadAdapter


class Pooled(RequestMessage):
    """The result of a request that generates no text. It is the last message of the attempt."""

    values: Tensor
    """float32 [n]: the probabilities of all labels, or the embedding, whose length is 1."""
    labels: Tensor | None = None
    """UTF-8 JSON: a list of the n labels. Only for the task classify."""
    num_prompt_tokens: Count = 0
    timings: Tensor | None = None
    """UTF-8 JSON: the stage timings."""
    num_image_tokens: Count = 0
    """The tokens of the prompt that stand for images."""


LlmToGateway = Failed | Alone | Pooled | LlmLoad | Adapters | AdapterChanged

# What each service handles, whichever peer sends it.

GatewayInbound = PreprocessToGateway | DetokenizerToGateway | LlmToGateway
PreprocessInbound = GatewayToPreprocess | VisionToPreprocess | LlmToPreprocess
VisionInbound = PreprocessToVision
LlmInbound = PreprocessToLlm | VisionToLlm | DetokenizerToLlm | GatewayToLlm | AdapterPrepared
RankInbound = RankZeroToLlm
DetokenizerInbound = LlmToDetokenizer | GatewayToDetokenizer

# What each service sends, whichever peer receives it.

GatewayOutbound = GatewayToPreprocess | GatewayToLlm | GatewayToDetokenizer
PreprocessOutbound = PreprocessToGateway | PreprocessToVision | PreprocessToLlm
VisionOutbound = VisionToPreprocess | VisionToLlm
LlmOutbound = LlmToPreprocess | LlmToDetokenizer | LlmToGateway | LlmToLlm
DetokenizerOutbound = DetokenizerToGateway | DetokenizerToLlm

HOPS: dict[tuple[str, str], Any] = {
    ("gateway", "preprocess"): FromConnector | GatewayToPreprocess,
    ("preprocess", "gateway"): FromInbox | PreprocessToGateway,
    ("gateway", "llm"): FromConnector | GatewayToLlm,
    ("llm", "gateway"): FromInbox | LlmToGateway,
    ("gateway", "detokenizer"): FromConnector | GatewayToDetokenizer,
    ("detokenizer", "gateway"): FromInbox | DetokenizerToGateway,
    ("preprocess", "vision"): FromConnector | PreprocessToVision,
    ("vision", "preprocess"): FromInbox | VisionToPreprocess,
    ("preprocess", "llm"): FromConnector | PreprocessToLlm,
    ("llm", "preprocess"): FromInbox | LlmToPreprocess,
    ("vision", "llm"): FromConnector | VisionToLlm,
    ("llm", "vision"): FromInbox,
    ("llm", "llm"): FromInbox | LlmToLlm,
    ("llm", "detokenizer"): FromConnector | LlmToDetokenizer,
    ("detokenizer", "llm"): FromInbox | DetokenizerToLlm,
}
"""The union that a connection decodes, by (sender's role, receiver's role)."""
