/* A Llama-class decoder on the CPU: quantised weights, activations rounded block by block, float16 key-value cache.
 *
 * One step takes any mixture of tokens, each with the slot it belongs to and its position there: pieces of prompts and running sequences
 * go through the layers together. All sums are taken in an order that depends on a token's own sequence alone, so that no other request
 * and no cut of a prompt changes an answer by a bit.
 *
 * Work is cut into items that threads take from a counter. A phase is over when its items are done, not when all threads have come: a
 * thread whose core was taken away holds up nobody unless it has an item in hand.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>


#include "attention.h"
#include "tiles.h"

enum { MAX_THREADS = 64, ROWS_PER_ITEM = 8, GROUPS_PER_ITEM = 4, TOKENS_PER_ITEM = 8 };

/* `next` has the step in its upper half: a thread that was away while a step ended finds that it has no more part in it. */
typedef struct {
    _Atomic uint64_t next;
    _Atomic int32_t done;
} counter;

typedef struct hs_engine hs_engine;
struct hs_engine {
    hs_model model;
    int32_t max_tokens, has_tiles;
    float *residual, *packed, *attended, *inner, *picked;
    float *partial;
    rounded rows;
    counter *phases;
    int32_t phase_count;
    /* the step in progress */
    int32_t *tokens;
    hs_run *runs;
    int32_t run_count, token_count, logit_count;
    int32_t *logit_tokens;
    float *logits;
    int32_t *run_of; /* of each token */
    /* threads */
    pthread_t threads[MAX_THREADS];
    int32_t thread_count;
    _Atomic int32_t generation, stop;
    float *scores[MAX_THREADS];
};

/* ── phases of a step ────────────────────────────────────────────────────────────────────────────────────────────────────────────── */

typedef struct {
    int index; /* of the next phase in this step, the same in all threads */
    int thread;
    int32_t generation;
    int is_over;
} cursor;

/* Until all items of a phase are done; ends early, and the part of this thread in the step with it, when the step is over. */
static void finish_phase(hs_engine *engine, cursor *cursor, int32_t items) {
    counter *phase = engine->phases + cursor->index++;
    for (int spin = 0; !cursor->is_over && atomic_load_explicit(&phase->done, memory_order_acquire) < items; spin++) {
        if (spin < engine->model.spin) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            __asm__ volatile("yield");
#endif
        } else {
            sched_yield();
        }
        cursor->is_over = atomic_load_explicit(&engine->generation, memory_order_relaxed) != cursor->generation;
    }
}

static int next_item(hs_engine *engine, cursor *cursor, int32_t items) {
    _Atomic uint64_t *next = &engine->phases[cursor->index].next;
    uint64_t now = atomic_load_explicit(next, memory_order_relaxed);
    while (!cursor->is_over) {
        if ((int32_t)(now >> 32) != cursor->generation) cursor->is_over = 1;
        else if ((int32_t)now >= items) return -1;
        else if (atomic_compare_exchange_weak_explicit(next, &now, now + 1, memory_order_acquire, memory_order_relaxed)) return (int32_t)now;
    }
    return -1;
}

INLINE void item_done(hs_engine *engine, cursor *cursor) {
    atomic_fetch_add_explicit(&engine->phases[cursor->index].done, 1, memory_order_release);
}

#define PHASE(items)                                                                                                                \
    for (int total_items = (items), item, open = 1; open; open = 0, finish_phase(engine, cursor, total_items))                       \
        for (; (item = next_item(engine, cursor, total_items)) >= 0; item_done(engine, cursor))

/* The matrices side by side times all rows, one phase. */
static void product(hs_engine *engine, cursor *cursor, const hs_matrix *matrices, int matrix_count, int count, float *to, int stride, int adds) {
    int groups = 0;
    for (int i = 0; i < matrix_count; i++) groups += matrices[i].rows / LANES;
    PHASE((groups + GROUPS_PER_ITEM - 1) / GROUPS_PER_ITEM) {
        const int last = (item + 1) * GROUPS_PER_ITEM < groups ? (item + 1) * GROUPS_PER_ITEM : groups;
        const hs_matrix *matrix = matrices;
        for (int group = item * GROUPS_PER_ITEM, before = 0; group < last; group++) {
            while (group >= before + matrix->rows / LANES) before += matrix++->rows / LANES;
            float *at = to + group * LANES;
            const int done = engine->has_tiles ? multiply_tiles(matrix, group - before, engine->rows, count, at, stride, adds) : 0;
            const rounded rest = row_of(engine->rows, matrix->columns / BLOCK, done);
            multiply_group(matrix, group - before, rest, count - done, at + (size_t)done * stride, stride, adds);
        }
    }
}

#define EACH_ROW(count)                                                                                                             \
    PHASE(((count) + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM)                                                                            \
        for (int row = item * ROWS_PER_ITEM; row < ((item + 1) * ROWS_PER_ITEM < (count) ? (item + 1) * ROWS_PER_ITEM : (count)); row++)

static void norm_rows(hs_engine *engine, cursor *cursor, const float *from, const int32_t *which, int count, const float *weight) {
    const int width = engine->model.hidden;
    EACH_ROW(count) {
        float normed[width] __attribute__((aligned(64)));
        norm_row(from + (size_t)(which ? which[row] : row) * width, weight, width, engine->model.epsilon, normed);
        round_row(normed, width, row_of(engine->rows, width / BLOCK, row));
    }
}

/* RoPE of the queries and keys of one token; its keys and values go into the cache. */
static void remember(hs_engine *engine, int layer, int token) {
    const hs_model *model = &engine->model;
    const hs_layer *weights = model->layer + layer;
    const hs_run *run = engine->runs + engine->run_of[token];
    const int dim = model->head_dim, position = run->position + token - run->first;
    const int width = (model->heads + 2 * model->kv_heads) * dim;
    float *packed = engine->packed + (size_t)token * width;
    for (int head = 0; head < model->heads + model->kv_heads; head++) {
        const float *norm = head < model->heads ? weights->query_norm : weights->key_norm;
        if (norm) norm_row(packed + head * dim, norm, dim, model->epsilon, packed + head * dim);
        rotate(model, packed + head * dim, position);
    }
    for (int head = 0; head < model->kv_heads; head++) {
        const float *key = packed + (model->heads + head) * dim, *value = key + model->kv_heads * dim;
        uint16_t *keys = cache_of(model, model->keys, layer, run->slot, head) + (size_t)(position / LANES) * LANES * dim + position % LANES;
        uint16_t *values = cache_of(model, model->values, layer, run->slot, head) + (size_t)position * dim;
        for (int i = 0; i < dim; i += LANES) {
            uint16_t halves[LANES];
            store_half(halves, load(key + i));
            for (int j = 0; j < LANES; j++) keys[(size_t)(i + j) * LANES] = halves[j];
            store_half(values + i, load(value + i));
        }
    }
}

/* Where run and item of attention lie: returns the run and what is left of `item` within it. */
static const hs_run *locate(hs_engine *engine, int *item, int *items) {
    int before = 0;
    for (int run = 0; run < engine->run_count; run++) {
        const hs_run *this = engine->runs + run;
        int own = engine->model.kv_heads * (this->count > 1 ? (this->count + TOKENS_PER_ITEM - 1) / TOKENS_PER_ITEM : this->position / CHUNK + 1);
        if (item && *item < before + own) {
            *item -= before;
            return this;
        }
        before += own;
    }
    if (items) *items = before;
    return NULL;
}

/* Room for the chunks of one head of the single token of a slot. */
static float *partial_of(hs_engine *engine, int slot, int head) {
    const hs_model *model = &engine->model;
    const size_t chunks = (size_t)(model->capacity + CHUNK - 1) / CHUNK;
    return engine->partial + ((size_t)slot * model->heads + head) * chunks * (model->head_dim + 2);
}

/* Attention over all positions from that over each chunk: always in this order, so that no batch changes an answer. */
static void join_chunks(const float *partial, int chunks, int dim, float *to) {
    float most = -INFINITY, total = 0;
    for (int chunk = 0; chunk < chunks; chunk++) most = fmaxf(most, partial[chunk * (dim + 2) + dim]);
    for (int i = 0; i < dim; i += LANES) store(to + i, (vf){0});
    for (int chunk = 0; chunk < chunks; chunk++, partial += dim + 2) {
        const float factor = expf(partial[dim] - most);
        total += factor * partial[dim + 1];
        for (int i = 0; i < dim; i += LANES) store(to + i, load(to + i) + load(partial + i) * factor);
    }
    for (int i = 0; i < dim; i += LANES) store(to + i, load(to + i) * (1.0f / total));
}

/* Queries of tokens `from` to `to` of a run that share a key-value head, over the chunks `chunk` to `end`. A run of several tokens gets
 * its result here, a single token one chunk of it. */
static void attend_run(hs_engine *engine, const hs_run *run, int layer, int kv_head, int from, int to, int chunk, int end, int thread) {
    const hs_model *model = &engine->model;
    const int dim = model->head_dim, group = model->heads / model->kv_heads, width = (model->heads + 2 * model->kv_heads) * dim;
    const int chunks = (model->capacity + CHUNK - 1) / CHUNK, queries = (to - from) * group;
    const uint16_t *keys = cache_of(model, model->keys, layer, run->slot, kv_head);
    const uint16_t *values = cache_of(model, model->values, layer, run->slot, kv_head);
    float *own = engine->scores[thread] + QUERIES * CHUNK;
    for (int start = 0; start < queries; start += QUERIES) {
        const float *query[QUERIES];
        float *room[QUERIES];
        int position[QUERIES], head[QUERIES], count = queries - start < QUERIES ? queries - start : QUERIES;
        for (int q = 0; q < count; q++) {
            const int offset = from + (start + q) / group;
            head[q] = kv_head * group + (start + q) % group;
            query[q] = engine->packed + (size_t)(run->first + offset) * width + head[q] * dim;
            position[q] = run->position + offset;
            room[q] = run->count == 1 ? partial_of(engine, run->slot, head[q]) : own + (size_t)q * chunks * (dim + 2);
        }
        for (int c = chunk; c < end && c * CHUNK <= position[count - 1]; c++) {
            float *partial[QUERIES];
            for (int q = 0; q < count; q++) partial[q] = room[q] + (size_t)c * (dim + 2);
            const int last = (c + 1) * CHUNK <= position[count - 1] ? (c + 1) * CHUNK : position[count - 1] + 1;
            attend(model, keys, values, query, position, count, c * CHUNK, last, engine->scores[thread], partial);
        }
        for (int q = 0; q < count && run->count > 1; q++) {
            const size_t token = (size_t)(run->first + position[q] - run->position);
            join_chunks(room[q], position[q] / CHUNK + 1, dim, engine->attended + (token * model->heads + head[q]) * dim);
        }
    }
}

static void attention(hs_engine *engine, cursor *cursor, int layer) {
    int items = 0;
    locate(engine, NULL, &items);
    PHASE(items) {
        int rest = item;
        const hs_run *run = locate(engine, &rest, NULL);
        const int kv_head = rest % engine->model.kv_heads, part = rest / engine->model.kv_heads;
        const int from = part * TOKENS_PER_ITEM, to = from + TOKENS_PER_ITEM;
        if (run->count == 1) attend_run(engine, run, layer, kv_head, 0, 1, part, part + 1, cursor->thread);
        else attend_run(engine, run, layer, kv_head, from, to < run->count ? to : run->count, 0, INT_MAX, cursor->thread);
    }
}

static void round_attended(hs_engine *engine, int token) {
    const hs_model *model = &engine->model;
    const hs_run *run = engine->runs + engine->run_of[token];
    const int dim = model->head_dim, width = model->heads * dim;
    float *attended = engine->attended + (size_t)token * width;
    for (int head = 0; head < model->heads && run->count == 1; head++)
        join_chunks(partial_of(engine, run->slot, head), run->position / CHUNK + 1, dim, attended + head * dim);
    round_row(attended, width, row_of(engine->rows, width / BLOCK, token));
}

static void gate_row(const float *from, int inner, float *to, rounded rows) {
    for (int i = 0; i < inner; i += LANES) {
        vf gate = load(from + i);
        store(to + i, gate / (exponential(-gate) + 1.0f) * load(from + inner + i));
    }
    round_row(to, inner, rows);
}

static void take_step(hs_engine *engine, int thread, int32_t generation) {
    cursor here = {.thread = thread, .generation = generation}, *cursor = &here;
    const hs_model *model = &engine->model;
    const int count = engine->token_count, hidden = model->hidden, inner = model->inner;
    const int width = (model->heads + 2 * model->kv_heads) * model->head_dim;
    if (engine->has_tiles) begin_tiles();
    EACH_ROW(count) unpack_row(&model->embedding, engine->tokens[row], engine->residual + (size_t)row * hidden);
    for (int layer = 0; layer < model->layers && !cursor->is_over; layer++) {
        const hs_layer *weights = model->layer + layer;
        norm_rows(engine, cursor, engine->residual, NULL, count, weights->attention_norm);
        product(engine, cursor, &weights->query, 3, count, engine->packed, width, 0);
        EACH_ROW(count) remember(engine, layer, row);
        attention(engine, cursor, layer);
        EACH_ROW(count) round_attended(engine, row);
        product(engine, cursor, &weights->output, 1, count, engine->residual, hidden, 1);
        norm_rows(engine, cursor, engine->residual, NULL, count, weights->feed_norm);
        product(engine, cursor, &weights->gate, 2, count, engine->inner, 2 * inner, 0);
        EACH_ROW(count) {
            float *values = engine->inner + (size_t)row * 2 * inner;
            gate_row(values, inner, values, row_of(engine->rows, inner / BLOCK, row));
        }
        product(engine, cursor, &weights->down, 1, count, engine->residual, hidden, 1);
    }
    norm_rows(engine, cursor, engine->residual, engine->logit_tokens, engine->logit_count, model->final_norm);
    product(engine, cursor, &model->head, 1, engine->logit_count, engine->logits, model->head.rows, 0);
    if (engine->has_tiles) end_tiles();
}

/* ── threads ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────── */

static void sleep_while(_Atomic int32_t *word, int32_t value) { syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0); }
static void wake_all(_Atomic int32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0); }

typedef struct {
    hs_engine *engine;
    int thread;
} start;

static void *work(void *argument) {
    start own = *(start *)argument;
    free(argument);
    int32_t seen = 0;
    for (;;) {
        int32_t now;
        while ((now = atomic_load(&own.engine->generation)) == seen) sleep_while(&own.engine->generation, seen);
        seen = now;
        if (atomic_load(&own.engine->stop)) return NULL;
        take_step(own.engine, own.thread, now);
    }
}

static void *room(size_t bytes) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, bytes + 64) ? NULL : memory;
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

void hs_close(hs_engine *engine);

hs_engine *hs_open(const hs_model *model, int32_t max_tokens) {
    hs_engine *engine = calloc(1, sizeof *engine);
    if (!engine) return NULL;
    engine->model = *model;
    engine->max_tokens = max_tokens;
    engine->has_tiles = may_use_tiles();
    const size_t tokens = (size_t)max_tokens, attended = (size_t)model->heads * model->head_dim;
    const size_t widest = larger(larger((size_t)model->hidden, (size_t)model->inner), attended);
    const size_t chunks = (size_t)(model->capacity + CHUNK - 1) / CHUNK;
    const size_t partials = (size_t)model->slots * chunks * model->heads * (model->head_dim + 2);
    engine->phase_count = 3 + 10 * model->layers;
    engine->residual = room(tokens * model->hidden * 4);
    engine->packed = room(tokens * (attended + 2 * (size_t)model->kv_heads * model->head_dim) * 4);
    engine->attended = room(tokens * attended * 4);
    engine->inner = room(tokens * 2 * (size_t)model->inner * 4);
    engine->partial = room(partials * 4);
    engine->rows.codes = room(tokens * widest);
    engine->rows.low = model->is_fine ? room(tokens * widest) : NULL;
    engine->rows.scale = room(tokens * widest / BLOCK * 4);
    engine->rows.sum = room(tokens * widest / BLOCK * 4);
    engine->rows.total = room(tokens * widest / BLOCK * 4);
    engine->run_of = room(tokens * 4);
    engine->tokens = room(tokens * 4);
    engine->logit_tokens = room(tokens * 4);
    engine->runs = room(tokens * sizeof *engine->runs);
    engine->phases = room((size_t)engine->phase_count * sizeof *engine->phases);
    int whole = engine->residual && engine->packed && engine->attended && engine->inner && engine->partial && engine->rows.codes && (engine->rows.low || !model->is_fine) &&
                engine->rows.scale && engine->rows.sum && engine->rows.total && engine->run_of && engine->tokens && engine->logit_tokens && engine->runs && engine->phases;
    for (int thread = 0; thread < model->threads && whole; thread++)
        whole = (engine->scores[thread] = room((CHUNK + chunks * (model->head_dim + 2)) * QUERIES * 4)) != NULL;
    for (int thread = 1; thread < model->threads && whole; thread++) {
        start *argument = malloc(sizeof *argument);
        if (argument) *argument = (start){engine, thread};
        whole = argument && !pthread_create(&engine->threads[engine->thread_count], NULL, work, argument);
        engine->thread_count += whole;
    }
    if (whole) return engine;
    hs_close(engine);
    return NULL;
}

void hs_close(hs_engine *engine) {
    atomic_store(&engine->stop, 1);
    atomic_fetch_add(&engine->generation, 1);
    wake_all(&engine->generation);
    for (int thread = 0; thread < engine->thread_count; thread++) pthread_join(engine->threads[thread], NULL);
    void *all[] = {engine->residual, engine->packed, engine->attended, engine->inner, engine->partial, engine->rows.codes, engine->rows.low, engine->rows.scale,
                   engine->rows.sum, engine->rows.total, engine->run_of, engine->tokens, engine->logit_tokens, engine->runs, engine->phases};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    for (int thread = 0; thread < MAX_THREADS; thread++) free(engine->scores[thread]);
    free(engine);
}

/* Append the tokens of all runs; logits [logit_count, head.rows] after the tokens `logit_tokens`. Everything was checked by the caller. */
void hs_step(hs_engine *engine, const int32_t *tokens, int32_t token_count, const hs_run *runs, int32_t run_count,
             const int32_t *logit_tokens, int32_t logit_count, float *logits) {
    const int32_t generation = atomic_load(&engine->generation) + 1;
    for (int phase = 0; phase < engine->phase_count; phase++) {
        atomic_store_explicit(&engine->phases[phase].next, (uint64_t)(uint32_t)generation << 32, memory_order_relaxed);
        atomic_store_explicit(&engine->phases[phase].done, 0, memory_order_relaxed);
    }
    atomic_thread_fence(memory_order_seq_cst); /* from here on no thread of the last step takes another item */
    memcpy(engine->tokens, tokens, (size_t)token_count * sizeof *tokens);
    memcpy(engine->runs, runs, (size_t)run_count * sizeof *runs);
    memcpy(engine->logit_tokens, logit_tokens, (size_t)logit_count * sizeof *logit_tokens);
    engine->token_count = token_count;
    engine->run_count = run_count;
    engine->logit_count = logit_count;
    engine->logits = logits;
    for (int run = 0; run < run_count; run++)
        for (int i = 0; i < runs[run].count; i++) engine->run_of[runs[run].first + i] = run;
    atomic_store(&engine->generation, generation);
    if (engine->thread_count) wake_all(&engine->generation);
    take_step(engine, 0, generation);
}
