/* What a decoder is made of; models/engines/native/__init__.py has the same structures. */
#pragma once

#include "products.h"

typedef struct {
    const float *attention_norm, *feed_norm;
    const float *query_norm, *key_norm; /* [head_dim] or NULL */
    hs_matrix query, key, value, output, gate, up, down;
} hs_layer;

typedef struct {
    int32_t layers, heads, kv_heads, head_dim, hidden, inner, vocabulary, slots, capacity, threads, spin, is_fine;
    float epsilon;
    const hs_layer *layer;
    const float *final_norm;
    hs_matrix embedding, head;
    const float *cosine, *sine; /* [capacity, head_dim / 2] */
    uint16_t *keys, *values;     /* float16 [layers, slots, kv_heads, capacity, head_dim]; see attention.h for the order of keys */
} hs_model;

typedef struct {
    int32_t slot, position, first, count; /* first token of the run in the step, tokens in the run */
} hs_run;
