/* Attention over a float16 cache. Keys lie in tiles of 16 positions, [head_dim, 16] each, so that a vector holds one number of 16 keys. */
#pragma once

#include "model.h"

enum { CHUNK = 256, QUERIES = 4 };

INLINE uint16_t *cache_of(const hs_model *model, uint16_t *cache, int layer, int slot, int head) {
    size_t at = ((size_t)layer * model->slots + slot) * model->kv_heads + head;
    return cache + at * model->capacity * model->head_dim;
}

static void rotate(const hs_model *model, float *head, int position) {
    const int half = model->head_dim / 2;
    const float *cosine = model->cosine + (size_t)position * half, *sine = model->sine + (size_t)position * half;
    for (int i = 0; i < half; i++) {
        float first = head[i], second = head[i + half];
        head[i] = first * cosine[i] - second * sine[i];
        head[i + half] = second * cosine[i] + first * sine[i];
    }
}

INLINE void score_tile(const float *const *query, int count, const uint16_t *keys, int dim, float scale, float *const *to) {
    vf total[QUERIES];
    for (int q = 0; q < count; q++) total[q] = (vf){0};
    for (int d = 0; d < dim; d++) {
        vf key = load_half(keys + (size_t)d * LANES);
#pragma GCC unroll 4
        for (int q = 0; q < count; q++) total[q] += key * query[q][d];
    }
    for (int q = 0; q < count; q++) store(to[q], total[q] * scale);
}

/* `width` vectors of the values from `at` on, weighted and summed over positions. */
INLINE void blend(const float *const *weight, int count, const uint16_t *values, int positions, int dim, int at, int width, float *const *to) {
    vf total[QUERIES][4];
    for (int q = 0; q < count; q++)
        for (int i = 0; i < width; i++) total[q][i] = (vf){0};
    for (int position = 0; position < positions; position++) {
        const uint16_t *row = values + (size_t)position * dim + at;
#pragma GCC unroll 4
        for (int i = 0; i < width; i++) {
            const vf value = load_half(row + i * LANES);
#pragma GCC unroll 4
            for (int q = 0; q < count; q++) total[q][i] += value * weight[q][position];
        }
    }
    for (int q = 0; q < count; q++)
        for (int i = 0; i < width; i++) store(to[q] + at + i * LANES, total[q][i]);
}

#define BY_COUNT(call)                                                                                                              \
    switch (count) {                                                                                                                \
    case 1: { enum { n = 1 }; call; } break;                                                                                        \
    case 2: { enum { n = 2 }; call; } break;                                                                                        \
    case 3: { enum { n = 3 }; call; } break;                                                                                        \
    default: { enum { n = 4 }; call; } break;                                                                                       \
    }

/* Up to QUERIES queries of one key-value head over positions first to last; query q sees positions up to its own. Writes to `partial`
 * [head_dim + 2]: blended values, largest score, sum of weights. */
static void attend(const hs_model *model, const uint16_t *keys, const uint16_t *values, const float *const *query, const int *position,
                   int count, int first, int last, float *scores, float *const *partial) {
    const int dim = model->head_dim, stride = (last - first + LANES - 1) / LANES * LANES;
    const float scale = 1.0f / sqrtf((float)dim);
    float *rows[QUERIES];
    for (int q = 0; q < count; q++) rows[q] = scores + (size_t)q * stride;
    for (int tile = first; tile < last; tile += LANES) {
        float *to[QUERIES];
        for (int q = 0; q < count; q++) to[q] = rows[q] + tile - first;
        const uint16_t *tile_keys = keys + (size_t)tile * dim;
        BY_COUNT(score_tile(query, n, tile_keys, dim, scale, to))
    }
    for (int q = 0; q < count; q++) {
        const int seen = (position[q] + 1 < last ? position[q] + 1 : last) - first;
        for (int i = seen; i < stride; i++) rows[q][i] = -INFINITY;
        vf most = splat(-INFINITY);
        for (int i = 0; i < stride; i += LANES) most = select_greater(load(rows[q] + i), most);
        const float top = largest(most);
        vf total = {0};
        for (int i = 0; i < stride; i += LANES) {
            vf weight = exponential(load(rows[q] + i) - top);
            total += weight;
            store(rows[q] + i, weight);
        }
        partial[q][dim] = top;
        partial[q][dim + 1] = sum(total);
    }
    const float *const *weights = (const float *const *)rows;
    values += (size_t)first * dim;
    int at = 0;
    for (; at + 4 * LANES <= dim; at += 4 * LANES) BY_COUNT(blend(weights, n, values, last - first, dim, at, 4, partial))
    for (; at < dim; at += LANES) BY_COUNT(blend(weights, n, values, last - first, dim, at, 1, partial))
}
