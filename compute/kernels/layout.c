/* The sizes, offsets and constants that Python code repeats. Python compares this table with
 * structures.py when it loads the library. */

#include "bfloat16.h"
#include "decoder.h"

#include <stddef.h>

typedef struct {
    const char *name;
    int64_t value;
} Entry;

#define CONSTANT(name) {#name, name}
#define STRUCTURE(type) {"sizeof " #type, sizeof(type)}
#define FIELD(type, field)                                  \
    {"offset of " #type "." #field, offsetof(type, field)}, \
    {"size of " #type "." #field, sizeof(((type *)0)->field)}

const Entry layout[] = {
    CONSTANT(BFLOAT16),
    CONSTANT(CONTEXT_PADDING),
    CONSTANT(HEAD_PADDING),
    CONSTANT(INT4),
    CONSTANT(INT4_PANEL),
    CONSTANT(INT8),
    CONSTANT(MAX_GROUP),
    CONSTANT(MAX_HEAD_DIM),
    CONSTANT(MAX_LINEAR_ROWS),
    CONSTANT(MAX_PIECE_INPUTS),
    CONSTANT(OCTET),
    CONSTANT(PANEL),
    CONSTANT(PART_TOKENS),

    STRUCTURE(Weights),
    FIELD(Weights, packed),
    FIELD(Weights, scales),
    FIELD(Weights, bias),
    FIELD(Weights, pieces),
    FIELD(Weights, order),
    FIELD(Weights, num_outputs),
    FIELD(Weights, num_inputs),
    FIELD(Weights, num_pieces),
    FIELD(Weights, kind),

    STRUCTURE(Paged),
    FIELD(Paged, keys),
    FIELD(Paged, values),
    FIELD(Paged, tables),
    FIELD(Paged, contexts),
    FIELD(Paged, table_stride),
    FIELD(Paged, num_heads),
    FIELD(Paged, num_kv_heads),
    FIELD(Paged, dim),
    FIELD(Paged, block_size),

    STRUCTURE(Layer),
    FIELD(Layer, input_norm),
    FIELD(Layer, mlp_norm),
    FIELD(Layer, qkv),
    FIELD(Layer, o),
    FIELD(Layer, gate_up),
    FIELD(Layer, down),

    STRUCTURE(Decoder),
    FIELD(Decoder, layers),
    FIELD(Decoder, norm),
    FIELD(Decoder, head),
    FIELD(Decoder, num_layers),
    FIELD(Decoder, width),
    FIELD(Decoder, num_heads),
    FIELD(Decoder, num_kv_heads),
    FIELD(Decoder, dim),
    FIELD(Decoder, is_share),
    FIELD(Decoder, eps),

    STRUCTURE(Step),
    FIELD(Step, cos),
    FIELD(Step, signed_sin),
    FIELD(Step, query_scale),
    FIELD(Step, slots),
    FIELD(Step, tables),
    FIELD(Step, contexts),
    FIELD(Step, table_stride),
    FIELD(Step, num_seqs),
    FIELD(Step, cache),
    FIELD(Step, layer_stride),
    FIELD(Step, values_at),
    FIELD(Step, block_size),
    FIELD(Step, partials),
};

const long num_layout_entries = sizeof layout / sizeof *layout;
