"""What vLLM and SGLang call our metrics, so that dashboards and autoscalers made for them work.

No name is served by two roles. So a sum over everything that is scraped counts nothing twice.
"""

from common.metrics import Alias, StageMetrics
from common.settings import ServedModelSettings

GATEWAY = "twinlens_gateway_"
LLM = "twinlens_llm_"
VISION = "twinlens_vision_"
HITS = ("cached", "joined")
"""The outcomes of items whose embeddings need no computation of their own."""
DELIVERED = ("encoded", *HITS)
KIND = {"kind": "modality"}
CACHED = {"source": ("cached",)}


def stage_alias(name: str, stage: str) -> Alias:
    """Return an alias of the time that requests spend in one stage."""
    return Alias(name, f"{GATEWAY}stage_seconds", only={"stage": (stage,)})


VLLM = (
    Alias("vllm:num_requests_running", f"{GATEWAY}requests_running"),
    Alias("vllm:num_requests_waiting", f"{GATEWAY}requests_waiting"),
    Alias(
        "vllm:num_requests_waiting_by_reason",
        f"{GATEWAY}requests_waiting",
        fixed={"reason": "capacity"},
    ),
    Alias("vllm:kv_cache_usage_perc", f"{GATEWAY}llm_kv_cache_usage_ratio"),
    Alias("vllm:time_to_first_token_seconds", f"{GATEWAY}time_to_first_token_seconds"),
    Alias("vllm:inter_token_latency_seconds", f"{GATEWAY}inter_token_latency_seconds"),
    Alias("vllm:request_time_per_output_token_seconds", f"{GATEWAY}time_per_output_token_seconds"),
    Alias("vllm:e2e_request_latency_seconds", f"{GATEWAY}request_seconds"),
    stage_alias("vllm:request_queue_time_seconds", "llm_queue"),
    stage_alias("vllm:request_prefill_time_seconds", "llm_prefill"),
    stage_alias("vllm:request_decode_time_seconds", "llm_decode"),
    Alias("vllm:prompt_tokens", f"{GATEWAY}prompt_tokens"),
    Alias("vllm:prompt_tokens_cached", f"{GATEWAY}prompt_tokens", only=CACHED),
    Alias(
        "vllm:prompt_tokens_by_source",
        f"{GATEWAY}prompt_tokens",
        labels={"source": "source"},
        values={"computed": "local_compute", "cached": "local_cache_hit"},
    ),
    Alias("vllm:prefix_cache_queries", f"{GATEWAY}prompt_tokens"),
    Alias("vllm:prefix_cache_hits", f"{GATEWAY}prompt_tokens", only=CACHED),
    Alias("vllm:mm_cache_queries", f"{GATEWAY}items"),
    Alias("vllm:mm_cache_hits", f"{GATEWAY}items", only=CACHED),
    Alias("vllm:generation_tokens", f"{GATEWAY}generation_tokens"),
    Alias("vllm:request_prompt_tokens", f"{GATEWAY}request_prompt_tokens"),
    Alias("vllm:request_generation_tokens", f"{GATEWAY}request_generation_tokens"),
    # The most of a request's answers. Each request has one answer here.
    Alias("vllm:request_max_num_generation_tokens", f"{GATEWAY}request_generation_tokens"),
    Alias(
        "vllm:request_success",
        f"{GATEWAY}requests",
        labels={"outcome": "finished_reason"},
        values={
            "stop": "stop",
            "length": "length",
            "repetition": "repetition",
            "tool_calls": "stop",
            "pooled": "stop",
            "aborted": "abort",
        },
        other="error",
    ),
    Alias("vllm:admission_rejections", f"{GATEWAY}rejections", labels={"reason": "reason"}),
    Alias("vllm:num_preemptions", f"{LLM}preemptions"),
    Alias("vllm:iteration_tokens_total", f"{LLM}step_tokens"),
    Alias(
        "vllm:lora_requests_info",
        f"{LLM}adapters_in_use",
        labels={
            "running": "running_lora_adapters",
            "waiting": "waiting_lora_adapters",
            "most": "max_lora",
        },
    ),
)
SGLANG = (
    Alias("sglang:encoder_requests_received", f"{VISION}offers", labels=KIND),
    Alias("sglang:encoder_requests_in_flight", f"{VISION}items_in_flight"),
    Alias(
        "sglang:encoder_requests",
        f"{VISION}items",
        labels={**KIND, "outcome": "status"},
        values={
            "encoded": "success",
            "cached": "success",
            "joined": "success",
            "failed": "error",
        },
    ),
    Alias("sglang:encoder_request_e2e_latency_seconds", f"{VISION}item_seconds", labels=KIND),
    Alias("sglang:encoder_queue_wait_seconds", f"{VISION}wait_seconds", labels=KIND),
    Alias("sglang:encoder_model_forward_seconds", f"{VISION}encode_seconds", labels=KIND),
    Alias("sglang:encoder_preprocess_seconds", "twinlens_preprocess_item_seconds", labels=KIND),
    Alias("sglang:encoder_cache_entries", f"{VISION}cache_entries"),
    Alias("sglang:encoder_cache_size_mb", f"{VISION}cache_bytes", scale=2**-20),
    Alias("sglang:encoder_cache_evictions", f"{VISION}cache_evictions"),
    Alias(
        "sglang:encoder_cache_total_files",
        f"{VISION}items",
        labels=KIND,
        only={"outcome": DELIVERED},
    ),
    Alias(
        "sglang:encoder_cache_hit_files",
        f"{VISION}items",
        labels=KIND,
        only={"outcome": HITS},
    ),
    Alias("sglang:encoder_cache_total_tokens", f"{VISION}item_tokens", labels=KIND),
    Alias(
        "sglang:encoder_cache_hit_tokens",
        f"{VISION}item_tokens",
        labels=KIND,
        only={"outcome": HITS},
    ),
)
ALIASES = (*VLLM, *SGLANG)


def serve_aliases(metrics: StageMetrics, settings: ServedModelSettings, engine: str = "0") -> None:
    """Serve the metrics of a stage under their aliases as well, unless the settings forbid it.

    `engine` is vLLM's label of an engine.
    """
    if settings.metric_aliases:
        labels = {"model_name": settings.served_model_name}
        metrics.serve_aliases(SGLANG, labels)
        metrics.serve_aliases(VLLM, labels | {"engine": engine})
