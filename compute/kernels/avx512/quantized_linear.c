/* Products of any number of rows with weights of eight or four bits. The result of a row does not
 * depend on the other rows.
 *
 * Integers of eight bits are exact in bfloat16. So weights are widened to it, in registers for a
 * tile of rows, and in the first-level cache for more. int8 weights lie in panels of 64 outputs as
 * [inputs / 2][64][2]. int4 weights lie in panels of 64 outputs piece by piece (`Weights`): the
 * scales, float16 [64], what is added to the weights, int8 [64], and the octets. An octet of inputs
 * has two words of sixteen bits per output, [64][2]: the first holds the even inputs, from its
 * lowest bits on. */

#include "quantized_linear.h"

enum {
    BLOCK_ROWS = 48,
    MAX_ENTRIES = BLOCK_ROWS * 4096, /* entries of x that are multiplied at a time */
    MAX_SUMS = 512 * BLOCK_ROWS,
    MIDDLE = 8, /* is subtracted from int4 weights when they are widened */
    HEADER_BYTES = 3 * PANEL,
    INT4_OCTET_BYTES = OCTET / 2 * PANEL,
    INT8_OCTET_BYTES = OCTET * PANEL,
    PIECE_OCTETS = MAX_PIECE_INPUTS / OCTET,
    LINE = 32, /* bfloat16 in a cache line */
    AHEAD_BYTES = 4096, /* how far ahead weights are prefetched */
    TASKS_PER_THREAD = 4
};

/* A block of rows of x in the order of the packed weights, filled up with zeros. */
typedef struct {
    bf16 *x;
    long x_stride;
    float *totals; /* [num_rows, pieces]: the sums of x in each piece */
    long totals_stride;
    long num_rows;
} Block;

static long min(long a, long b) { return a < b ? a : b; }

static long octets_of(long num_inputs) { return (num_inputs + OCTET - 1) / OCTET; }

/* int8 weights are taken in pieces as well, all of the same size. */
static long num_pieces_of(const Weights *weights)
{
    if (weights->kind == INT4) return weights->num_pieces;
    return (octets_of(weights->num_inputs) + PIECE_OCTETS - 1) / PIECE_OCTETS;
}

/* The first octet of a piece; that of the piece after the last one is the number of octets. */
static long start_of(const Weights *weights, long piece)
{
    if (weights->kind == INT4) return weights->pieces[piece];
    return min(piece * PIECE_OCTETS, octets_of(weights->num_inputs));
}

/* The distance from the beginning of a panel to one of its pieces. */
static long bytes_before(const Weights *weights, long piece)
{
    if (weights->kind == INT8) return start_of(weights, piece) * INT8_OCTET_BYTES;
    return piece * HEADER_BYTES + start_of(weights, piece) * INT4_OCTET_BYTES;
}

/* Packs int8 weights [num_outputs, num_inputs], filled up with zeros to whole panels and octets. */
void pack_int8(const int8_t *weights, int8_t *packed, long num_outputs, long num_inputs)
{
    for (long first = 0; first < num_outputs; first += PANEL)
        for (long k = 0; k < octets_of(num_inputs) * OCTET; k += 2)
            for (long n = first; n < first + PANEL; n++)
                for (long i = k; i < k + 2; i++)
                    *packed++ = n < num_outputs && i < num_inputs ? weights[n * num_inputs + i] : 0;
}

/* The sum of a multiple of eight entries. */
static float sum_of(const bf16 *x, long count)
{
    __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    __m512 sum = _mm512_setzero_ps();
    for (long k = 0; k < count; k += 2 * LANES) {
        __mmask32 mask = count - k >= 2 * LANES ? ~0u : (1u << (count - k)) - 1;
        __m512i some = _mm512_maskz_loadu_epi16(mask, x + k);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)some, ones);
    }
    return _mm512_reduce_add_ps(sum);
}

static void pack_octet(const uint8_t *values, uint16_t *packed, long num_inputs, long num_outputs)
{
    memset(packed, 0, INT4_OCTET_BYTES);
    for (long n = 0; n < num_outputs; n++)
        for (long i = 0; i < OCTET; i++)
            packed[2 * n + i % 2] |= (uint16_t)(values[n * num_inputs + i] << i / 2 * 4);
}

/* Packs int4 values, whose inputs are in order already. scales are float16 [num_outputs,
 * num_pieces], zeros are [num_outputs, num_pieces]. */
void pack_int4(const uint8_t *values, const uint16_t *scales, const uint8_t *zeros,
               const int32_t *pieces, char *packed, long num_outputs, long num_pieces)
{
    long num_inputs = pieces[num_pieces] * (long)OCTET;
    for (long first = 0; first < num_outputs; first += PANEL) {
        long count = min(PANEL, num_outputs - first);
        for (long p = 0; p < num_pieces; p++) {
            memset(packed, 0, HEADER_BYTES);
            for (long n = 0; n < count; n++) {
                long at = (first + n) * num_pieces + p;
                memcpy(packed + n * sizeof *scales, scales + at, sizeof *scales);
                packed[sizeof *scales * PANEL + n] = (char)(MIDDLE - zeros[at]);
            }
            packed += HEADER_BYTES;
            for (long k = pieces[p]; k < pieces[p + 1]; k++, packed += INT4_OCTET_BYTES)
                pack_octet(values + first * num_inputs + k * OCTET, (uint16_t *)packed, num_inputs,
                           count);
        }
    }
}

/* The bfloat16 of each int4, less MIDDLE. A lookup uses the lowest five bits of each word, of which
 * the fifth belongs to the next int4. So the table repeats itself. */
INLINE __m512i int4_table(void)
{
    __m512i values = _mm512_setr_epi32(0xc0e0c100, 0xc0a0c0c0, 0xc040c080, 0xbf80c000, 0x3f800000,
                                       0x40404000, 0x40a04080, 0x40e040c0, 0xc0e0c100, 0xc0a0c0c0,
                                       0xc040c080, 0xbf80c000, 0x3f800000, 0x40404000, 0x40a04080,
                                       0x40e040c0);
    return values;
}

/* Widens 16 outputs of an input pair. */
INLINE __m512bh widen_int8(const char *w)
{
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
    __m512 high =
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(w + LANES))));
    return _mm512_cvtne2ps_pbh(high, low);
}

typedef __m512 Sums[TILE_ROWS][4];

INLINE void add_products(const int rows, const int j, Sums c, __m512bh b, const bf16 *x,
                         long x_stride)
{
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
        c[i][j] = _mm512_dpbf16_ps(c[i][j], b, pair_of(x + i * x_stride));
}

INLINE void add_int4_octet(const int rows, Sums c, const char *w, const bf16 *x, long x_stride)
{
    __m512i packed[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        packed[j] = _mm512_loadu_si512(w + j * 64);
        _mm_prefetch(w + j * 64 + AHEAD_BYTES, _MM_HINT_T0);
    }
#pragma GCC unroll 4
    for (int pair = 0; pair < OCTET / 2; pair++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            __m512bh b = (__m512bh)_mm512_permutexvar_epi16(packed[j], int4_table());
            add_products(rows, j, c, b, x + 2 * pair, x_stride);
            packed[j] = _mm512_srli_epi16(packed[j], 4);
        }
}

INLINE void add_int8_octet(const int rows, Sums c, const char *w, const bf16 *x, long x_stride)
{
#pragma GCC unroll 4
    for (int pair = 0; pair < OCTET / 2; pair++, w += 2 * PANEL) {
        _mm_prefetch(w + AHEAD_BYTES, _MM_HINT_T0);
        _mm_prefetch(w + AHEAD_BYTES + 64, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            add_products(rows, j, c, widen_int8(w + j * 2 * LANES), x + 2 * pair, x_stride);
    }
}

INLINE void add_wide_octet(const int rows, Sums c, const char *w, const bf16 *x, long x_stride)
{
#pragma GCC unroll 4
    for (int pair = 0; pair < OCTET / 2; pair++, w += 4 * PANEL)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            add_products(rows, j, c, (__m512bh)_mm512_loadu_si512(w + j * 64), x + 2 * pair,
                         x_stride);
}

/* Adds the sums of a piece of int4 weights, c, to those of the pieces before. A weight is
 * (value - MIDDLE + offset) * scale. */
INLINE void finish_piece(const int rows, Sums c, const char *header, const float *totals,
                         long totals_stride, float *sums, long sums_stride)
{
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)header + j));
        __m512 offset = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
            _mm_loadu_si128((const __m128i *)(header + 2 * PANEL + j * LANES))));
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            float *sum = sums + i * sums_stride + j * LANES;
            __m512 total = _mm512_set1_ps(totals[i * totals_stride]);
            _mm512_store_ps(sum, _mm512_fmadd_ps(scale, _mm512_fmadd_ps(offset, total, c[i][j]),
                                                 _mm512_load_ps(sum)));
        }
    }
}

/* What a tile multiplies: `num_octets` octets of one panel, in one piece if they are int4. */
typedef struct {
    const char *w;      /* packed, or widened already */
    const char *header; /* of the piece, or null for int8 */
    long num_octets;
} Stretch;

enum { WIDE = -1 };

INLINE void multiply_tile(const int rows, const int kind, const Stretch *stretch, const bf16 *x,
                 long x_stride, const float *totals, long totals_stride, float *sums,
                 long sums_stride)
{
    Sums c;
    int continues = !stretch->header;
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            c[i][j] = continues ? _mm512_load_ps(sums + i * sums_stride + j * LANES)
                                : _mm512_setzero_ps();
    const char *w = stretch->w;
    for (long k = 0; k < stretch->num_octets; k++, x += OCTET) {
        if (kind == INT4) {
            add_int4_octet(rows, c, w, x, x_stride);
            w += INT4_OCTET_BYTES;
        } else if (kind == INT8) {
            add_int8_octet(rows, c, w, x, x_stride);
            w += INT8_OCTET_BYTES;
        } else {
            add_wide_octet(rows, c, w, x, x_stride);
            w += 2 * OCTET * PANEL;
        }
    }
    if (stretch->header)
        finish_piece(rows, c, stretch->header, totals, totals_stride, sums, sums_stride);
    else
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                _mm512_store_ps(sums + i * sums_stride + j * LANES, c[i][j]);
}

/* Each size of tile is a function of its own, so that none of them spills. */
typedef void Tile(const Stretch *stretch, const bf16 *x, long x_stride, const float *totals,
                  long totals_stride, float *sums, long sums_stride);

#define TILE(rows, kind, name)                                                              \
    __attribute__((noinline)) static void name(                                             \
        const Stretch *stretch, const bf16 *x, long x_stride, const float *totals,          \
        long totals_stride, float *sums, long sums_stride)                                  \
    {                                                                                       \
        multiply_tile(rows, kind, stretch, x, x_stride, totals, totals_stride, sums, sums_stride);   \
    }

/* A table of the tiles for one to six rows. */
#define TILES(kind, name)   \
    TILE(1, kind, name##_1) \
    TILE(2, kind, name##_2) \
    TILE(3, kind, name##_3) \
    TILE(4, kind, name##_4) \
    TILE(5, kind, name##_5) \
    TILE(6, kind, name##_6) \
    static Tile *const name[] = {name##_1, name##_2, name##_3, name##_4, name##_5, name##_6};

TILES(INT4, int4_tiles)
TILES(INT8, int8_tiles)
TILES(WIDE, wide_tiles)

/* Widens weights of one panel to bfloat16, in pairs as `Stretch` has them. */
static void widen_stretch(int kind, const char *w, long num_octets, char *wide)
{
    for (long k = 0; k < num_octets; k++)
        if (kind == INT8)
            for (int pair = 0; pair < OCTET / 2; pair++, w += 2 * PANEL)
                for (int j = 0; j < 4; j++, wide += 64)
                    _mm512_store_si512(wide, (__m512i)widen_int8(w + j * 2 * LANES));
        else {
            for (int j = 0; j < 4; j++, w += 64) {
                __m512i packed = _mm512_loadu_si512(w);
                _mm_prefetch(w + AHEAD_BYTES, _MM_HINT_T0);
                for (int pair = 0; pair < OCTET / 2; pair++) {
                    _mm512_store_si512(wide + (pair * 4 + j) * 64,
                                       _mm512_permutexvar_epi16(packed, int4_table()));
                    packed = _mm512_srli_epi16(packed, 4);
                }
            }
            wide += 2 * OCTET * PANEL;
        }
}

/* Multiplies all rows of a block by a stretch of weights, in tiles of nearly equal size. */
static void multiply_stretch(int kind, Stretch stretch, const Block *block, const bf16 *x,
                             const float *totals, float *sums, long sums_stride)
{
    char wide[2 * MAX_PIECE_INPUTS * PANEL] __attribute__((aligned(64)));
    Tile *const *tiles = kind == INT8 ? int8_tiles : int4_tiles;
    long num_rows = block->num_rows;
    long num_tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    if (num_tiles > 1) {
        widen_stretch(kind, stretch.w, stretch.num_octets, wide);
        stretch.w = wide;
        tiles = wide_tiles;
    }
    for (long t = 0, row = 0; t < num_tiles; t++) {
        long rows = (num_rows - row + num_tiles - t - 1) / (num_tiles - t);
        tiles[rows - 1](&stretch, x + row * block->x_stride, block->x_stride,
                        totals + row * block->totals_stride, block->totals_stride,
                        sums + row * sums_stride, sums_stride);
        row += rows;
    }
}

/* Copies the inputs of the pieces from `first` up to `last`, and adds up those of each piece. */
static void fill(Block *block, const Weights *weights, const Rows *rows, long row, long first,
                 long last)
{
    long from = start_of(weights, first) * OCTET;
    long count = start_of(weights, last) * OCTET - from;
    long num_given = weights->order ? count : min(count, weights->num_inputs - from);
    for (long i = 0; i < block->num_rows; i++) {
        const bf16 *given = rows->x + (row + i) * rows->x_stride;
        bf16 *x = block->x + i * block->x_stride;
        if (weights->order)
            for (long k = 0; k < count; k++) {
                int32_t input = weights->order[from + k];
                x[k] = input < 0 ? 0 : given[input];
            }
        else
            memcpy(x, given + from, num_given * sizeof *x);
        for (long k = num_given; k < count; k++) x[k] = 0;
        if (weights->kind == INT4)
            for (long p = first; p < last; p++)
                block->totals[i * block->totals_stride + p - first] =
                    sum_of(x + start_of(weights, p) * OCTET - from,
                           (start_of(weights, p + 1) - start_of(weights, p)) * OCTET);
    }
}

/* Adds the products of a block with the pieces from `first` up to `last` of one panel. */
static void multiply_panel(const Weights *weights, const Block *block, const char *panel,
                           long first, long last, float *sums, long sums_stride)
{
    long from = start_of(weights, first) * OCTET;
    for (long p = first; p < last; p++) {
        const char *piece = panel + bytes_before(weights, p);
        int is_int4 = weights->kind == INT4;
        Stretch stretch = {
            .w = piece + (is_int4 ? HEADER_BYTES : 0),
            .header = is_int4 ? piece : 0,
            .num_octets = start_of(weights, p + 1) - start_of(weights, p),
        };
        multiply_stretch(weights->kind, stretch, block,
                         block->x + start_of(weights, p) * OCTET - from, block->totals + p - first,
                         sums, sums_stride);
    }
}

/* The piece after the last one whose inputs find room together with those from `first` on. */
static long last_piece(const Weights *weights, long first, long num_inputs)
{
    long last = first + 1;
    long most = start_of(weights, first) + num_inputs / OCTET;
    while (last < num_pieces_of(weights) && start_of(weights, last + 1) <= most) last++;
    return last;
}

/* Outputs are computed in groups of panels, rows in blocks of nearly equal size. A task is one
 * group for one block. */
typedef struct {
    long group; /* panels in a group */
    long block_rows;
    long num_blocks;
    long num_groups;
} Division;

static Division divide(const Weights *weights, long num_rows, int num_threads)
{
    long num_panels = (weights->num_outputs + PANEL - 1) / PANEL;
    long num_blocks = (num_rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    long block_rows = num_blocks ? (num_rows + num_blocks - 1) / num_blocks : 1;
    long share = num_panels / (TASKS_PER_THREAD * num_threads);
    long group = min(MAX_SUMS / (PANEL * block_rows), share > 1 ? share : 1);
    return (Division){group, block_rows, num_blocks, (num_panels + group - 1) / group};
}

long num_quantized_tasks(const Weights *weights, long num_rows, int num_threads)
{
    Division division = divide(weights, num_rows, num_threads);
    return division.num_groups * division.num_blocks;
}

/* Applies scales, bias and residual to the sums of one row. */
static void finish(const Weights *weights, const float *sums, const bf16 *residual, bf16 *y,
                   long first, long count)
{
    for (long n = 0; n < count; n += LANES) {
        __mmask16 mask = mask_of(count - n);
        __m512 value = weights->bias ? load(weights->bias + first + n, mask) : _mm512_setzero_ps();
        value = _mm512_fmadd_ps(_mm512_load_ps(sums + n),
                                load_floats(weights->scales + first + n, mask), value);
        if (residual) value = _mm512_add_ps(value, load(residual + n, mask));
        store(y + n, mask, value);
    }
}

void quantized_task(const Weights *weights, const Rows *rows, int num_threads, long task)
{
    bf16 x[MAX_ENTRIES] __attribute__((aligned(64)));
    float totals[MAX_ENTRIES / OCTET];
    float sums[MAX_SUMS] __attribute__((aligned(64)));
    Division division = divide(weights, rows->num_rows, num_threads);
    long row = task % division.num_blocks * division.block_rows;
    long first = task / division.num_blocks * division.group * PANEL;
    long width = min(division.group * PANEL, weights->num_outputs - first);
    long stride = (width + PANEL - 1) / PANEL * PANEL;
    long num_pieces = num_pieces_of(weights);
    long size = bytes_before(weights, num_pieces);
    const char *panels = (const char *)weights->packed + first / PANEL * size;
    long num_rows = min(division.block_rows, rows->num_rows - row);
    long room = MAX_ENTRIES / num_rows / LINE * LINE;
    Block block = {x, room, totals, room / OCTET, num_rows};
    memset(sums, 0, num_rows * stride * sizeof *sums);
    for (long p = 0, last; p < num_pieces; p = last) {
        last = last_piece(weights, p, room);
        fill(&block, weights, rows, row, p, last);
        for (long n = 0; n < width; n += PANEL)
            multiply_panel(weights, &block, panels + n / PANEL * size, p, last, sums + n, stride);
    }
    for (long i = 0; i < num_rows; i++) {
        long at = (row + i) * weights->num_outputs + first;
        finish(weights, sums + i * stride, rows->residual ? rows->residual + at : 0, rows->y + at,
               first, width);
    }
}
