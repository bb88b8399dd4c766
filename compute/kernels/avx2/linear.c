/* Products of any number of rows. The result of a row does not depend on the other rows. */

#include "quantized_linear.h"

enum {
    DEPTH = 1024,          /* inputs that are multiplied at a time */
    FEW_ROWS_DEPTH = 8192, /* the same for at most TILE_ROWS rows */
    BLOCK_ROWS = 48,
    MAX_SUMS = 512 * BLOCK_ROWS,
    TASKS_PER_THREAD = 4
};
_Static_assert(TILE_ROWS * (FEW_ROWS_DEPTH + PANEL) <= BLOCK_ROWS * (DEPTH + PANEL),
               "a few rows fit in the place of a block");

TILES(1, int8_tiles)
TILE(1, 2, 0, one_row)
TILE(2, 2, 0, two_rows)
TILE(1, 2, 1, one_int8_row)
TILE(2, 2, 1, two_int8_rows)

static long min(long a, long b) { return a < b ? a : b; }

/* Packs weights [num_outputs, num_inputs] in panels, which are filled up with zeros. */
void pack_weights(const bf16 *weights, bf16 *packed, long num_outputs, long num_inputs)
{
    for (long first = 0; first < num_outputs; first += PANEL)
        for (long k = 0; k < num_inputs; k += 2)
            for (long n = first; n < first + PANEL; n++) {
                *packed++ = n < num_outputs ? weights[n * num_inputs + k] : 0;
                *packed++ =
                    n < num_outputs && k + 1 < num_inputs ? weights[n * num_inputs + k + 1] : 0;
            }
}

/* The same for int8. */
void pack_int8(const int8_t *weights, int8_t *packed, long num_outputs, long num_inputs)
{
    for (long first = 0; first < num_outputs; first += PANEL)
        for (long k = 0; k < (num_inputs + 1) / 2 * 2; k++)
            for (long n = first; n < first + PANEL; n++)
                *packed++ = n < num_outputs && k < num_inputs ? weights[n * num_inputs + k] : 0;
}

static long bytes_of_panel(long num_inputs, int is_int8)
{
    return (num_inputs + 1) / 2 * (is_int8 ? 2 : 4) * PANEL;
}

const bf16 *packed_row(const Weights *weights, long output, long *stride)
{
    *stride = 2 * PANEL;
    return (const bf16 *)weights->packed +
           output / PANEL * bytes_of_panel(weights->num_inputs, 0) / 2 + output % PANEL * 2;
}

/* The number of inputs that are multiplied at a time: even, and nearly the same each time. */
static long depth_of(int num_rows, long num_inputs)
{
    long most = num_rows <= TILE_ROWS ? FEW_ROWS_DEPTH : DEPTH;
    long num_stretches = (num_inputs + most - 1) / most;
    return ((num_inputs + num_stretches - 1) / num_stretches + 1) / 2 * 2;
}

/* Computes the sums [num_rows][16 * num_panels]. A stretch of weights that fits in the first-level
 * cache is used by all rows while the next panel's is prefetched. Few rows continue along a panel
 * instead. */
INLINE void multiply(const int is_int8, const bf16 *x, long x_stride, long num_inputs, int num_rows,
                     const char *w, int num_panels, float *sums)
{
    float wide[BLOCK_ROWS * (DEPTH + PANEL)] __attribute__((aligned(64)));
    int width = num_panels * PANEL;
    int is_few = num_rows <= TILE_ROWS;
    Tile *const *tiles_of_rows = is_int8 ? int8_tiles : tiles;
    Tile *two_panels =
        num_rows == 1 ? (is_int8 ? one_int8_row : one_row) : (is_int8 ? two_int8_rows : two_rows);
    long depth = depth_of(num_rows, num_inputs);
    long panel_bytes = bytes_of_panel(num_inputs, is_int8);
    long ahead = is_few ? AHEAD_BYTES : panel_bytes;
    for (long k = 0; k < num_inputs; k += depth) {
        long count = min(depth, num_inputs - k);
        long num_pairs = (count + 1) / 2;
        long stride = 2 * num_pairs + PANEL;
        for (int i = 0; i < num_rows; i++) {
            const bf16 *row = x + i * x_stride + k;
            for (long j = 0; j < count; j++) wide[i * stride + j] = widen(row[j]);
            wide[i * stride + count] = 0;
        }
        int p = 0;
        const char *panel = w + k * PANEL * (is_int8 ? 1 : 2);
        for (; num_rows <= 2 && p + 2 <= num_panels; p += 2, panel += 2 * panel_bytes)
            two_panels(wide, stride, panel, panel_bytes, ahead, num_pairs, sums + p * PANEL, width,
                       k == 0);
        for (; p < num_panels; p++, panel += panel_bytes)
            all_rows(tiles_of_rows, num_rows, wide, stride, panel, ahead, num_pairs,
                     sums + p * PANEL, width, k == 0);
    }
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
    long share = (num_panels / (TASKS_PER_THREAD * num_threads) + 1) / 2 * 2;
    long group = min(MAX_SUMS / (PANEL * block_rows), share > 2 ? share : 2);
    return (Division){group, block_rows, num_blocks, (num_panels + group - 1) / group};
}

long num_linear_tasks(const Weights *weights, long num_rows, int num_threads)
{
    if (weights->kind == INT4) return num_quantized_tasks(weights, num_rows, num_threads);
    Division division = divide(weights, num_rows, num_threads);
    return division.num_groups * division.num_blocks;
}

/* Applies scales, bias and residual, each of which may be null, to `count` sums of one row. */
static void finish(const float *sums, const float *scales, const bf16 *bias, const bf16 *residual,
                   bf16 *y, long count)
{
    for (long n = 0; n < count; n++)
        y[n] = narrow(sums[n] * (scales ? scales[n] : 1) + (bias ? widen(bias[n]) : 0) +
                      (residual ? widen(residual[n]) : 0));
}

INLINE void compute(const int is_int8, const Weights *weights, const Rows *rows,
                    const Division *division, long task)
{
    float sums[MAX_SUMS] __attribute__((aligned(64)));
    long num_outputs = weights->num_outputs;
    long num_inputs = weights->num_inputs;
    long row = task % division->num_blocks * division->block_rows;
    long first = task / division->num_blocks * division->group * PANEL;
    long width = min(division->group * PANEL, num_outputs - first);
    long num_panels = (width + PANEL - 1) / PANEL;
    long num_rows = min(division->block_rows, rows->num_rows - row);
    const char *packed =
        (const char *)weights->packed + first / PANEL * bytes_of_panel(num_inputs, is_int8);
    multiply(is_int8, rows->x + row * rows->x_stride, rows->x_stride, num_inputs, num_rows, packed,
             num_panels, sums);
    for (long i = 0; i < num_rows; i++) {
        long at = (row + i) * num_outputs + first;
        finish(sums + i * num_panels * PANEL, is_int8 ? weights->scales + first : 0,
               weights->bias ? weights->bias + first : 0, rows->residual ? rows->residual + at : 0,
               rows->y + at, width);
    }
}

void linear_task(const Weights *weights, const Rows *rows, int num_threads, long task)
{
    if (weights->kind == INT4) {
        quantized_task(weights, rows, num_threads, task);
        return;
    }
    Division division = divide(weights, rows->num_rows, num_threads);
    if (weights->kind == INT8)
        compute(1, weights, rows, &division, task);
    else
        compute(0, weights, rows, &division, task);
}
