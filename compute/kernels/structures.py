"""The C structures and constants that Python repeats: those of kernels.h and decoder.h.

The compiled library exports its own sizes, offsets and constants (layout.c). `library.load`
compares them with `expected_layout`, because a field that only one side has corrupts memory.
"""

from ctypes import Structure, c_char_p, c_float, c_int, c_int64, c_long, c_void_p, sizeof
from enum import IntEnum

CONTEXT_PADDING = 64
"""The workspace of `attention` holds each context rounded up to a multiple of this."""

HEAD_PADDING = 16
"""The same for the entries of a head."""

MAX_GROUP = 16
"""The greatest number of query heads that share a key head in `decode_attention`."""

MAX_HEAD_DIM = 256

MAX_LINEAR_ROWS = 64
"""The number of rows that every instruction set's product with bfloat16 weights accepts."""

MAX_PIECE_INPUTS = 128
"""The greatest number of inputs in a piece of int4 weights, which has a copy of their scales."""

OCTET = 8
"""The number of inputs of int4 weights that are packed together."""

PART_TOKENS = 512
"""The context of a decode is divided into parts of this many tokens."""


class Kind(IntEnum):
    """What the packed weights of a product are."""

    BFLOAT16 = 0
    INT8 = 1
    INT4 = 2


class WeightsStruct(Structure):
    """The weights of one product, packed for the kernels."""

    _fields_ = [
        ("packed", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("pieces", c_void_p),
        ("order", c_void_p),
        ("num_outputs", c_long),
        ("num_inputs", c_long),
        ("num_pieces", c_long),
        ("kind", c_int),
    ]


class PagedStruct(Structure):
    """One layer's KV cache, and the blocks in it that belong to each sequence."""

    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("tables", c_void_p),
        ("contexts", c_void_p),
        ("table_stride", c_long),
        ("num_heads", c_int),
        ("num_kv_heads", c_int),
        ("dim", c_int),
        ("block_size", c_int),
    ]


class LayerStruct(Structure):
    """The weights of one decoder layer."""

    _fields_ = [
        ("input_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("qkv", WeightsStruct),
        ("o", WeightsStruct),
        ("gate_up", WeightsStruct),
        ("down", WeightsStruct),
    ]


class DecoderStruct(Structure):
    """The layers, the last norm and the head of a model, or of one rank's share of it."""

    _fields_ = [
        ("layers", c_void_p),
        ("norm", c_void_p),
        ("head", WeightsStruct),
        ("num_layers", c_long),
        ("width", c_long),
        ("num_heads", c_int),
        ("num_kv_heads", c_int),
        ("dim", c_int),
        ("is_share", c_int),
        ("eps", c_float),
    ]


class StepStruct(Structure):
    """The positions and KV cache of one step in which every sequence has one new token."""

    _fields_ = [
        ("cos", c_void_p),
        ("signed_sin", c_void_p),
        ("query_scale", c_void_p),
        ("slots", c_void_p),
        ("tables", c_void_p),
        ("contexts", c_void_p),
        ("table_stride", c_long),
        ("num_seqs", c_long),
        ("cache", c_void_p),
        ("layer_stride", c_long),
        ("values_at", c_long),
        ("block_size", c_int),
        ("partials", c_void_p),
    ]


class EntryStruct(Structure):
    """One entry of the table that layout.c exports."""

    _fields_ = [
        ("name", c_char_p),
        ("value", c_int64),
    ]


def expected_layout() -> dict[str, int]:
    """Return what layout.c must export for every instruction set, by name."""
    layout = {
        "CONTEXT_PADDING": CONTEXT_PADDING,
        "HEAD_PADDING": HEAD_PADDING,
        "MAX_GROUP": MAX_GROUP,
        "MAX_HEAD_DIM": MAX_HEAD_DIM,
        "MAX_LINEAR_ROWS": MAX_LINEAR_ROWS,
        "MAX_PIECE_INPUTS": MAX_PIECE_INPUTS,
        "OCTET": OCTET,
        "PART_TOKENS": PART_TOKENS,
    }
    layout |= {kind.name: kind.value for kind in Kind}
    for structure in (WeightsStruct, PagedStruct, LayerStruct, DecoderStruct, StepStruct):
        layout |= layout_of(structure)
    return layout


def layout_of(structure: type[Structure]) -> dict[str, int]:
    """Return a structure's size and each field's offset and size, named as in layout.c."""
    name = structure.__name__.removesuffix("Struct")
    layout = {f"sizeof {name}": sizeof(structure)}
    for field, *_ in structure._fields_:
        place = getattr(structure, field)
        layout[f"offset of {name}.{field}"] = place.offset
        layout[f"size of {name}.{field}"] = place.size
    return layout
