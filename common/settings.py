"""The settings of every command.

They are in one place because each service must know which TWINLENS_* variables belong to others.
"""

from dataclasses import dataclass
from pathlib import Path

from common.config import Range, names_of, setting
from common.image_formats import IMAGE_FORMATS, objection_to_image_formats
from common.messages import MAX_ADAPTERS, MAX_FPS, MAX_FRAMES, MIN_FPS
from common.setting_checks import (
    objection_to_address,
    objection_to_http_url,
    objection_to_name,
    objection_to_origins,
    objection_to_text,
)

EMBEDDED_MODEL = Path(__file__).resolve().parents[1] / "models" / "tiny-ocr"
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda", "npu")
ATTENTIONS = ("auto", "triton", "varlen", "flashinfer", "gather")
MAX_REPLICAS = 256
MAX_RANKS = 1024

PORTS = Range(1, 65535)
OPTIONAL_PORTS = Range(0, 65535)
PROCESS_IDS = Range(0, 2**31 - 1)
SECONDS = Range(0.0, 30 * 86400.0)
TIMEOUTS = Range(0.001, SECONDS.most)
TOKENS = Range(1, 2**30)
PIXELS = Range(1, 2**31 - 1)
MEBIBYTES = Range(1, 2**24)
BYTES = Range(1, 2**50)
REPLICAS = Range(1, MAX_REPLICAS)
COUNTS = Range(1, 2**20)


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """The setting for traces of requests."""

    otlp_traces_endpoint: str = setting(
        "",
        "OTLP/gRPC endpoint to which traces are exported, such as http://collector:4317 (default: "
        "that of the OTEL_EXPORTER_OTLP_* variables, or none)",
        objection=objection_to_http_url,
    )


@dataclass(frozen=True, kw_only=True)
class ServiceSettings(TraceSettings):
    """The settings of every service."""

    controller: str = setting(
        "127.0.0.1:50050",
        "gRPC address of the controller (HOST:PORT, or unix:PATH)",
        objection=objection_to_address,
    )
    listen: str = setting(
        "tcp://127.0.0.1:*",
        "ZeroMQ address of this service's inbox (tcp://HOST:PORT, PORT may be *, or ipc://PATH)",
        objection=objection_to_address,
    )
    advertise: str = setting(
        "",
        "host under which others reach the inbox (default: the host of --listen, or the address "
        "towards the controller if that is every interface)",
        objection=objection_to_text,
    )
    name: str = setting(
        "",
        "name of this member, to which each start adds a random suffix (default: the role)",
        objection=objection_to_name,
    )
    log_format: str = setting(
        "auto", "auto: readable on a terminal, JSON otherwise", choices=("auto", "console", "json")
    )
    log_level: str = setting(
        "info", "lowest level that is logged", choices=("debug", "info", "warning", "error")
    )
    health_port: int = setting(
        0,
        "port of /healthz, /readyz and /metrics on every interface; 0 for none",
        range=OPTIONAL_PORTS,
    )
    die_with_parent: int = setting(0, "pid of the launcher", hidden=True, range=PROCESS_IDS)


@dataclass(frozen=True, kw_only=True)
class AliasSettings:
    """The setting for the names of metrics."""

    metric_aliases: bool = setting(
        True,
        "serve metrics under the names of vLLM and SGLang as well, for dashboards and autoscalers "
        "made for them",
    )


@dataclass(frozen=True, kw_only=True)
class ServedModelSettings(AliasSettings):
    """The settings of the services that name the served model."""

    served_model_name: str = setting(
        EMBEDDED_MODEL.name,
        "name of the model for clients, and the model_name of metrics under other systems' names",
        objection=objection_to_text,
    )


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The settings of the services that read the model directory."""

    model: str = setting(str(EMBEDDED_MODEL), "model directory in Hugging Face layout")


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """The settings of the services that compute on a device."""

    dtype: str = setting(
        "auto", "auto: the dtype of the checkpoint, if the device computes it well", choices=DTYPES
    )
    device: str = setting("auto", "auto: an accelerator if there is one", choices=DEVICES)
    threads: int | None = setting(
        None,
        "CPU threads of each computing process (default: half of the cores, or all if there are at "
        "most 4, divided among the ranks)",
        range=Range(1, 4096),
    )


@dataclass(frozen=True, kw_only=True)
class SizeSettings:
    """The limits of the sizes of images. Preprocess keeps to them, and vision refuses others."""

    min_pixels: int | None = setting(
        None,
        "smallest size that an image is resized to, in pixels (default: the checkpoint's)",
        range=PIXELS,
    )
    max_pixels: int | None = setting(
        None,
        "largest size that an image is resized to, in pixels (default: the checkpoint's)",
        range=PIXELS,
    )


@dataclass(frozen=True, kw_only=True)
class PixelSettings(SizeSettings):
    """The settings for the sizes of images."""

    oversized_images: str = setting(
        "resize",
        "what happens to images that are too large for the buckets of every vision replica",
        choices=("resize", "refuse"),
    )


@dataclass(frozen=True, kw_only=True)
class FormatSettings:
    """The setting for the formats of images."""

    image_formats: str = setting(
        "",
        f"formats in which images are read, separated by commas (default: {','.join(IMAGE_FORMATS)}"
        ", or those of them that the installed Pillow reads)",
        objection=objection_to_image_formats,
    )


@dataclass(frozen=True, kw_only=True)
class DefaultsSettings:
    """The setting for what requests leave open."""

    known_as: str = setting(
        "",
        "published name of the model, such as RolmOCR, by which its own prompt, temperature and "
        "length of answers are found (default: the names of its folder and in config.json)",
        objection=objection_to_text,
    )


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """The settings for the frames of videos."""

    video_fps: float = setting(
        2.0,
        "frames that are taken from a second of a video file, if the request does not say",
        range=Range(MIN_FPS, MAX_FPS),
    )
    max_frames: int = setting(
        128,
        "most frames of a video; a longer file is sampled evenly, and a longer list of frames is "
        "refused",
        range=Range(2, MAX_FRAMES),
    )


@dataclass(frozen=True, kw_only=True)
class ContextSettings:
    """The setting for the length of requests."""

    max_model_len: int | None = setting(
        None,
        "length of the context in tokens, prompt and answer together (default: the checkpoint's)",
        range=TOKENS,
    )


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """The settings of the APIs for clients."""

    host: str = setting(
        "127.0.0.1", "address on which HTTP and gRPC listen", objection=objection_to_text
    )
    http_port: int = setting(8000, "port of the OpenAI HTTP API", range=PORTS)
    grpc_port: int = setting(50051, "port of the gRPC API", range=PORTS)
    max_waiting: int = setting(
        256,
        "admitted requests that may wait for their first token; more are refused (429)",
        range=COUNTS,
    )
    request_timeout: float = setting(
        600.0, "seconds until the deadline of a request that sets none", range=TIMEOUTS
    )
    max_body_mib: int = setting(64, "largest request body in MiB", range=Range(1, 2047))
    max_held_body_mib: int = setting(
        256,
        "bodies in MiB that are held at a time for requests which are not admitted yet; one client "
        "gets at most half, and room for two of the largest bodies is always kept",
        range=MEBIBYTES,
    )
    max_connections: int = setting(
        4096,
        "HTTP connections, of which one client gets at most half; never over half of the "
        "process's descriptors",
        range=COUNTS,
    )
    max_connections_per_client: int | None = setting(
        None,
        "HTTP connections of one client, if that is to be fewer (default: half of all)",
        range=COUNTS,
    )
    record: str = setting(
        "",
        "file to which admitted requests and their answers are written, for `twinlens replay`; it "
        "holds what users sent",
    )
    record_mib: int = setting(1024, "largest size of the file of --record, in MiB", range=MEBIBYTES)
    ui: bool = setting(True, "serve the web page at /ui")
    cors_origins: str = setting(
        "",
        "origins of web pages that may use the API, separated by commas, or * for all (always "
        "allowed: http and https pages on localhost, 127.0.0.1 and [::1])",
        objection=objection_to_origins,
    )


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """The settings of a language group."""

    max_num_seqs: int = setting(64, "most requests in one step", range=COUNTS)
    max_num_batched_tokens: int = setting(
        1024, "most tokens in one step, prompt chunks and decodes together", range=COUNTS
    )
    block_size: int | None = setting(
        None,
        "tokens in one block of the KV cache (default: 16; on CUDA 64, or 256 if varlen attends)",
        range=COUNTS,
    )
    attention: str = setting(
        "auto",
        "what attends to the KV cache on CUDA; auto: the fastest of triton, varlen and flashinfer, "
        "measured at start; gather: none of them, and no graphs",
        choices=ATTENTIONS,
    )
    kv_memory: int | None = setting(
        None,
        "size of the KV cache in bytes (default: a fifth of the available memory on CPU, four "
        "fifths minus the weights on CUDA)",
        range=BYTES,
    )
    tp: int = setting(1, "tensor-parallel ranks of a language group", range=Range(1, MAX_RANKS))
    quantization: str = setting(
        "auto",
        "weights in the layers of the language model. auto: as the checkpoint has them, quantized "
        "or not; none: never quantized; int8: rounded to 8 bits, on CPU in bfloat16 only",
        choices=("auto", "none", "int8"),
    )
    embeddings: str = setting(
        "",
        "file with the token embeddings in float16, as `twinlens extract-embeddings` writes it, or "
        "its folder (default: the embeddings of the model directory)",
    )


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The settings for LoRA adapters of a language group."""

    lora: str = setting(
        "",
        "NAME=DIR of a LoRA adapter (PEFT layout) that requests choose by `model`; several are "
        "separated by commas, or the flag is repeated",
        repeats=True,
    )
    lora_root: str = setting(
        "",
        "folder on the hosts of the language groups from which adapters may be loaded at run time "
        "(default: none are loaded at run time)",
    )
    max_loras: int = setting(
        8, "most LoRA adapters of a language group", range=Range(1, MAX_ADAPTERS)
    )
    max_lora_rank: int = setting(64, "largest rank of a LoRA adapter", range=Range(1, 1024))


# The fields of a dataclass's last base come first, also in --help.


@dataclass(frozen=True, kw_only=True)
class ControllerSettings(ServiceSettings):
    control_listen: str = setting(
        "127.0.0.1:50050",
        "gRPC address on which the controller listens (HOST:PORT, or unix:PATH)",
        objection=objection_to_address,
    )
    launcher_key: str = setting(
        "", "what a launcher must know to join", hidden=True, objection=objection_to_text
    )


@dataclass(frozen=True, kw_only=True)
class GatewaySettings(ServiceSettings, ServedModelSettings, ApiSettings):
    drain_delay: float = setting(
        5.0,
        "seconds between SIGTERM, after which the gateway is not ready, and the closing of its "
        "ports",
        range=SECONDS,
    )


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings(
    ServiceSettings,
    ServedModelSettings,
    ContextSettings,
    VideoSettings,
    FormatSettings,
    PixelSettings,
    DefaultsSettings,
    ModelSettings,
):
    sandboxes: int = setting(
        0,
        "images or prompts that cost much and are opened at the same time, each in an expendable "
        "process of up to 512 MiB (default: one per core)",
        range=Range(0, 1024),
    )


@dataclass(frozen=True, kw_only=True)
class VisionSettings(
    ServiceSettings, ServedModelSettings, SizeSettings, DeviceSettings, ModelSettings
):
    embedding_cache_mib: int = setting(
        256,
        "size of the cache of image embeddings, in MiB; 0 for none",
        range=Range(0, MEBIBYTES.most),
    )
    vision_buckets: str = setting(
        "",
        "numbers of patches that a static-shape tower pads images to, such as 1024,2048,5120 "
        "(default: images are not padded)",
    )
    vision_artefact: str = setting(
        "",
        "folder that `twinlens compile` wrote: the tower, its buckets and all else that the "
        "service needs of the model (default: the tower of --model)",
    )
    standby: bool = setting(False, "take no work until SIGUSR1 arrives", hidden=True)
    simulate_vision_ms: float | None = setting(
        None,
        "simulate the tower: each image takes this many milliseconds and yields noise, for tests "
        "and measurements",
        range=Range(0.0, 1000 * SECONDS.most),
    )


@dataclass(frozen=True, kw_only=True)
class LlmSettings(
    ServiceSettings,
    ServedModelSettings,
    LoraSettings,
    BatchSettings,
    ContextSettings,
    DeviceSettings,
    ModelSettings,
):
    group: str = setting(
        "llm",
        "name of the tensor-parallel group, which all its ranks share",
        objection=objection_to_name,
    )
    rank: int = setting(0, "rank of this process in its group", range=Range(0, MAX_RANKS - 1))
    local_groups: int = setting(
        1, "language groups that share the memory of this host", range=Range(1, MAX_REPLICAS)
    )
    rendezvous: str = setting(
        "",
        "tcp://HOST:PORT of rank 0, where ranks meet that are started one by one (default: rank 0 "
        "starts the others on its host)",
        objection=objection_to_text,
    )
    ordinal: str = setting(
        "",
        "a number, or a name that ends in a number, from which --group and --rank are computed; "
        "{leader} in --rendezvous stands for the ordinal of the group's rank 0",
        objection=objection_to_text,
    )


@dataclass(frozen=True, kw_only=True)
class DetokenizerSettings(ServiceSettings, ModelSettings):
    pass


@dataclass(frozen=True, kw_only=True)
class ServeSettings(
    AliasSettings,
    LoraSettings,
    BatchSettings,
    ContextSettings,
    VideoSettings,
    FormatSettings,
    PixelSettings,
    DefaultsSettings,
    DeviceSettings,
    ApiSettings,
    ModelSettings,
    TraceSettings,
):
    """The settings of the local launcher: its own, and those that it passes to services."""

    served_model_name: str = setting(
        "",
        "name of the model for clients (default: the name of its folder)",
        objection=objection_to_text,
    )
    vision: int = setting(1, "number of vision replicas", range=REPLICAS)
    vision_standby: int = setting(
        0,
        "number of further vision replicas, loaded and idle, that take over at once when a replica "
        "is added or dies",
        range=Range(0, MAX_REPLICAS),
    )
    autoscale: str = setting(
        "", "vision=LEAST:MOST: scale the vision replicas with the expected wait of images"
    )
    preprocess: int = setting(1, "number of preprocess replicas", range=REPLICAS)
    detokenizer: int = setting(1, "number of detokenizer replicas", range=REPLICAS)
    embedding_cache_mib: int = setting(
        256,
        "size of each vision replica's cache of image embeddings, in MiB; 0 for none",
        range=Range(0, MEBIBYTES.most),
    )
    vision_buckets: str = setting(
        "",
        "numbers of patches that static-shape vision replicas pad images to, such as "
        "1024,2048,5120 (default: images are not padded)",
    )
    vision_artefact: str = setting(
        "",
        "folder that `twinlens compile` wrote, from which the vision replicas start (default: the "
        "tower of --model)",
    )
    simulate_vision_ms: float | None = setting(
        None,
        "simulate the vision towers: each image takes this many milliseconds and yields noise",
        range=Range(0.0, 1000 * SECONDS.most),
    )
    llm: int = setting(1, "number of language groups, each with --tp ranks", range=REPLICAS)
    read: str = setting(
        "", "image to read once the system is ready: print its text and the time of each stage"
    )
    log_format: str = setting(
        "auto", "auto: readable on a terminal, JSON otherwise", choices=("auto", "console", "json")
    )
    log_level: str = setting(
        "info", "lowest level that is logged", choices=("debug", "info", "warning", "error")
    )


@dataclass(frozen=True, kw_only=True)
class ExtractSettings(ModelSettings):
    """The settings of `twinlens extract-embeddings`."""

    out: str = setting("", "folder to write to (default: the model directory)")


@dataclass(frozen=True, kw_only=True)
class ShardSettings(ModelSettings):
    """The settings of `twinlens shard`."""

    tp: int = setting(2, "number of ranks, each of which gets a file", range=Range(1, 8))
    out: str = setting("", "new folder for the model directory with the cut weights")


@dataclass(frozen=True, kw_only=True)
class PlanSettings(ModelSettings):
    """The settings of `twinlens plan`."""

    dtype: str = setting("auto", "auto: the dtype of the checkpoint", choices=DTYPES)
    max_model_len: int | None = setting(
        None,
        "length of the context in tokens, prompt and answer together (default: the checkpoint's)",
        range=TOKENS,
    )
    card_gib: float = setting(
        0.0,
        "memory of one card in GiB, to show how many tokens its KV cache holds",
        range=Range(0.0, 2.0**20),
    )
    image: str = setting(
        "",
        "a typical image, with which the stages of the system at --grpc are measured",
    )
    grpc: str = setting(
        "127.0.0.1:50051",
        "gRPC address of a running system that is otherwise idle",
        objection=objection_to_text,
    )
    max_tokens: int = setting(128, "length of each measured answer in tokens", range=TOKENS)
    concurrency: int = setting(16, "number of concurrent measured requests", range=Range(1, 1024))
    images_per_request: float = setting(
        1.0, "average number of images in a request", range=Range(0.001, 1000.0)
    )
    vision_seconds: float = setting(
        0.0,
        "seconds that an image takes in a vision replica, instead of measuring it",
        range=SECONDS,
    )
    group_rate: float = setting(
        0.0,
        "requests that a language group answers per second, instead of measuring it",
        range=Range(0.0, 1e6),
    )


@dataclass(frozen=True, kw_only=True)
class CompileSettings(ModelSettings):
    """The settings of `twinlens compile`."""

    buckets: str = setting(
        "", "numbers of patches to compile the vision tower for, such as 1024,5120"
    )
    out: str = setting("", "new folder for the artefact")
    dtype: str = setting("auto", "auto: the dtype of the checkpoint", choices=DTYPES)
    column_chunks: bool = setting(
        False, "let the embeddings leave the tower in parts of at most 640 columns"
    )


SERVICES = {
    "controller": ControllerSettings,
    "gateway": GatewaySettings,
    "preprocess": PreprocessSettings,
    "vision": VisionSettings,
    "llm": LlmSettings,
    "detokenizer": DetokenizerSettings,
}
COMMANDS = {
    "serve": ServeSettings,
    "plan": PlanSettings,
    "compile": CompileSettings,
    "extract-embeddings": ExtractSettings,
    "shard": ShardSettings,
}
"""The commands whose flags are settings."""
SCALABLE_ROLES = ("vision", "preprocess", "llm", "detokenizer")
CLIENT_NAMES = {"grpc"}
KNOWN_NAMES = set().union(CLIENT_NAMES, *map(names_of, [*SERVICES.values(), *COMMANDS.values()]))
