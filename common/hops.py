"""Who connects to whom, and how large a message of each hop may be."""

CONNECTS = frozenset(
    {
        ("gateway", "preprocess"),
        ("gateway", "llm"),
        ("gateway", "detokenizer"),
        ("preprocess", "vision"),
        ("preprocess", "llm"),
        ("vision", "llm"),
        ("llm", "llm"),
        ("llm", "detokenizer"),
    }
)
"""(role that opens a connection, role whose inbox it leads to)."""

MIB = 2**20

MAX_TENSOR_BYTES: dict[tuple[str, str], int] = {
    ("gateway", "preprocess"): 96 * MIB,
    # The files of a body of 64 MiB, its text, a schema, and the tokens of earlier attempts.
    ("preprocess", "gateway"): 16 * MIB,  # the token ids of a prompt
    ("preprocess", "vision"): 256 * MIB,  # the patches of one image
    ("preprocess", "llm"): 96 * MIB,  # five numbers of 8 bytes per token, and a grammar
    ("vision", "llm"): 384 * MIB,  # 16,384 rows of 8,192 numbers of 2 bytes, with room to spare
    ("llm", "gateway"): 16 * MIB,  # the probability and the text of each label
    ("llm", "llm"): 512 * MIB,  # the embeddings of all items that fall into one step
    ("llm", "detokenizer"): 16 * MIB,  # the tokens of earlier attempts
    ("detokenizer", "gateway"): 64 * MIB,  # text and logprobs of an answer that waited
}
"""The most that all tensors of one message may have, by (sender's role, receiver's role).

The messages of the other hops have no tensors.
"""


def max_tensor_bytes(sender: str, receiver: str) -> int:
    return MAX_TENSOR_BYTES.get((sender, receiver), 0)
