/* Products of rows with a piece of int4 weights. They are widened to float32 in registers, for up to
 * six rows at a time. */

#include "quantized_linear.h"

typedef vec Sums[TILE_ROWS][4];

float total_of(const float *x, long count)
{
    vec sum = {};
    for (long k = 0; k < count; k += LANES) sum += *(const vec *)(x + k);
    float total = 0;
    for (int i = 0; i < LANES; i++) total += sum[i];
    return total;
}

/* Eight outputs' weights of input i of an octet. */
INLINE vec widen_int4(const char *w, const int i)
{
    __m256i packed = _mm256_loadu_si256((const __m256i *)w);
    packed = _mm256_srli_epi32(packed, i % 2 * 16 + i / 2 * 4);
    return (vec)_mm256_cvtepi32_ps(_mm256_and_si256(packed, _mm256_set1_epi32(15)));
}

INLINE void add_octet(const int rows, const int vectors, Sums c, const char *w, const float *x,
                      long x_stride)
{
    for (int line = 0; line < vectors / 2; line++) __builtin_prefetch(w + line * 64 + AHEAD_BYTES);
#pragma GCC unroll 8
    for (int i = 0; i < OCTET; i++) {
        vec b[4];
        /* Makes the compiler load the weights again instead of keeping them in registers. */
        __asm__("" : "+r"(w));
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) b[j] = widen_int4(w + j * 32, i);
        accumulate(rows, vectors, c, b, x + i, x_stride);
    }
}

/* Adds the sums of a piece, c, to those of the pieces before. */
INLINE void scale_sums(const int rows, const int vectors, int first, Sums c, const char *header,
                       const float *totals, long totals_stride, float *sums)
{
    const char *scales = header + first * 2 * LANES;
    const char *offsets = header + 2 * INT4_PANEL + first * LANES;
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) {
        vec scale = (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scales + j * 16)));
        __m128i bytes = _mm_loadl_epi64((const __m128i *)(offsets + j * LANES));
        vec offset = (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            vec *sum = (vec *)(sums + i * INT4_PANEL + j * LANES);
            vec share = add_product(c[i][j], offset, (vec)_mm256_set1_ps(totals[i * totals_stride]));
            *sum = add_product(*sum, scale, share);
        }
    }
}

/* Multiplies by the vectors of outputs from `first` on. */
INLINE void multiply_vectors(const int rows, const int vectors, int first, const Piece *piece,
                             const Block *block, float *sums)
{
    Sums c;
    const char *w = piece->w + first * 32;
    const float *x = block->x;
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) c[i][j] = (vec){};
    for (long k = 0; k < piece->num_octets; k++, x += OCTET, w += INT4_OCTET_BYTES)
        add_octet(rows, vectors, c, w, x, block->x_stride);
    scale_sums(rows, vectors, first, c, piece->header, block->totals, block->totals_stride,
               sums + first * LANES);
}

/* Each size of tile is a function of its own, because together in one function they spill. */
typedef void Int4Tile(const Piece *piece, const Block *block, float *sums);

#define INT4_TILE(rows, vectors, name)                                                             \
    __attribute__((noinline)) static void name(const Piece *piece, const Block *block, float *sums) \
    {                                                                                              \
        for (int first = 0; first < 4; first += vectors)                                           \
            multiply_vectors(rows, vectors, first, piece, block, sums);                            \
    }

INT4_TILE(1, 4, one_row)
INT4_TILE(2, 4, two_rows)
INT4_TILE(3, 4, three_rows)
INT4_TILE(4, 2, four_rows)
INT4_TILE(5, 2, five_rows)
INT4_TILE(6, 2, six_rows)

/* In tiles of nearly equal size. */
void multiply_piece(Kind kind, const Piece *piece, const Block *block, float *sums)
{
    (void)kind; /* int8 weights have kernels of their own */
    static Int4Tile *const int4_tiles[] = {one_row,   two_rows,  three_rows,
                                           four_rows, five_rows, six_rows};
    long num_tiles = (block->num_rows + TILE_ROWS - 1) / TILE_ROWS;
    for (long t = 0, row = 0; t < num_tiles; t++) {
        long rows = (block->num_rows - row + num_tiles - t - 1) / (num_tiles - t);
        Block tile = {block->x + row * block->x_stride, block->x_stride,
                      block->totals + row * block->totals_stride, block->totals_stride, rows};
        int4_tiles[rows - 1](piece, &tile, sums + row * INT4_PANEL);
        row += rows;
    }
}
