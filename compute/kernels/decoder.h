/* What one decode step of a whole model reads: its weights, and where the step's data lie. */

#pragma once

#include "kernels.h"

typedef struct {
    const bf16 *input_norm;
    const bf16 *mlp_norm;
    Weights qkv;
    Weights o;
    Weights gate_up;
    Weights down;
} Layer;

typedef struct {
    const Layer *layers;
    const bf16 *norm;
    Weights head;
    long num_layers;
    long width;
    int num_heads;
    int num_kv_heads;
    int dim;
    int is_share; /* whether this is one of several ranks, whose shares are summed outside */
    float eps;
} Decoder;

typedef struct {
    const float *cos;        /* [num_seqs, dim] */
    const float *signed_sin; /* [num_seqs, dim] */
    const bf16 *query_scale; /* [num_seqs]: a factor of the queries, or null */
    const int64_t *slots;    /* [num_seqs]: where the new tokens' keys and values go */
    const int64_t *tables;   /* [num_seqs, table_stride]: the blocks of each sequence */
    const int64_t *contexts; /* [num_seqs]: tokens in the KV cache, the new one included */
    long table_stride;
    long num_seqs;
    bf16 *cache; /* [num_layers, 2, num_blocks, block_size, num_kv_heads, dim] */
    long layer_stride;
    long values_at; /* the distance from a layer's keys to its values */
    int block_size;
    float *partials; /* [num_heads, dim + 2] for each part of a context */
} Step;
