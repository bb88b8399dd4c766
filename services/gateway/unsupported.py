"""Fields of OpenAI's clients, and of similar servers' clients, that are not supported here.

Each of these fields would change the answer, so it is refused by name. A field that is named
neither here nor in `schema.py` does not change the answer. It is accepted, because clients send
many such fields.
"""

import json
from collections.abc import Mapping
from typing import Any

from services.gateway.invalid_field import InvalidField

IN_REQUEST: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "grammar": (),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "echo": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "chat_template": (),
    "documents": ([],),
    "truncate_prompt_tokens": (),
    "spaces_between_special_tokens": (True,),
    "stop_regex": (),
    "lora_path": (),
}
"""Fields of a request that are refused.

The values in the tuple, and null, are accepted, because they do not change the answer.
"""
IN_POOLING: dict[str, tuple[Any, ...]] = {
    name: IN_REQUEST[name]
    for name in (
        "chat_template",
        "documents",
        "truncate_prompt_tokens",
    )
} | {
    "add_generation_prompt": (True,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "activation": (True,),
    "mm_processor_kwargs": ({},),
    "add_special_tokens": (True,),
    "normalize": (True,),
    "softmax": (True,),
    "use_activation": (True,),
}
"""Fields of a classification or of a request for embeddings that are refused, in the same form."""
IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "function_call": (),
    "audio": (),
    "prefix": (False,),
}
"""Fields of a message, with the values that are accepted."""


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
