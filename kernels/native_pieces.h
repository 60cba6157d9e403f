// Products of float32 matrices on a processor's matrix unit (AMX), which multiplies bfloat16 and adds in float32.
//
// A float32 has 24 significant bits, a bfloat16 has 8: x = high + middle + low exactly, high being the nearest, middle at most 2^-8
// and low less than 2^-16 of it. Of the nine products of two such sums the six largest are made; what is left out is below 2^-23
// of a product, and of either sign. All but high * high are added first, while the sum is small: sums of four products and more
// come closer to the exact ones than sums in float32 do (at 64 the largest error is a fifth), single products may be 2^-23 off.
//
// What differs from float32: numbers and products below 2^-103 (1e-31) lose bits, all but 8 of them by 2^-126, as the unit takes
// what is smaller for zero; infinity, or anything above 3.39e38, becomes NaN, and what overflows becomes infinity or NaN.
#pragma once

namespace titans_graph {

// A tile of the unit: 16 rows of 16 pairs of bfloat16. A matrix is packed as tiles of 16 of its rows (of a left side; of a right
// one, columns) by 32 of the inner index, the three pieces of a tile together. Entries k and k + 16 make a pair, which neither
// side has to shuffle for.
constexpr int64_t TILE = 16, DEEP = 32, PIECE = 1024, PACKED = 3 * PIECE;

static inline void begin_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } shape;
  for (int i = 0; i < 8; i++) {
    shape.bytes[i] = 64;
    shape.rows[i] = TILE;
  }
  asm volatile("ldtilecfg %0" ::"m"(shape));
}

static inline void end_tiles() { asm volatile("tilerelease" ::); }

#define INLINE static inline __attribute__((always_inline))

// The first 8 significant bits.
INLINE __m512i cut(__m512i x) { return _mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000))); }

// The nearest number with 8 significant bits.
INLINE __m512i high(__m512 x) { return cut(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000))); }

// Upper halves of x and y as pairs.
INLINE __m512i paired(__m512i x, __m512i y) {
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(x, 16), y, _mm512_set1_epi32(int(0xffff0000)), 0xf8);
}

// The middle piece is cut off where the high one is rounded: what is then left of the 24 bits fits into the last 8.
INLINE void split(__m512 x, __m512 y, char* to) {
  __m512i a = high(x), b = high(y);
  _mm512_storeu_si512(to, paired(a, b));
  x = _mm512_sub_ps(x, _mm512_castsi512_ps(a));
  y = _mm512_sub_ps(y, _mm512_castsi512_ps(b));
  a = _mm512_castps_si512(x), b = _mm512_castps_si512(y);
  _mm512_storeu_si512(to + PIECE, paired(a, b));
  x = _mm512_sub_ps(x, _mm512_castsi512_ps(cut(a)));
  y = _mm512_sub_ps(y, _mm512_castsi512_ps(cut(b)));
  _mm512_storeu_si512(to + 2 * PIECE, paired(_mm512_castps_si512(x), _mm512_castps_si512(y)));
}

// Rows 4 j to 4 j + 3 of a block of 16 by 16, or (TURN) its columns.
template <bool TURN>
INLINE void four_lines(const float* x, int64_t stride, int64_t j, __m512 (&line)[4]) {
  if constexpr (TURN) {
    __m512 part[4];
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; i++) {
      const float* at = x + 4 * j + i * stride;
      part[i] = _mm512_castps128_ps512(_mm_loadu_ps(at));
      part[i] = _mm512_mask_broadcast_f32x4(part[i], 0x00f0, _mm_loadu_ps(at + 4 * stride));
      part[i] = _mm512_mask_broadcast_f32x4(part[i], 0x0f00, _mm_loadu_ps(at + 8 * stride));
      part[i] = _mm512_mask_broadcast_f32x4(part[i], 0xf000, _mm_loadu_ps(at + 12 * stride));
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(part[0], part[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(part[0], part[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(part[2], part[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(part[2], part[3]));
    line[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    line[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    line[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    line[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  } else {
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; i++) line[i] = _mm512_loadu_ps(x + (4 * j + i) * stride);
  }
}

// One tile. The block at x has 32 rows of 16 where TALL, else 16 rows of 32.
template <bool TALL, bool TURN, bool MINUS>
INLINE void pack_tile(const float* x, int64_t stride, char* to) {
  const int64_t half = TALL ? TILE * stride : TILE;
#pragma GCC unroll 4
  for (int64_t j = 0; j < 4; j++) {
    __m512 first[4], second[4];
    four_lines<TURN>(x, stride, j, first);
    four_lines<TURN>(x + half, stride, j, second);
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; i++) {
      if constexpr (MINUS) {
        const __m512 sign = _mm512_set1_ps(-0.0f);
        first[i] = _mm512_xor_ps(first[i], sign);
        second[i] = _mm512_xor_ps(second[i], sign);
      }
      split(first[i], second[i], to + (4 * j + i) * 64);
    }
  }
}

// One side of a product, `outer` rows of a left side (LEFT) or columns of a right one. Its inner index runs along the rows in
// memory where ALONG, else from row to row, `stride` entries apart. What is missing of the last tiles is zero.
template <bool LEFT, bool ALONG, bool MINUS>
static __attribute__((noinline)) void pack(const float* x, int64_t stride, char* to, int64_t outer, int64_t inner) {
  constexpr bool TURN = LEFT != ALONG, TALL = !ALONG;
  for (int64_t o = 0; o < outer; o += TILE)
    for (int64_t k = 0; k < inner; k += DEEP, to += PACKED) {
      const float* from = x + (ALONG ? o * stride + k : k * stride + o);
      const int64_t left = std::min(TILE, outer - o), deep = std::min(DEEP, inner - k);
      if (left == TILE && deep == DEEP) {
        pack_tile<TALL, TURN, MINUS>(from, stride, to);
        continue;
      }
      alignas(64) float edge[TILE * DEEP] = {};
      const int64_t width = ALONG ? DEEP : TILE, rows = ALONG ? left : deep, columns = ALONG ? deep : left;
      for (int64_t i = 0; i < rows; i++) std::memcpy(edge + i * width, from + i * stride, columns * sizeof(float));
      pack_tile<TALL, TURN, MINUS>(edge, width, to);
    }
}

// One term of a sum: two packed sides, and how many tiles deep they are.
struct Pieces {
  const char *a, *b;
  int64_t deep;
};

// Tiles 0 to 3 hold sums, 4 and 5 a left side, 6 and 7 a right one.
template <int ROWS>
INLINE void load_left(const char* a, int64_t panel) {
  _tile_loadd(4, a, 64);
  if constexpr (ROWS == 2) _tile_loadd(5, a + panel, 64);
}

template <int COLUMNS>
INLINE void load_right(const char* b, int64_t panel) {
  _tile_loadd(6, b, 64);
  if constexpr (COLUMNS == 2) _tile_loadd(7, b + panel, 64);
}

template <int ROWS, int COLUMNS>
INLINE void multiply() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (COLUMNS == 2) _tile_dpbf16ps(1, 4, 7);
  if constexpr (ROWS == 2) _tile_dpbf16ps(2, 5, 6);
  if constexpr (ROWS == 2 && COLUMNS == 2) _tile_dpbf16ps(3, 5, 7);
}

// The names of tiles are part of the instructions.
template <int NUMBER>
INLINE void store_whole(float* out, int64_t bytes) {
  if constexpr (NUMBER == 0) _tile_stored(0, out, bytes);
  if constexpr (NUMBER == 1) _tile_stored(1, out, bytes);
  if constexpr (NUMBER == 2) _tile_stored(2, out, bytes);
  if constexpr (NUMBER == 3) _tile_stored(3, out, bytes);
}

// As many rows and columns of a tile as there are.
template <int NUMBER>
INLINE void store_tile(float* out, int64_t stride, int64_t rows, int64_t columns) {
  if (rows >= TILE && columns >= TILE) return store_whole<NUMBER>(out, stride * sizeof(float));
  alignas(64) float whole[TILE * TILE];
  store_whole<NUMBER>(whole, TILE * sizeof(float));
  for (int64_t i = 0; i < std::min(rows, TILE); i++)
    std::memcpy(out + i * stride, whole + i * TILE, std::min(columns, TILE) * sizeof(float));
}

// ROWS by COLUMNS tiles of the whole sum, from row m and column n.
template <int ROWS, int COLUMNS>
static __attribute__((noinline)) void tiles(
    const Pieces* terms, int count, int64_t m, int64_t n, float* out, int64_t rows, int64_t columns) {
  constexpr int64_t H = 0, M = PIECE, L = 2 * PIECE;
  asm volatile("" ::: "memory");  // Loads of tiles do not tell the compiler that they read memory.
  _tile_zero(0);
  if constexpr (COLUMNS == 2) _tile_zero(1);
  if constexpr (ROWS == 2) _tile_zero(2);
  if constexpr (ROWS == 2 && COLUMNS == 2) _tile_zero(3);
  for (int t = 0; t < count; t++) {
    const int64_t panel = terms[t].deep * PACKED;
    const char *a = terms[t].a + m / TILE * panel, *b = terms[t].b + n / TILE * panel;
    for (const char* end = a + panel; a != end; a += PACKED, b += PACKED) {
      load_left<ROWS>(a + H, panel), load_right<COLUMNS>(b + L, panel), multiply<ROWS, COLUMNS>();
      load_right<COLUMNS>(b + M, panel), multiply<ROWS, COLUMNS>();
      load_left<ROWS>(a + M, panel), multiply<ROWS, COLUMNS>();
      load_right<COLUMNS>(b + H, panel), multiply<ROWS, COLUMNS>();
      load_left<ROWS>(a + L, panel), multiply<ROWS, COLUMNS>();
    }
  }
  for (int t = 0; t < count; t++) {
    const int64_t panel = terms[t].deep * PACKED;
    const char *a = terms[t].a + m / TILE * panel, *b = terms[t].b + n / TILE * panel;
    for (const char* end = a + panel; a != end; a += PACKED, b += PACKED)
      load_left<ROWS>(a + H, panel), load_right<COLUMNS>(b + H, panel), multiply<ROWS, COLUMNS>();
  }
  float* at = out + m * columns + n;
  store_tile<0>(at, columns, rows - m, columns - n);
  if constexpr (COLUMNS == 2) store_tile<1>(at + TILE, columns, rows - m, columns - n - TILE);
  if constexpr (ROWS == 2) store_tile<2>(at + TILE * columns, columns, rows - m - TILE, columns - n);
  if constexpr (ROWS == 2 && COLUMNS == 2)
    store_tile<3>(at + TILE * columns + TILE, columns, rows - m - TILE, columns - n - TILE);
}

template <int COLUMNS>
static void column_of_tiles(const Pieces* terms, int count, int64_t n, float* out, int64_t rows, int64_t columns) {
  int64_t m = 0;
  for (; m + TILE < rows; m += 2 * TILE) tiles<2, COLUMNS>(terms, count, m, n, out, rows, columns);
  if (m < rows) tiles<1, COLUMNS>(terms, count, m, n, out, rows, columns);
}

// out [rows, columns] = sum of terms, without gaps.
static void sum_of_pieces(const Pieces* terms, int count, float* out, int64_t rows, int64_t columns) {
  int64_t n = 0;
  for (; n + TILE < columns; n += 2 * TILE) column_of_tiles<2>(terms, count, n, out, rows, columns);
  if (n < columns) column_of_tiles<1>(terms, count, n, out, rows, columns);
}

#undef INLINE

}  // namespace titans_graph
