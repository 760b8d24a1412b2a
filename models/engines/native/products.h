/* Quantised matrices times activations rounded block by block: to 8 bits as llama.cpp does, or to 15 bits in two planes of 8-bit codes,
 * 128 * code + low, which leaves the answers of float32.
 *
 * A matrix is kept in groups of 16 output rows; in a group there is one record for each block of 32 columns: codes first, then 16 scales
 * and, if the matrix has offsets, 16 offsets, all float16, or float32 in a wide matrix. Codes are quads of neighbouring columns, row after
 * row, so that one instruction holds a quad of each of the 16 rows: 4-bit codes 0..15, quads j and j + 4 in the low and high halves of the
 * same bytes; 8-bit codes -128..127. A value is scale * code + offset; 4-bit codes without offsets stand for code - 8.
 */
#pragma once

#include "vectors.h"

typedef struct {
    const uint8_t *records;
    const float *bias;                        /* [rows] or NULL */
    int32_t rows, columns;                    /* rows: a multiple of 16, padded with zeros */
    int32_t bits, has_offset, is_wide;
} hs_matrix;

/* Rows of activations, quantised block by block. */
typedef struct {
    int8_t *codes, *low; /* low is NULL where activations have 8 bits */
    float *scale, *sum; /* of each block: its scale; its scale times the sum of its codes */
    int32_t *total;     /* of each block: -128 times that sum */
} rounded;

/* One quad of each of 16 rows times one quad of activations, added. `code` unsigned below 16 (4 bits) or signed (8 bits). */
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
typedef __m512i quads;
INLINE quads load_quads(const uint8_t *from) { return _mm512_loadu_si512(from); }
INLINE quads low_half(quads codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(15)); }
INLINE quads high_half(quads codes) { return _mm512_and_si512(_mm512_srli_epi16(codes, 4), _mm512_set1_epi8(15)); }
INLINE quads as_unsigned(quads codes) { return _mm512_xor_si512(codes, _mm512_set1_epi8(-128)); }
INLINE vi multiply4(vi total, quads codes, int32_t x) { return (vi)_mm512_dpbusd_epi32((__m512i)total, codes, _mm512_set1_epi32(x)); }
#define multiply8 multiply4
enum { SHIFTS_SIGNED = 1 }; /* as_unsigned adds 128, which `total` takes away */
#elif defined(__AVX2__)
typedef struct { __m256i part[2]; } quads;
INLINE quads load_quads(const uint8_t *from) {
    return (quads){{_mm256_loadu_si256((const __m256i *)from), _mm256_loadu_si256((const __m256i *)(from + 32))}};
}
INLINE quads low_half(quads codes) {
    for (int i = 0; i < 2; i++) codes.part[i] = _mm256_and_si256(codes.part[i], _mm256_set1_epi8(15));
    return codes;
}
INLINE quads high_half(quads codes) {
    for (int i = 0; i < 2; i++) codes.part[i] = _mm256_and_si256(_mm256_srli_epi16(codes.part[i], 4), _mm256_set1_epi8(15));
    return codes;
}
INLINE quads as_unsigned(quads codes) { return codes; }
INLINE vi multiply4(vi total, quads codes, int32_t x) {
    union { vi all; __m256i part[2]; } sums = {total};
    for (int i = 0; i < 2; i++) {
        __m256i pairs = _mm256_maddubs_epi16(codes.part[i], _mm256_set1_epi32(x));
        sums.part[i] = _mm256_add_epi32(sums.part[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return sums.all;
}
INLINE vi multiply8(vi total, quads codes, int32_t x) {
    union { vi all; __m256i part[2]; } sums = {total};
    for (int i = 0; i < 2; i++) {
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes.part[i]), _mm256_sign_epi8(_mm256_set1_epi32(x), codes.part[i]));
        sums.part[i] = _mm256_add_epi32(sums.part[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return sums.all;
}
enum { SHIFTS_SIGNED = 0 };
#elif defined(__aarch64__)
typedef struct { int8x16_t part[4]; } quads;
INLINE quads load_quads(const uint8_t *from) {
    quads codes;
    for (int i = 0; i < 4; i++) codes.part[i] = vld1q_s8((const int8_t *)from + 16 * i);
    return codes;
}
INLINE quads low_half(quads codes) {
    for (int i = 0; i < 4; i++) codes.part[i] = vandq_s8(codes.part[i], vdupq_n_s8(15));
    return codes;
}
INLINE quads high_half(quads codes) {
    for (int i = 0; i < 4; i++) codes.part[i] = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(codes.part[i]), 4));
    return codes;
}
INLINE quads as_unsigned(quads codes) { return codes; }
INLINE vi multiply4(vi total, quads codes, int32_t x) {
    union { vi all; int32x4_t part[4]; } sums = {total};
    int8x16_t repeated = vreinterpretq_s8_s32(vdupq_n_s32(x));
    for (int i = 0; i < 4; i++) {
#if defined(__ARM_FEATURE_DOTPROD)
        sums.part[i] = vdotq_s32(sums.part[i], codes.part[i], repeated);
#else
        int16x8_t low = vmull_s8(vget_low_s8(codes.part[i]), vget_low_s8(repeated));
        int16x8_t high = vmull_s8(vget_high_s8(codes.part[i]), vget_high_s8(repeated));
        sums.part[i] = vaddq_s32(sums.part[i], vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
    }
    return sums.all;
}
#define multiply8 multiply4
enum { SHIFTS_SIGNED = 0 };
#else
#error "the native engine is written for AVX2, AVX-512 and NEON"
#endif

enum { BLOCK = 32, QUADS = 8, TILE = 8, CODES4 = 256, CODES8 = 512 };

INLINE size_t factor_bytes(int is_wide) { return is_wide ? 4 * LANES : 2 * LANES; }

INLINE size_t record_bytes(int bits, int has_offset, int is_wide) {
    return (bits == 4 ? CODES4 : CODES8) + (has_offset ? 2 : 1) * factor_bytes(is_wide);
}

INLINE vf load_factors(const uint8_t *from, int is_wide) { return is_wide ? load((const float *)from) : load_half((const uint16_t *)from); }

INLINE rounded row_of(rounded x, int blocks, int row) {
    const size_t at = (size_t)row * blocks;
    return (rounded){x.codes + at * BLOCK, x.low ? x.low + at * BLOCK : NULL, x.scale + at, x.sum + at, x.total + at};
}

INLINE vi multiply_block(vi whole, const quads *codes, const int8_t *x, int bits) {
#pragma GCC unroll 8
    for (int i = 0; i < QUADS; i++) {
        int32_t quad;
        memcpy(&quad, x + 4 * i, 4);
        whole = bits == 4 ? multiply4(whole, codes[i], quad) : multiply8(whole, codes[i], quad);
    }
    return whole;
}

/* Of one block of 16 matrix rows. */
typedef struct {
    vf scale, offset;
} factors;

INLINE factors load_block_factors(const hs_matrix *matrix, const uint8_t *record, int bits) {
    const uint8_t *from = record + (bits == 4 ? CODES4 : CODES8);
    const vf scale = load_factors(from, matrix->is_wide);
    return (factors){scale, matrix->has_offset ? load_factors(from + factor_bytes(matrix->is_wide), matrix->is_wide) : scale * -8.0f};
}

/* `total` and the numbers that the sums of codes `whole` of a block stand for; `at`: its place among the blocks of x. */
INLINE vf scaled(vf total, vi whole, factors of, const hs_matrix *matrix, rounded x, size_t at, int bits) {
    total += __builtin_convertvector(whole, vf) * (of.scale * x.scale[at]);
    if (bits == 4 || matrix->has_offset) total += of.offset * x.sum[at];
    return total;
}

INLINE void finish_rows(const hs_matrix *matrix, int group, const vf *totals, int count, float *to, int stride, int adds) {
    const vf bias = matrix->bias ? load(matrix->bias + group * LANES) : (vf){0};
#pragma GCC unroll 16
    for (int t = 0; t < count; t++) {
        float *row = to + (size_t)t * stride;
        store(row, totals[t] + bias + (adds ? load(row) : (vf){0}));
    }
}

/* One group of 16 matrix rows times `tile` rows of activations, to[t * stride]. `tile`, `bits` and `is_fine` are constants
 * where it is inlined. */
INLINE void multiply_tile(const hs_matrix *matrix, int group, rounded x, int tile, float *to, int stride, int adds, int bits, int is_fine) {
    const int blocks = matrix->columns / BLOCK;
    const size_t bytes = record_bytes(bits, matrix->has_offset, matrix->is_wide);
    const uint8_t *record = matrix->records + (size_t)group * blocks * bytes;
    vf totals[TILE];
    for (int t = 0; t < tile; t++) totals[t] = (vf){0};
    for (int block = 0; block < blocks; block++, record += bytes) {
        quads codes[QUADS];
        if (bits == 4) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const quads both = load_quads(record + 64 * i);
                codes[i] = low_half(both);
                codes[i + 4] = high_half(both);
            }
        } else {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) codes[i] = as_unsigned(load_quads(record + 64 * i));
        }
        const factors of = load_block_factors(matrix, record, bits);
#pragma GCC unroll 8
        for (int t = 0; t < tile; t++) {
            const size_t at = (size_t)t * blocks + block;
            vi whole = {0};
            whole = multiply_block(whole, codes, x.codes + at * BLOCK, bits);
            if (is_fine) whole = multiply_block(whole << 7, codes, x.low + at * BLOCK, bits);
            if (bits == 8 && SHIFTS_SIGNED) whole = whole + x.total[at];
            totals[t] = scaled(totals[t], whole, of, matrix, x, at, bits);
        }
    }
    finish_rows(matrix, group, totals, tile, to, stride, adds);
}

INLINE void multiply_rows(const hs_matrix *matrix, int group, rounded x, int count, float *to, int stride, int adds, int bits, int is_fine) {
    const int blocks = matrix->columns / BLOCK;
    int t = 0;
#define TILES(tile)                                                                                                                 \
    for (; t + (tile) <= count; t += (tile))                                                                                        \
        multiply_tile(matrix, group, row_of(x, blocks, t), tile, to + (size_t)t * stride, stride, adds, bits, is_fine);
    TILES(8)
    TILES(4)
    TILES(2)
    TILES(1)
#undef TILES
}

/* Rows `group * 16` and 15 more of matrix @ x.T, for all rows of x, to[row * stride]; added to what is there if `adds`. */
static void multiply_group(const hs_matrix *matrix, int group, rounded x, int count, float *to, int stride, int adds) {
    if (matrix->bits == 4 && x.low) multiply_rows(matrix, group, x, count, to, stride, adds, 4, 1);
    else if (matrix->bits == 4) multiply_rows(matrix, group, x, count, to, stride, adds, 4, 0);
    else if (x.low) multiply_rows(matrix, group, x, count, to, stride, adds, 8, 1);
    else multiply_rows(matrix, group, x, count, to, stride, adds, 8, 0);
}

/* Round a row, block by block. */
static void round_row(const float *from, int columns, rounded to) {
    const float range = to.low ? 127.0f * 128.0f : 127.0f;
    const vf magic = splat(12582912.0f);
    for (int block = 0; block < columns / BLOCK; block++) {
        const vf half[2] = {load(from + block * BLOCK), load(from + block * BLOCK + LANES)};
        const float most = largest(select_greater(select_greater(half[0], -half[0]), select_greater(half[1], -half[1])));
        const float scale = most / range, inverse = most > 0 ? range / most : 0;
        vi totals = {0};
        for (int part = 0; part < 2; part++) {
            const vf whole = (half[part] * inverse + magic) - magic;
            const vf high = to.low ? (whole * 0.0078125f + magic) - magic : whole;
            const vi code = __builtin_convertvector(high, vi), low = __builtin_convertvector(whole - high * 128.0f, vi);
            const size_t at = (size_t)block * BLOCK + part * LANES;
            store_codes(to.codes + at, code);
            if (to.low) store_codes(to.low + at, low);
            totals += to.low ? (code << 7) + low : code;
        }
        int32_t total = 0;
        for (int i = 0; i < LANES; i++) total += totals[i];
        to.scale[block] = scale;
        to.sum[block] = scale * (float)total;
        to.total[block] = -128 * total;
    }
}

static void norm_row(const float *from, const float *weight, int width, float epsilon, float *to) {
    vf squares = {0};
    for (int i = 0; i < width; i += LANES) {
        vf value = load(from + i);
        squares += value * value;
    }
    float factor = 1.0f / sqrtf(sum(squares) / (float)width + epsilon);
    for (int i = 0; i < width; i += LANES) store(to + i, load(from + i) * factor * load(weight + i));
}

/* One row of a matrix, as numbers. */
static void unpack_row(const hs_matrix *matrix, int row, float *to) {
    const int blocks = matrix->columns / BLOCK, lane = row % LANES, is_wide = matrix->is_wide;
    const size_t bytes = record_bytes(matrix->bits, matrix->has_offset, is_wide);
    const uint8_t *record = matrix->records + (size_t)(row / LANES) * blocks * bytes;
    for (int block = 0; block < blocks; block++, record += bytes) {
        const uint8_t *factors = record + (matrix->bits == 4 ? CODES4 : CODES8);
        const float scale = load_factors(factors, is_wide)[lane];
        const float offset = matrix->has_offset ? load_factors(factors + factor_bytes(is_wide), is_wide)[lane] : matrix->bits == 4 ? -8.0f * scale : 0.0f;
        for (int i = 0; i < BLOCK; i++) {
            const int quad = i / 4, within = lane * 4 + i % 4;
            int code;
            if (matrix->bits == 8) code = (int8_t)record[64 * quad + within];
            else code = quad < 4 ? record[64 * quad + within] & 15 : record[64 * (quad - 4) + within] >> 4;
            to[block * BLOCK + i] = scale * (float)code + offset;
        }
    }
}
