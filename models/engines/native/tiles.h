/* A group of matrix rows times 16 rows of activations at once, on the tiles of AMX where the CPU has them: prompts take a third of the
 * time. The sums of codes are whole numbers and what becomes of them is written once (products.h), so not a bit differs from the other way.
 *
 * A record's codes are a tile already: 8 quads of columns, of each of 16 rows. The kernel keeps the tiles' 8 KB for those threads only that
 * ask for them; a process that may not have them goes the other way.
 */
#pragma once

#include "products.h"

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <sys/syscall.h>
#include <unistd.h>

enum { TILED = 16, ASK_FOR_STATE = 0x1023, TILE_DATA = 18 };
/* Registers, whose names GCC makes of these. */
#define CODES 0
#define HIGH 1
#define LOW 2
#define HIGH_SUMS 3
#define LOW_SUMS 4

static int may_use_tiles(void) { return syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA) == 0; }

static void begin_tiles(void) {
    struct {
        uint8_t palette, start, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((aligned(64))) shape = {.palette = 1};
    for (int tile = 0; tile < 5; tile++) {
        shape.bytes[tile] = tile == HIGH || tile == LOW ? BLOCK : 64;
        shape.rows[tile] = tile == CODES ? QUADS : TILED;
    }
    /* GCC 12 says of its intrinsic that it reads eight bytes, and may leave the others unwritten: the first tile is then no instruction. */
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
}

static void end_tiles(void) { _tile_release(); }

/* Of one block: sums of codes for each row of activations. */
typedef struct {
    vi high[TILED], low[TILED];
} tiled_sums;

/* GCC does not say of its intrinsics that they see what was written to memory before. */
INLINE void tile_block(const uint8_t *record, rounded x, int blocks, int block, tiled_sums *sums, int bits, int is_fine) {
    uint8_t codes[CODES8] __attribute__((aligned(64)));
    const uint8_t *tile = record;
    if (bits == 4) {
        for (int i = 0; i < 4; i++) {
            const quads both = load_quads(record + 64 * i);
            _mm512_store_si512(codes + 64 * i, low_half(both));
            _mm512_store_si512(codes + 64 * (i + 4), high_half(both));
        }
        tile = codes;
    }
    __asm__ volatile("" ::: "memory");
    _tile_loadd(CODES, tile, 64);
    _tile_loadd(HIGH, x.codes + (size_t)block * BLOCK, (size_t)blocks * BLOCK);
    _tile_zero(HIGH_SUMS);
    _tile_dpbssd(HIGH_SUMS, HIGH, CODES);
    if (is_fine) {
        _tile_loadd(LOW, x.low + (size_t)block * BLOCK, (size_t)blocks * BLOCK);
        _tile_zero(LOW_SUMS);
        _tile_dpbssd(LOW_SUMS, LOW, CODES);
    }
    _tile_stored(HIGH_SUMS, sums->high, 64);
    if (is_fine) _tile_stored(LOW_SUMS, sums->low, 64);
    __asm__ volatile("" ::: "memory");
}

/* The sums of a block are on their way while those of the block before become numbers. */
INLINE void multiply_tiled(const hs_matrix *matrix, int group, rounded x, float *to, int stride, int adds, int bits, int is_fine) {
    const int blocks = matrix->columns / BLOCK;
    const size_t bytes = record_bytes(bits, matrix->has_offset, matrix->is_wide);
    const uint8_t *record = matrix->records + (size_t)group * blocks * bytes;
    tiled_sums sums[2];
    vf totals[TILED];
    for (int t = 0; t < TILED; t++) totals[t] = (vf){0};
    tile_block(record, x, blocks, 0, sums, bits, is_fine);
    for (int block = 0; block < blocks; block++, record += bytes) {
        if (block + 1 < blocks) tile_block(record + bytes, x, blocks, block + 1, sums + (block + 1) % 2, bits, is_fine);
        const tiled_sums *now = sums + block % 2;
        const factors of = load_block_factors(matrix, record, bits);
#pragma GCC unroll 16
        for (int t = 0; t < TILED; t++) {
            const vi whole = is_fine ? (now->high[t] << 7) + now->low[t] : now->high[t];
            totals[t] = scaled(totals[t], whole, of, matrix, x, (size_t)t * blocks + block, bits);
        }
    }
    finish_rows(matrix, group, totals, TILED, to, stride, adds);
}

/* As many rows of activations as fill tiles; returns how many. */
static int multiply_tiles(const hs_matrix *matrix, int group, rounded x, int count, float *to, int stride, int adds) {
    const int blocks = matrix->columns / BLOCK;
    int t = 0;
    for (; t + TILED <= count; t += TILED) {
        const rounded rows = row_of(x, blocks, t);
        float *at = to + (size_t)t * stride;
        if (matrix->bits == 4 && x.low) multiply_tiled(matrix, group, rows, at, stride, adds, 4, 1);
        else if (matrix->bits == 4) multiply_tiled(matrix, group, rows, at, stride, adds, 4, 0);
        else if (x.low) multiply_tiled(matrix, group, rows, at, stride, adds, 8, 1);
        else multiply_tiled(matrix, group, rows, at, stride, adds, 8, 0);
    }
    return t;
}
#else
static int may_use_tiles(void) { return 0; }
static void begin_tiles(void) {}
static void end_tiles(void) {}
static int multiply_tiles(const hs_matrix *matrix, int group, rounded x, int count, float *to, int stride, int adds) { return 0; }
#endif
