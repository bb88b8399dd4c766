/* Products of any number of rows with int4 weights, and with int8 weights for AVX-512; those of
 * AVX2 are in linear.c. The result of a row does not depend on the other rows. */

#include "quantized_linear.h"

enum {
    BLOCK_ROWS = 48,
    MAX_ENTRIES = BLOCK_ROWS * BLOCK_INPUTS, /* of x that are multiplied at a time */
    MAX_SUMS = 512 * BLOCK_ROWS,
    PIECE_OCTETS = MAX_PIECE_INPUTS / OCTET,
    LINE = 64 / sizeof(Factor), /* entries in a cache line */
    TASKS_PER_THREAD = 4
};

static long min(long a, long b) { return a < b ? a : b; }

static long num_octets_of(const Weights *weights)
{
    if (weights->kind == INT4) return weights->pieces[weights->num_pieces];
    return (weights->num_inputs + OCTET - 1) / OCTET;
}

/* int8 weights are taken in pieces of the same size. */
static long num_pieces_of(const Weights *weights)
{
    if (weights->kind == INT4) return weights->num_pieces;
    return (num_octets_of(weights) + PIECE_OCTETS - 1) / PIECE_OCTETS;
}

/* The first octet of a piece; that of the piece after the last one is the number of octets. */
static long start_of(const Weights *weights, long piece)
{
    if (weights->kind == INT4) return weights->pieces[piece];
    return min(piece * PIECE_OCTETS, num_octets_of(weights));
}

/* The distance from the beginning of a panel to one of its pieces. */
static long bytes_before(const Weights *weights, long piece)
{
    if (weights->kind == INT8) return start_of(weights, piece) * INT8_OCTET_BYTES;
    return piece * HEADER_BYTES + start_of(weights, piece) * INT4_OCTET_BYTES;
}

static void pack_octet(const uint8_t *values, uint16_t *packed, long num_inputs, long num_outputs)
{
    memset(packed, 0, INT4_OCTET_BYTES);
    for (long n = 0; n < num_outputs; n++)
        for (long i = 0; i < OCTET; i++)
            packed[2 * n + i % 2] |= (uint16_t)(values[n * num_inputs + i] << i / 2 * 4);
}

/* Packs int4 values [num_outputs, OCTET * pieces[num_pieces]], whose inputs are in the order of the
 * pieces. scales are float16 [num_outputs, num_pieces], zeros have the same shape. */
void pack_int4(const uint8_t *values, const uint16_t *scales, const uint8_t *zeros,
               const int32_t *pieces, char *packed, long num_outputs, long num_pieces)
{
    long num_inputs = pieces[num_pieces] * (long)OCTET;
    for (long first = 0; first < num_outputs; first += INT4_PANEL) {
        long count = min(INT4_PANEL, num_outputs - first);
        for (long p = 0; p < num_pieces; p++) {
            memset(packed, 0, HEADER_BYTES);
            for (long n = 0; n < count; n++) {
                long at = (first + n) * num_pieces + p;
                memcpy(packed + n * sizeof *scales, scales + at, sizeof *scales);
                packed[sizeof *scales * INT4_PANEL + n] = (char)(INT4_MIDDLE - zeros[at]);
            }
            packed += HEADER_BYTES;
            for (long k = pieces[p]; k < pieces[p + 1]; k++, packed += INT4_OCTET_BYTES)
                pack_octet(values + first * num_inputs + k * OCTET, (uint16_t *)packed, num_inputs,
                           count);
        }
    }
}

/* Copies the inputs of one row that belong to the pieces from `first` up to `last`. */
static void copy_inputs(const Weights *weights, const bf16 *given, long first, long last, Factor *x)
{
    long from = start_of(weights, first) * OCTET;
    long count = start_of(weights, last) * OCTET - from;
    if (weights->order) {
        for (long k = 0; k < count; k++) {
            int32_t input = weights->order[from + k];
            x[k] = factor_of(input < 0 ? 0 : given[input]);
        }
        return;
    }
    long num_given = min(count, weights->num_inputs - from);
    for (long k = 0; k < num_given; k++) x[k] = factor_of(given[from + k]);
    for (long k = num_given; k < count; k++) x[k] = 0;
}

/* Adds up the inputs of one row in each piece. */
static void add_up(const Weights *weights, const Factor *x, long first, long last, float *totals)
{
    for (long p = first; p < last; p++) {
        long count = (start_of(weights, p + 1) - start_of(weights, p)) * OCTET;
        totals[p - first] = total_of(x, count);
        x += count;
    }
}

/* Adds the products of a block with the pieces from `first` up to `last` of one panel. */
static void multiply_panel(const Weights *weights, Block block, const char *panel, long first,
                           long last, float *sums)
{
    int is_int4 = weights->kind == INT4;
    for (long p = first; p < last; p++) {
        const char *packed = panel + bytes_before(weights, p);
        Piece piece = {
            .w = packed + (is_int4 ? HEADER_BYTES : 0),
            .header = is_int4 ? packed : 0,
            .num_octets = start_of(weights, p + 1) - start_of(weights, p),
        };
        multiply_piece(weights->kind, &piece, &block, sums);
        block.x += piece.num_octets * OCTET;
        block.totals++;
    }
}

/* The piece after the last one of those from `first` on that together have at most this number of
 * inputs. */
static long last_piece(const Weights *weights, long first, long num_inputs)
{
    long most = start_of(weights, first) + num_inputs / OCTET;
    long last = first + 1;
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
    long num_panels = (weights->num_outputs + INT4_PANEL - 1) / INT4_PANEL;
    long num_blocks = (num_rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    long block_rows = num_blocks ? (num_rows + num_blocks - 1) / num_blocks : 1;
    long share = num_panels / (TASKS_PER_THREAD * num_threads);
    long group = min(MAX_SUMS / (INT4_PANEL * block_rows), share > 1 ? share : 1);
    return (Division){group, block_rows, num_blocks, (num_panels + group - 1) / group};
}

long num_quantized_tasks(const Weights *weights, long num_rows, int num_threads)
{
    Division division = divide(weights, num_rows, num_threads);
    return division.num_groups * division.num_blocks;
}

/* Computes the sums [panels][num_rows][INT4_PANEL] of panels with `width` outputs. */
static void multiply(const Weights *weights, const char *panels, long width, const bf16 *given,
                     long given_stride, long num_rows, float *sums)
{
    Factor x[MAX_ENTRIES] __attribute__((aligned(64)));
    float totals[MAX_ENTRIES / OCTET];
    long num_pieces = num_pieces_of(weights);
    long panel_bytes = bytes_before(weights, num_pieces);
    /* An odd number of cache lines, so that rows do not displace each other from the cache. */
    long room = ((MAX_ENTRIES / num_rows / LINE - 1) | 1) * LINE;
    Block block = {x, room, totals, room / OCTET, num_rows};
    memset(sums, 0, (width + INT4_PANEL - 1) / INT4_PANEL * INT4_PANEL * num_rows * sizeof *sums);
    for (long first = 0, last; first < num_pieces; first = last) {
        last = last_piece(weights, first, room);
        for (long i = 0; i < num_rows; i++) {
            copy_inputs(weights, given + i * given_stride, first, last, x + i * room);
            if (weights->kind == INT4)
                add_up(weights, x + i * room, first, last, totals + i * block.totals_stride);
        }
        for (long n = 0; n < width; n += INT4_PANEL)
            multiply_panel(weights, block, panels + n / INT4_PANEL * panel_bytes, first, last,
                           sums + n * num_rows);
    }
}

/* Applies scales, bias and residual to `count` sums of one row. */
static void finish(const float *sums, const float *scales, const bf16 *bias, const bf16 *residual,
                   bf16 *y, long count)
{
    for (long n = 0; n < count; n++)
        y[n] = narrow(sums[n] * scales[n] + (bias ? widen(bias[n]) : 0) +
                      (residual ? widen(residual[n]) : 0));
}

void quantized_task(const Weights *weights, const Rows *rows, int num_threads, long task)
{
    float sums[MAX_SUMS] __attribute__((aligned(64)));
    Division division = divide(weights, rows->num_rows, num_threads);
    long row = task % division.num_blocks * division.block_rows;
    long num_rows = min(division.block_rows, rows->num_rows - row);
    long panel = task / division.num_blocks * division.group;
    long first = panel * INT4_PANEL;
    long width = min(division.group * INT4_PANEL, weights->num_outputs - first);
    const char *panels =
        (const char *)weights->packed + panel * bytes_before(weights, num_pieces_of(weights));
    multiply(weights, panels, width, rows->x + row * rows->x_stride, rows->x_stride, num_rows,
             sums);
    for (long n = 0; n < width; n += INT4_PANEL)
        for (long i = 0; i < num_rows; i++) {
            long at = (row + i) * weights->num_outputs + first + n;
            finish(sums + n * num_rows + i * INT4_PANEL, weights->scales + first + n,
                   weights->bias ? weights->bias + first + n : 0,
                   rows->residual ? rows->residual + at : 0, rows->y + at,
                   min(INT4_PANEL, width - n));
        }
}
