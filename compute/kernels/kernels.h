/* What each instruction set implements, one task at a time. operations.c and decoder.c decide
 * which thread does which task; the result of a task does not depend on the other tasks.
 *
 * Shapes are in brackets, the last dimension contiguous. The rows of an `x` that has an `x_stride`
 * begin that many entries apart; all other matrices are contiguous. */

#pragma once

#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
#define INLINE static inline __attribute__((always_inline))

/* Python repeats these constants, and the structures below, in structures.py. */
enum {
    CONTEXT_PADDING = 64, /* the workspace of attention rounds contexts up to this */
    HEAD_PADDING = 16,    /* and heads up to this */
    MAX_GROUP = 16,       /* query heads that share a key head */
    MAX_HEAD_DIM = 256,
    MAX_LINEAR_ROWS = 64, /* rows of a product with bfloat16 weights; AVX2 accepts more */
    MAX_PIECE_INPUTS = 128, /* inputs of int4 weights that share a copy of their scales */
    OCTET = 8,              /* inputs of int4 weights that are packed together */
    PART_TOKENS = 512     /* a longer context is divided into parts of this many tokens */
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

/* GELU, approximated by tanh, is x / (1 + 2^(x * (GELU_CUBE * x * x + GELU_LINE))). */
#define GELU_LINE -2.302208198f
#define GELU_CUBE -0.102943240f

/* The softmax of attention begins with it, which makes masked scores before the first visible one
 * harmless: their distance to the greatest score is a number. */
#define LEAST_SCORE -1e30f

INLINE uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* A bfloat16 is the upper half of a float32. */
INLINE float widen(bf16 x) { return float_of((uint32_t)x << 16); }

/* Rounds to the nearest bfloat16, ties to even. A NaN stays a NaN. */
INLINE bf16 narrow(float x)
{
    uint32_t bits = bits_of(x);
    return (bf16)(x != x ? (bits >> 16 | 0x40) : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

typedef enum { BFLOAT16, INT8, INT4 } Kind;

/* The weights [num_outputs, num_inputs] of a product, packed in the order in which the kernels
 * read them.
 *
 * The inputs of int4 weights are packed in pieces, which have whole octets of inputs. All inputs
 * of a piece have the same scale and the same zero, apart from the factor of the output. */
typedef struct {
    const void *packed;
    const float *scales;   /* [num_outputs]: a factor of each output; null for bfloat16 */
    const bf16 *bias;      /* [num_outputs], or null */
    const int32_t *pieces; /* [num_pieces + 1]: where pieces begin and end, in octets; int4 only */
    const int32_t *order;  /* [OCTET * pieces[num_pieces]]: the input at each place, or -1 for none;
                              null if the inputs are in their own order */
    long num_outputs;
    long num_inputs;
    long num_pieces;
    Kind kind;
} Weights;

/* The rows that a product reads and writes. y may be the same matrix as the residual. */
typedef struct {
    const bf16 *x; /* [num_rows, num_inputs] */
    long x_stride;
    const bf16 *residual; /* [num_rows, num_outputs], or null; added to the product */
    bf16 *y;              /* [num_rows, num_outputs] */
    long num_rows;
} Rows;

long num_linear_tasks(const Weights *weights, long num_rows, int num_threads);

/* Returns the first pair of inputs of one output; the next pairs lie `stride` entries apart. The
 * weights must be bfloat16. */
const bf16 *packed_row(const Weights *weights, long output, long *stride);

void linear_task(const Weights *weights, const Rows *rows, int num_threads, long task);

/* One layer's keys and values, and where in them those of the sequences are. Sequence s has
 * contexts[s] tokens, in the blocks from tables[s * table_stride] on. */
typedef struct {
    const bf16 *keys;   /* [num_blocks, block_size, num_kv_heads, dim] */
    const bf16 *values; /* the same shape */
    const int64_t *tables;
    const int64_t *contexts;
    long table_stride;
    int num_heads;
    int num_kv_heads;
    int dim;
    int block_size;
} Paged;

/* Attention of the query heads q [group, dim] of one new token of sequence `seq` that share a key
 * head, over `count` tokens of its context from `first` on.
 *
 * If `partial` is null, y [group, dim] becomes the result. Otherwise `partial` [group, dim + 2]
 * becomes what must be merged: for each head `dim` weighted sums, the sum of the weights, and the
 * greatest score. The weight of a score is 2^(score - greatest). How a context is divided does not
 * depend on the number of threads. */
void attend_part(const Paged *paged, long seq, int kv_head, long first, long count, const bf16 *q,
                 bf16 *y, float *partial);

long num_attention_tasks(const Paged *paged, long num_seqs);
void attention_task(const Paged *paged, const bf16 *q, long q_stride, bf16 *y, float *partials,
                    long task);

/* Merging the parts of divided contexts: no tasks if no context is divided. */
long num_merge_tasks(const Paged *paged, long num_seqs);
void merge_task(const Paged *paged, bf16 *y, const float *partials, long task);

/* y [width] = x / rms(x) * weight */
void rms_norm_row(const bf16 *x, const bf16 *weight, bf16 *y, float eps, long width);

/* y [width] = gelu(x), approximated by tanh */
void gelu_tanh_row(const bf16 *x, bf16 *y, long width);

/* y [width] = silu(gate) * up, for gate and up side by side in x [2 * width] */
void silu_mul_row(const bf16 *x, bf16 *y, long width);

/* Rotates the heads x [num_heads, dim] in place: entry i of a head together with entry
 * i + dim / 2. cos and signed_sin are [dim]. */
void rotate_row(bf16 *x, const float *cos, const float *signed_sin, int num_heads, int dim);
