"""The settings of every command in one place: each service must know which TWINLENS_* variables are
another's."""

from dataclasses import dataclass
from pathlib import Path

from common.config import names_of, setting

EMBEDDED_MODEL = Path(__file__).resolve().parents[1] / "models" / "tiny-ocr"
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda", "npu")


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """What every service has."""

    controller: str = setting(
        "127.0.0.1:50050", "gRPC address of the controller (HOST:PORT, or unix:PATH)"
    )
    listen: str = setting(
        "tcp://127.0.0.1:*",
        "ZeroMQ address of this service's inbox (tcp://HOST:PORT, PORT may be *, or ipc://PATH)",
    )
    advertise: str = setting(
        "",
        "host that others reach the inbox by (default: the one it listens on; of all interfaces "
        "the one towards the controller)",
    )
    name: str = setting(
        "",
        "this member's name; its id is the name and a part drawn at each start (default: the role)",
    )
    log_format: str = setting(
        "auto", "auto: readable on a terminal, JSON otherwise", choices=("auto", "console", "json")
    )
    log_level: str = setting(
        "info", "least level that is logged", choices=("debug", "info", "warning", "error")
    )
    health_port: int = setting(
        0, "port of /healthz, /readyz and /metrics on every interface; 0: none"
    )
    die_with_parent: int = setting(0, "pid of the launcher", hidden=True)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What every service has that reads the model directory."""

    model: str = setting(str(EMBEDDED_MODEL), "model directory in Hugging Face layout")


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """What the services have that compute on a device."""

    dtype: str = setting(
        "auto", "auto: the checkpoint's where the device computes it well", choices=DTYPES
    )
    device: str = setting("auto", "auto: an accelerator where there is one", choices=DEVICES)
    threads: int | None = setting(
        None,
        "CPU threads of each computing process (default: half of the cores, all where there are at "
        "most 4; shared by the ranks)",
    )


@dataclass(frozen=True, kw_only=True)
class PixelSettings:
    min_pixels: int | None = setting(
        None, "least size that an image is resized to (default: the checkpoint's)"
    )
    max_pixels: int | None = setting(
        None, "greatest size that an image is resized to (default: the checkpoint's)"
    )
    oversized_images: str = setting(
        "resize",
        "images that are too large for every vision replica's buckets: resize or refuse",
        choices=("resize", "refuse"),
    )


@dataclass(frozen=True, kw_only=True)
class ContextSettings:
    max_model_len: int | None = setting(
        None, "tokens of context, prompt and answer together (default: the checkpoint's)"
    )


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    host: str = setting("127.0.0.1", "address that HTTP and gRPC listen on")
    http_port: int = setting(8000, "OpenAI HTTP port")
    grpc_port: int = setting(50051, "gRPC port")
    max_waiting: int = setting(
        256, "admitted requests without their first token; more are refused (429)"
    )
    request_timeout: float = setting(
        600.0, "seconds until the deadline of a request that brings none"
    )
    max_body_mib: int = setting(64, "largest request body in MiB")


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    max_num_seqs: int = setting(64, "requests that run in one step")
    max_num_batched_tokens: int = setting(
        1024, "tokens of one step, prompt chunks and decodes together"
    )
    block_size: int | None = setting(
        None,
        "tokens of one KV cache block (default: 16; on CUDA in half precision 256, of which its "
        "paged attention needs a multiple)",
    )
    kv_memory: int | None = setting(
        None,
        "bytes of KV cache (default: on CPU a fifth of the available memory, on CUDA four fifths "
        "less the weights)",
    )
    tp: int = setting(1, "tensor-parallel ranks of the language group")
    quantization: str = setting(
        "none",
        "int8: the language model's layers with weights of eight bits, on a CPU in bfloat16",
        choices=("none", "int8"),
    )


# Of a dataclass's bases the last one's fields come first, in --help, too.


@dataclass(frozen=True, kw_only=True)
class ControllerSettings(ServiceSettings):
    control_listen: str = setting(
        "127.0.0.1:50050",
        "gRPC address that the control plane listens on (HOST:PORT, or unix:PATH)",
    )


@dataclass(frozen=True, kw_only=True)
class GatewaySettings(ServiceSettings, ApiSettings):
    served_model_name: str = setting(EMBEDDED_MODEL.name, "the model's name for clients")
    drain_delay: float = setting(
        5.0,
        "seconds between SIGTERM, from which on the gateway is unready, and the closing of its "
        "ports",
    )


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings(ServiceSettings, ContextSettings, PixelSettings, ModelSettings):
    pass


@dataclass(frozen=True, kw_only=True)
class VisionSettings(ServiceSettings, DeviceSettings, ModelSettings):
    embedding_cache_mib: int = setting(
        256, "image embeddings kept for repeated images, in MiB; 0: none"
    )
    vision_buckets: str = setting(
        "",
        "a static-shape tower: the numbers of patches that it pads images to, such as "
        "1024,2048,5120 (default: none)",
    )
    standby: bool = setting(False, "takes no work until SIGUSR1 comes", hidden=True)
    simulate_vision_ms: float | None = setting(
        None,
        "no tower: each image takes so many milliseconds and gives noise, for tests and "
        "measurements",
    )


@dataclass(frozen=True, kw_only=True)
class LlmSettings(ServiceSettings, BatchSettings, ContextSettings, DeviceSettings, ModelSettings):
    group: str = setting("llm", "name of the tensor-parallel group, the same for all its ranks")
    rank: int = setting(0, "this process's rank in its group")
    local_groups: int = setting(1, "language groups on this host, which share its memory")
    rendezvous: str = setting(
        "",
        "where the group's ranks meet, each started alone: tcp://HOST:PORT of rank 0 (default: "
        "rank 0 starts them all on its host)",
    )
    ordinal: str = setting(
        "",
        "number, or name that ends in one, that gives --group and --rank; {leader} in --rendezvous "
        "is that of the group's rank 0",
    )


@dataclass(frozen=True, kw_only=True)
class DetokenizerSettings(ServiceSettings, ModelSettings):
    pass


@dataclass(frozen=True, kw_only=True)
class ServeSettings(
    BatchSettings, ContextSettings, PixelSettings, DeviceSettings, ApiSettings, ModelSettings
):
    """The local launcher's: its own, and those that it hands on."""

    served_model_name: str = setting("", "the model's name for clients (default: the folder's)")
    vision: int = setting(1, "vision encoder replicas")
    vision_standby: int = setting(
        0,
        "further vision replicas, loaded and idle, that take work at once when one is added or "
        "dies",
    )
    autoscale: str = setting(
        "", "vision=LEAST:MOST: as many vision replicas as the expected wait of images calls for"
    )
    preprocess: int = setting(1, "preprocess replicas")
    detokenizer: int = setting(1, "detokenizer replicas")
    embedding_cache_mib: int = setting(
        256, "image embeddings kept by each vision replica, in MiB; 0: none"
    )
    vision_buckets: str = setting(
        "",
        "static-shape vision replicas: the numbers of patches that they pad images to, such as "
        "1024,2048,5120",
    )
    simulate_vision_ms: float | None = setting(
        None,
        "vision replicas without a tower: each image takes so many milliseconds and gives noise",
    )
    llm: int = setting(1, "language groups, each of --tp ranks")
    read: str = setting(
        "", "once ready, read this image and print its text and what each stage took"
    )
    log_format: str = setting(
        "auto", "auto: readable on a terminal, JSON otherwise", choices=("auto", "console", "json")
    )
    log_level: str = setting(
        "info", "least level that is logged", choices=("debug", "info", "warning", "error")
    )


@dataclass(frozen=True, kw_only=True)
class PlanSettings(ModelSettings):
    dtype: str = setting("auto", "auto: the checkpoint's", choices=DTYPES)
    max_model_len: int | None = setting(
        None, "tokens of context, prompt and answer together (default: the checkpoint's)"
    )
    card_gib: float = setting(
        0.0, "memory of one card in GiB: how many tokens of KV cache it has room for"
    )
    image: str = setting(
        "",
        "an image like those that will come: measures the stages of the system at --grpc with it",
    )
    grpc: str = setting(
        "127.0.0.1:50051", "gRPC address of a running system that does nothing else meanwhile"
    )
    max_tokens: int = setting(128, "tokens of each measured answer")
    concurrency: int = setting(16, "measured requests at once")
    images_per_request: float = setting(1.0, "images that a request brings, on average")
    vision_seconds: float = setting(
        0.0, "instead of measuring: seconds of an image in a vision replica"
    )
    group_rate: float = setting(
        0.0, "instead of measuring: requests that a language group answers in a second"
    )


SERVICES = {
    "controller": ControllerSettings,
    "gateway": GatewaySettings,
    "preprocess": PreprocessSettings,
    "vision": VisionSettings,
    "llm": LlmSettings,
    "detokenizer": DetokenizerSettings,
}
SCALABLE_ROLES = ("vision", "preprocess", "llm", "detokenizer")
MAX_REPLICAS = 256
CLIENT_NAMES = {"grpc"}
KNOWN_NAMES = set().union(
    CLIENT_NAMES, *map(names_of, [*SERVICES.values(), ServeSettings, PlanSettings])
)
