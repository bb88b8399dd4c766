"""The backends of attention over the paged KV cache of a CUDA card, and the choice among them.

None of them ran on a card yet: none was at hand when this was written.
"""

from services.llm.attention_backends.by_flashinfer import ByFlashInfer
from services.llm.attention_backends.by_triton import ByTriton
from services.llm.attention_backends.by_varlen import ByVarlen
from services.llm.attention_backends.protocol import PagedBackend

BACKENDS: dict[str, type[PagedBackend]] = {
    kind.name: kind for kind in (ByTriton, ByVarlen, ByFlashInfer)
}
"""All backends by their names. Among equally fast ones the first is chosen."""
