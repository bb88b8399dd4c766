/* What each instruction set computes for itself, one task at a time; which thread does which of them is decided in operations.c and
 * decoder.c. A task's result does not depend on the others. Rows of `x` are `x_stride` entries long, other matrices are contiguous. */

#pragma once

#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
#define INLINE static inline __attribute__((always_inline))

/* Python repeats these in structures.py. */
enum {
    CONTEXT_PADDING = 64, /* attention's workspace holds contexts rounded up to a multiple of this */
    MAX_GROUP = 16,       /* query heads that share a key head */
    MAX_HEAD_DIM = 256,
    MAX_LINEAR_ROWS = 64, /* rows that every instruction set's product accepts; some accept more */
    PART_TOKENS = 512     /* a longer context is divided into parts */
};

/* Reads a byte for AddressSanitizer, which does not see what some vector instructions access.
 * Other builds read nothing. */
INLINE void touch(const void *address)
{
#ifdef __SANITIZE_ADDRESS__
    (void)*(const volatile char *)address;
#else
    (void)address;
#endif
}

INLINE uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* To the nearest, ties to even; what is no number stays none. */
INLINE bf16 narrow(float x)
{
    uint32_t bits = bits_of(x);
    return (bf16)(x != x ? (bits >> 16 | 0x40) : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* A product's weights [num_outputs, num_inputs], laid out for the kernels: bfloat16, or int8 with a scale for each output. */
typedef struct {
    const void *packed;
    const float *scales;
    const bf16 *bias;
    long num_outputs, num_inputs;
} Weights;

/* x [num_rows, num_inputs]; y and residual [num_rows, num_outputs]. Bias and residual are added where they are given; y may be the residual. */
typedef struct {
    const bf16 *x;
    long x_stride;
    const bf16 *residual;
    bf16 *y;
    long num_rows;
} Rows;

long num_linear_tasks(const Weights *weights, long num_rows, int num_threads);
/* The pairs of inputs of one output of bfloat16 weights; they lie `stride` entries apart. */
const bf16 *packed_row(const Weights *weights, long output, long *stride);

void linear_task(const Weights *weights, const Rows *rows, int num_threads, long task);

/* One layer's keys and values, each [num_blocks, block_size, num_kv_heads, dim], and where in them the sequences' are: sequence s has
 * `contexts[s]` tokens in the blocks from `tables[s * table_stride]`. */
typedef struct {
    const bf16 *keys, *values;
    const int64_t *tables, *contexts;
    long table_stride;
    int num_heads, num_kv_heads, dim, block_size;
} Paged;

/* The query heads [group, dim] of one new token of sequence `seq` that share a key head, over `count` tokens of its context from `first` on.
 * Where `partial` is given it gets what is to be merged, for each head the `dim` weighted sums, the sum of the weights, and the greatest score
 * as a power of two; else y gets the result. */
void attend_part(const Paged *paged, long seq, int kv_head, long first, long count, const bf16 *q, bf16 *y, float *partial);

long num_attention_tasks(const Paged *paged, long num_seqs);
void attention_task(const Paged *paged, const bf16 *q, long q_stride, bf16 *y, float *partials, long task);

/* None where no context is divided. */
long num_merge_tasks(const Paged *paged, long num_seqs);
void merge_task(const Paged *paged, bf16 *y, const float *partials, long task);

/* y = x / rms(x) * weight */
void rms_norm_row(const bf16 *x, const bf16 *weight, bf16 *y, float eps, long width);

/* y [width] = silu(gate) * up, where x is gate and up side by side. */
void silu_mul_row(const bf16 *x, bf16 *y, long width);

/* Turns heads in place: entry i with entry i + dim / 2. cos and signed_sin are [dim]. */
void rotate_row(bf16 *x, const float *cos, const float *signed_sin, int num_heads, int dim);
