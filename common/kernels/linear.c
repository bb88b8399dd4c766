/* Products of few rows, bound by the reading of the weights. A row's result does not depend on the rows beside it. */

#include "bfloat16.h"

enum { MAX_ROWS = 64 };

/* Sums [num_rows][64] of one panel: a stretch of weights small enough for the first-level cache is used by all rows before the next. */
static void panel(const bf16 *x, long x_stride, const bf16 *w, long num_pairs, int num_rows, float *sums)
{
    int num_tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    for (long k = 0; k < num_pairs; k += TILE_PAIRS) {
        long count = num_pairs - k < TILE_PAIRS ? num_pairs - k : TILE_PAIRS;
        for (int t = 0, row = 0; t < num_tiles; t++) {
            int rows = (num_rows - row + num_tiles - t - 1) / (num_tiles - t), from = 4 * t / num_tiles, to = 4 * (t + 1) / num_tiles;
            any_tile(rows, 4, x + row * x_stride + 2 * k, x_stride, w + k * 2 * PANEL, 2 * PANEL, count, sums + row * PANEL, PANEL, k == 0, from, to);
            row += rows;
        }
    }
}

/* y [num_rows, num_outputs] = x [num_rows, num_inputs] times the weights, + bias and + residual where they are given. The weights are
 * filled up with zeros to whole panels and to a multiple of 32 inputs. num_rows is at most 64, num_inputs even. */
void linear(const bf16 *x, long x_stride, const bf16 *weights, const bf16 *bias, const bf16 *residual, bf16 *y,
            int num_rows, int num_outputs, int num_inputs, int num_threads)
{
    long panel_size = (long)(num_inputs + 31) / 32 * 32 * PANEL;
    int num_panels = (num_outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int p = 0; p < num_panels; p++) {
        float sums[MAX_ROWS * PANEL] __attribute__((aligned(64)));
        panel(x, x_stride, weights + p * panel_size, num_inputs / 2, num_rows, sums);
        for (long n = (long)p * PANEL; n < num_outputs && n < (p + 1L) * PANEL; n += LANES) {
            __mmask16 mask = mask_of(num_outputs - n);
            __m512 offset = bias ? load(bias + n, mask) : _mm512_setzero_ps();
            for (int i = 0; i < num_rows; i++) {
                long at = (long)i * num_outputs + n;
                __m512 value = _mm512_add_ps(_mm512_load_ps(sums + i * PANEL + n % PANEL), offset);
                store(y + at, mask, residual ? _mm512_add_ps(value, load(residual + at, mask)) : value);
            }
        }
    }
}
