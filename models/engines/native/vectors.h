/* Vectors of 16 numbers, in GCC's own notation, so that any instruction set gets them in the pieces it has. */
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

enum { LANES = 16 };

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef float vf_u __attribute__((vector_size(64), aligned(4)));

#define INLINE static inline __attribute__((always_inline))

INLINE vf splat(float value) { return value - (vf){0}; }
INLINE vf load(const float *from) { return *(const vf_u *)from; }
INLINE void store(float *to, vf value) { *(vf_u *)to = value; }

INLINE vf load_half(const uint16_t *from) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__aarch64__)
    union { vf all; float32x4_t part[4]; } value;
    for (int i = 0; i < 4; i++) value.part[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + 4 * i)));
    return value.all;
#else
    union { vf all; __m256 part[2]; } value;
    for (int i = 0; i < 2; i++) value.part[i] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from + i));
    return value.all;
#endif
}

INLINE void store_half(uint16_t *to, vf value) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)value, 0));
#elif defined(__aarch64__)
    union { vf all; float32x4_t part[4]; } parts = {value};
    for (int i = 0; i < 4; i++) vst1_u16(to + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(parts.part[i])));
#else
    union { vf all; __m256 part[2]; } parts = {value};
    for (int i = 0; i < 2; i++) _mm_storeu_si128((__m128i *)to + i, _mm256_cvtps_ph(parts.part[i], 0));
#endif
}

INLINE void store_codes(int8_t *to, vi value) {
    typedef int8_t codes __attribute__((vector_size(LANES)));
    const codes narrow = __builtin_convertvector(value, codes);
    memcpy(to, &narrow, LANES);
}

INLINE float sum(vf value) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += value[i];
    return total;
}

INLINE float largest(vf value) {
    float most = value[0];
    for (int i = 1; i < LANES; i++) most = value[i] > most ? value[i] : most;
    return most;
}

INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf select_greater(vf a, vf b) { return choose(a > b, a, b); }

/* exp with a relative error below 2e-7, after Cephes; 0 below -87. */
INLINE vf exponential(vf x) {
    vf low = splat(-87.3f);
    vi vanishes = x < low;
    x = choose(vanishes, low, x);
    vf high = splat(88.3f);
    x = choose(x > high, high, x);
    const vf magic = splat(12582912.0f);
    vf n = (x * 1.44269504088896341f + magic) - magic;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
    return (vf)((vi)(p * (vf)exponent) & ~vanishes);
}
