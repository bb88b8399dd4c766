/* One decode step of a whole model: every sequence has one new token, which one crew of threads
 * takes through all layers. As separate calls these would be more than two hundred operations,
 * most of them shorter than the time that it takes to wake a thread. */

#include "crew.h"
#include "decoder.h"

#include <string.h>

/* What one operation leaves for the next, each a matrix with one row per sequence. */
typedef struct {
    bf16 *normed;
    bf16 *qkv;
    bf16 *attended;
    bf16 *gate_up;
    bf16 *gated;
} Scratch;

static Scratch scratch_in(bf16 *workspace, const Layer *layer, long width, long num_seqs)
{
    Scratch s = {.normed = workspace};
    s.qkv = s.normed + num_seqs * width;
    s.attended = s.qkv + num_seqs * layer->qkv.num_outputs;
    s.gate_up = s.attended + num_seqs * layer->o.num_inputs;
    s.gated = s.gate_up + num_seqs * layer->gate_up.num_outputs;
    return s;
}

static void norm_stage(Worker *me, const Decoder *decoder, const bf16 *weight, const bf16 *x,
                       bf16 *y, long num_seqs)
{
    begin_stage(me, num_seqs);
    for (long s; (s = next_task(me)) >= 0;)
        rms_norm_row(x + s * decoder->width, weight, y + s * decoder->width, decoder->eps,
                     decoder->width);
}

static void linear_stage(Worker *me, const Weights *weights, const bf16 *x, const bf16 *residual,
                         bf16 *y, long num_seqs, int num_threads)
{
    Rows rows = {x, weights->num_inputs, residual, y, num_seqs};
    begin_stage(me, num_linear_tasks(weights, num_seqs, num_threads));
    for (long task; (task = next_task(me)) >= 0;) linear_task(weights, &rows, num_threads, task);
}

static void scale_row(bf16 *x, bf16 factor, long width)
{
    for (long j = 0; j < width; j++) x[j] = narrow(widen(x[j]) * widen(factor));
}

/* Rotates queries and keys, scales the queries, and writes keys and values to the KV cache. */
static void store_stage(Worker *me, const Decoder *decoder, const Step *step, bf16 *qkv,
                        bf16 *cache)
{
    long q_width = (long)decoder->num_heads * decoder->dim;
    long kv_width = (long)decoder->num_kv_heads * decoder->dim;
    begin_stage(me, step->num_seqs);
    for (long s; (s = next_task(me)) >= 0;) {
        bf16 *row = qkv + s * (q_width + 2 * kv_width);
        bf16 *keys = cache + step->slots[s] * kv_width;
        rotate_row(row, step->cos + s * decoder->dim, step->signed_sin + s * decoder->dim,
                   decoder->num_heads + decoder->num_kv_heads, decoder->dim);
        if (step->query_scale) scale_row(row, step->query_scale[s], q_width);
        memcpy(keys, row + q_width, kv_width * sizeof(bf16));
        memcpy(keys + step->values_at, row + q_width + kv_width, kv_width * sizeof(bf16));
    }
}

static void attention_stage(Worker *me, const Decoder *decoder, const Step *step, const bf16 *cache,
                            const bf16 *qkv, bf16 *y)
{
    Paged paged = {
        .keys = cache,
        .values = cache + step->values_at,
        .tables = step->tables,
        .contexts = step->contexts,
        .table_stride = step->table_stride,
        .num_heads = decoder->num_heads,
        .num_kv_heads = decoder->num_kv_heads,
        .dim = decoder->dim,
        .block_size = step->block_size,
    };
    long stride = (decoder->num_heads + 2L * decoder->num_kv_heads) * decoder->dim;
    begin_stage(me, num_attention_tasks(&paged, step->num_seqs));
    for (long task; (task = next_task(me)) >= 0;)
        attention_task(&paged, qkv, stride, y, step->partials, task);
    begin_stage(me, num_merge_tasks(&paged, step->num_seqs));
    for (long task; (task = next_task(me)) >= 0;) merge_task(&paged, y, step->partials, task);
}

static void gate_stage(Worker *me, const bf16 *gate_up, bf16 *y, long width, long num_seqs)
{
    begin_stage(me, num_seqs);
    for (long s; (s = next_task(me)) >= 0;)
        silu_mul_row(gate_up + 2 * s * width, y + s * width, width);
}

/* y = the attention of layer i, computed from x, plus the residual if there is one. x, residual
 * and y may be the same matrix. */
static void attention_part(Worker *me, const Decoder *decoder, const Step *step, long i,
                           const bf16 *x, const bf16 *residual, bf16 *y, const Scratch *scratch,
                           int num_threads)
{
    const Layer *layer = decoder->layers + i;
    bf16 *cache = step->cache + i * step->layer_stride;
    norm_stage(me, decoder, layer->input_norm, x, scratch->normed, step->num_seqs);
    linear_stage(me, &layer->qkv, scratch->normed, 0, scratch->qkv, step->num_seqs, num_threads);
    store_stage(me, decoder, step, scratch->qkv, cache);
    attention_stage(me, decoder, step, cache, scratch->qkv, scratch->attended);
    linear_stage(me, &layer->o, scratch->attended, residual, y, step->num_seqs, num_threads);
}

/* y = the MLP of layer i, computed from x, plus the residual, as in `attention_part`. */
static void mlp_part(Worker *me, const Decoder *decoder, const Step *step, long i, const bf16 *x,
                     const bf16 *residual, bf16 *y, const Scratch *scratch, int num_threads)
{
    const Layer *layer = decoder->layers + i;
    norm_stage(me, decoder, layer->mlp_norm, x, scratch->normed, step->num_seqs);
    linear_stage(me, &layer->gate_up, scratch->normed, 0, scratch->gate_up, step->num_seqs,
                 num_threads);
    gate_stage(me, scratch->gate_up, scratch->gated, layer->down.num_inputs, step->num_seqs);
    linear_stage(me, &layer->down, scratch->gated, residual, y, step->num_seqs, num_threads);
}

/* Computes the parts from `first` up to `last` of a step: part 2 * i is the attention of layer i,
 * part 2 * i + 1 its MLP, and the part after the last layer the head.
 *
 * A rank that is alone computes all parts in one call: x [num_seqs, width] becomes the output of
 * the last layer, y [num_seqs, head.num_outputs] the logits. One of several ranks computes part by
 * part: x stays as it is, y becomes its share of what must be added to x. The workspace has room
 * for what `Scratch` holds. */
void decode(const Decoder *decoder, const Step *step, bf16 *x, bf16 *workspace, bf16 *y, long first,
            long last, int num_threads)
{
    Crew crew = {0};
    Scratch scratch = scratch_in(workspace, decoder->layers, decoder->width, step->num_seqs);
    bf16 *residual = decoder->is_share ? 0 : x;
    bf16 *sum = decoder->is_share ? y : x;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        Worker worker = join(&crew);
        Worker *me = &worker;
        for (long part = first; part < last; part++)
            if (part == 2 * decoder->num_layers) {
                norm_stage(me, decoder, decoder->norm, x, scratch.normed, step->num_seqs);
                linear_stage(me, &decoder->head, scratch.normed, 0, y, step->num_seqs, num_threads);
            } else if (part % 2 == 0)
                attention_part(me, decoder, step, part / 2, x, residual, sum, &scratch,
                               num_threads);
            else
                mlp_part(me, decoder, step, part / 2, x, residual, sum, &scratch, num_threads);
    }
}
