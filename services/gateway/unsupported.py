"""Fields of OpenAI's clients, and of similar servers' clients, that `schema.py` does not declare.

One that would change the answer is obeyed, if it means exactly a field of ours, or else refused by
name. One that says nothing about the answer is accepted. A field that is named nowhere here is
accepted, too, because clients send many fields of their own. Objects inside a request are stricter:
a key that is not known there is refused. `docs/api.md` lists all fields.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from services.gateway.invalid_field import InvalidField, lower_first
from services.gateway.pixel_bounds import ABOUT_CACHES

ALIASES = {
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_sequences": "stop",
    "random_seed": "seed",
}
"""Other names of our fields, which mean exactly the same."""
NO_LIMIT = {"n_predict": (-1, -2), "num_predict": (-1, -2)}
"""The values with which llama.cpp's and Ollama's names set no limit."""

OPENAI: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "truncation": ("disabled", False),
    "truncation_strategy": (),
}
VLLM: dict[str, tuple[Any, ...]] = {
    "logits_processors": ([],),
    "echo": (False,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "length_penalty": (1,),
    "chat_template": (),
    "documents": ([],),
    "truncate_prompt_tokens": (),
    "spaces_between_special_tokens": (True,),
    "add_special_tokens": (False,),
    "media_io_kwargs": ({},),
    "logprob_token_ids": ([],),
    "prompt_logprob_token_ids": ([],),
    "return_token_offsets": (False,),
    "return_prompt_text": (False,),
    "return_mm_kwargs": (False,),
    "mm_payload": ({},),
    "routed_experts_prompt_start": (0,),
    "thinking_token_budget": (),
    "watermarking": (False,),
    "cache_salt": (),
    "detokenize": (True,),
    "flat_logprobs": (False,),
    "structural_tag": (),
    "guided_decoding_disable_additional_properties": (False,),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "extra_args": ({},),
}
SGLANG: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "stop_regex": ([],),
    "no_stop_trim": (False,),
    "lora_path": (),
    "custom_logit_processor": (),
    "custom_params": ({},),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "return_logprob": (False,),
    "return_text_in_logprobs": (False,),
    "top_logprobs_num": (0,),
    "sampling_params": ({},),
    "session_params": ({},),
    "input_ids": ([],),
    "input_embeds": ([],),
    "image_data": ([],),
}
LLAMA_CPP: dict[str, tuple[Any, ...]] = {
    "repeat_penalty": (1,),
    "repeat_last_n": (0,),
    "penalize_nl": (False,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "dynatemp_range": (0,),
    "tfs_z": (1,),
    "typ_p": (1,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "top_n_sigma": (-1, 0),
    "adaptive_target": (-1,),
    "min_keep": (0,),
    "n_keep": (0,),
    "n_indent": (0,),
    "n_probs": (0,),
    "post_sampling_probs": (False,),
    "t_max_predict_ms": (0, -1),
    "samplers": (),
    "response_fields": ([],),
    "return_tokens": (False,),
    "lora": ([],),
    "grammar_lazy": (False,),
    "grammar_triggers": ([],),
    "thinking_budget_tokens": (-1, 0),
    "input_prefix": ("",),
    "input_suffix": ("",),
}
HUGGING_FACE: dict[str, tuple[Any, ...]] = {
    "do_sample": (True,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "diversity_penalty": (0,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "negative_prompt": ("",),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "max_length": (),
    "min_length": (0,),
    "max_time": (),
    "truncate": (),
    "watermark": (False,),
    "top_n_tokens": (0,),
    "decoder_input_details": (False,),
    "return_full_text": (False,),
    "adapter_id": (),
    "tool_prompt": ("",),
    "parameters": ({},),
}
OLLAMA: dict[str, tuple[Any, ...]] = {
    "options": ({},),
    "format": ("",),
    "think": (False,),
    "raw": (False,),
    "template": ("",),
    "system": ("",),
    "images": ([],),
    "context": ([],),
    "num_ctx": (),
}
LMDEPLOY: dict[str, tuple[Any, ...]] = {
    "adapter_name": (),
    "enable_thinking": (False,),
    "do_preprocess": (True,),
    "return_ppl": (False,),
    "migration_request": (),
}
TENSORRT_LLM: dict[str, tuple[Any, ...]] = {
    "beam_width": (1,),
    "beam_search_diversity_rate": (0,),
    "top_p_min": (0,),
    "top_p_decay": (1,),
    "top_p_reset_ids": (),
    "end_id": (),
    "stop_words": ([],),
    "embedding_bias": (),
    "prompt_ignore_length": (0,),
    "return_context_logits": (False,),
    "return_generation_logits": (False,),
    "lookahead_config": (),
}
HOSTED: dict[str, tuple[Any, ...]] = {
    "safe_prompt": (False,),
    "safe_mode": (False,),
    "prompt_mode": (),
    "context_length_exceeded_behavior": ("error", "none"),
    "prompt_truncate_len": (),
    "prompt_truncate_length": (),
    "safety_model": (),
    "raw_output": (False,),
    "echo_last": (0,),
    "top_a": (0,),
    "transforms": ([],),
    "plugins": ([],),
    "reasoning": ({"effort": "none"}, {"enabled": False}),
    "thinking": ({"type": "disabled"},),
    "preset": (),
    "search_parameters": (),
}
"""Those of Mistral, Fireworks, Together, DeepInfra, OpenRouter and xAI."""
LOCAL_PAGES: dict[str, tuple[Any, ...]] = {
    "smoothing_factor": (0,),
    "temperature_last": (False,),
    "dynamic_temperature": (False,),
    "dynatemp_low": (),
    "dynatemp_high": (),
    "nsigma": (0,),
    "tfs": (1,),
    "repetition_penalty_range": (0,),
    "rep_pen": (1,),
    "rep_pen_range": (0,),
    "sampler_priority": (),
    "sampler_order": (),
    "ban_eos_token": (False,),
    "custom_token_bans": ("", []),
    "banned_strings": ([],),
    "banned_tokens": ([],),
    "add_bos_token": (True,),
    "truncation_length": (),
    "grammar_string": ("",),
    "auto_max_new_tokens": (False,),
    "max_tokens_second": (0,),
}
"""Those of text-generation-webui, KoboldCpp, TabbyAPI and Aphrodite."""

IN_REQUEST: dict[str, tuple[Any, ...]] = (
    OPENAI
    | VLLM
    | SGLANG
    | LLAMA_CPP
    | HUGGING_FACE
    | OLLAMA
    | LMDEPLOY
    | TENSORRT_LLM
    | HOSTED
    | LOCAL_PAGES
)
"""Fields of a request that are refused.

The values in the tuple, and null, are accepted, because they do not change the answer.
"""
HARMLESS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "request_id",
    "rid",
    "session_id",
    "stream_interval",
    "include_reasoning",
    "separate_reasoning",
    "stream_reasoning",
    "truncation_side",
    "guided_decoding_backend",
    "skip_reading_prefix_cache",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "data_parallel_rank",
    "disaggregated_params",
    "cache_prompt",
    "id_slot",
    "timings_per_token",
    "reasoning_format",
    "mirostat_tau",
    "mirostat_eta",
    "dynatemp_exponent",
    "xtc_threshold",
    "dry_base",
    "dry_allowed_length",
    "dry_penalty_last_n",
    "dry_sequence_breakers",
    "keep_alive",
    "details",
    "pad_id",
    "provider",
    "route",
    "models",
    "usage",
    "perf_metrics_in_response",
)
"""Fields that say nothing about the answer, or something only with one that is refused."""

IN_POOLING: dict[str, tuple[Any, ...]] = {
    name: IN_REQUEST[name]
    for name in (
        "chat_template",
        "documents",
        "truncate_prompt_tokens",
        "truncation",
        "truncate",
        "media_io_kwargs",
        "lora_path",
        "adapter_id",
        "options",
        "cache_salt",
        "context_length_exceeded_behavior",
    )
} | {
    "add_generation_prompt": (True,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "activation": (True,),
    "add_special_tokens": (True,),
    "normalize": (True,),
    "softmax": (True,),
    "use_activation": (True,),
    "tools": ([],),
    "input_type": (),
    "task": (),
    "prompt_name": (),
    "instruction": ("",),
    "pooling_task": (),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
}
"""Fields of a classification or of a request for embeddings that are refused, in the same form."""
IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "function_call": (),
    "audio": (),
    "prefix": (False,),
    "partial": (False,),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "reasoning_details": ([],),
    "images": ([],),
    "weight": (1,),
}
"""Fields of a message, with the values that are accepted."""
NEUTRAL_IN_MESSAGE = (*ABOUT_CACHES, "name", "id", "refusal", "annotations", "twinlens")
"""Keys of a message that ask for nothing. Clients send answers back with all that they hold."""


def refuse_unsupported(
    given: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]], path: str = ""
) -> None:
    """Raise InvalidField if a field is not supported and its value is not one of those accepted.

    `path` is put before the field's name in the error.
    """
    for name in unsupported.keys() & given.keys():
        accepted = unsupported[name]
        if given[name] is None or given[name] in accepted:
            continue
        if accepted:
            problem = f"this value is not supported; send {json.dumps(accepted[0])} or leave it out"
        else:
            problem = "this field is not supported; leave it out"
        raise InvalidField(path + name, problem)


def refuse_extra(part: BaseModel, path: str, neutral: tuple[str, ...] = ABOUT_CACHES) -> None:
    """Raise InvalidField if an object inside a request has a key that is not known.

    Those that are `neutral`, or have the value null, are accepted.
    """
    for name, value in (part.model_extra or {}).items():
        if value is not None and name not in neutral:
            known = (field.alias or one for one, field in type(part).model_fields.items())
            problem = f"this field is not supported; known are {', '.join(known)}"
            raise InvalidField(f"{path}.{name[:60]}", problem)


def obey_aliases(request: BaseModel) -> None:
    """Set the fields of a body that it names otherwise.

    Raises
    ------
    InvalidField
        if a value is wrong, or the field itself is there with another value.
    """
    extra = request.model_extra or {}
    for alias in ALIASES.keys() & extra.keys():
        value = extra[alias]
        if value is None or value in NO_LIMIT.get(alias, ()):
            continue
        field = ALIASES[alias]
        names = (field, "max_completion_tokens") if field == "max_tokens" else (field,)
        before = [(name, getattr(request, name, None)) for name in names]
        try:
            request.__pydantic_validator__.validate_assignment(request, field, value)
        except ValidationError as error:
            raise InvalidField(alias, lower_first(error.errors()[0]["msg"])) from None
        for name, other in before:
            if other not in (None, getattr(request, field)):
                raise InvalidField(alias, f"{name} has another value; send one of them")
