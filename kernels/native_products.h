// Sums of small matrix products, for the C++ functions that native_source.py writes. Included after Inductor's prefix, which
// brings at::vec. A chunk of a memory has some 50 products of about 64 by 64 by 256 for every head: libraries reach two thirds to
// four fifths of their own rate at that size and write every product out, where a sum of them can stay in registers.
#pragma once

namespace titans_graph {

template <typename T>
using Vec = at::vec::Vectorized<T>;

// Registers a row of a tile takes: 6 rows of 4 need 24 of the 32 registers of AVX-512, 6 rows of 2 need 12 of 16 elsewhere.
template <typename T>
constexpr int WIDE = sizeof(Vec<T>) == 64 ? 4 : 2;

// One term, plus or minus a @ b: entry (m, k) of a is a[m * a_row + k * a_column], that of b likewise, and k < inner.
template <typename T>
struct Product {
  const T* a;
  int64_t a_row, a_column;
  const T* b;
  int64_t b_row, b_column;
  int64_t inner;
  bool minus;
};

template <typename T, int ROWS, int WIDTH>
using Tile = Vec<T>[ROWS][WIDTH];

// The last of a row's vectors has `rest` values where not FULL.
template <typename T, int ROWS, int WIDTH, bool FULL>
static inline __attribute__((always_inline)) void accumulate(
    Tile<T, ROWS, WIDTH>& sum, const Product<T>& p, int64_t m, int64_t n, int64_t rest) {
  constexpr int64_t L = Vec<T>::size();
  const T* a = p.a + m * p.a_row;
  const T* b = p.b + n;
#pragma GCC unroll 2
  for (int64_t k = 0; k < p.inner; k++) {
    Vec<T> row[WIDTH];
#pragma GCC unroll 16
    for (int j = 0; j < WIDTH; j++)
      row[j] = FULL || j < WIDTH - 1 ? Vec<T>::loadu(b + k * p.b_row + j * L) : Vec<T>::loadu(b + k * p.b_row + j * L, rest);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
      const Vec<T> factor(a[i * p.a_row + k * p.a_column]);
#pragma GCC unroll 16
      for (int j = 0; j < WIDTH; j++) sum[i][j] = at::vec::fmadd(factor, row[j], sum[i][j]);
    }
  }
}

template <typename T, int ROWS, int WIDTH>
static inline __attribute__((always_inline)) void negate(Tile<T, ROWS, WIDTH>& sum) {
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
    for (int j = 0; j < WIDTH; j++) sum[i][j] = sum[i][j].neg();
}

// ROWS rows from m, WIDTH vectors from column n, of the whole sum. Terms to be subtracted come first: negated once, together.
template <typename T, int ROWS, int WIDTH, bool FULL>
static __attribute__((noinline)) void tile(
    const Product<T>* terms, int count, int64_t m, int64_t n, T* out, int64_t columns, int64_t rest) {
  constexpr int64_t L = Vec<T>::size();
  Tile<T, ROWS, WIDTH> sum;
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
    for (int j = 0; j < WIDTH; j++) sum[i][j] = Vec<T>(T(0));
  int t = 0;
  for (; t < count && terms[t].minus; t++) accumulate<T, ROWS, WIDTH, FULL>(sum, terms[t], m, n, rest);
  if (t > 0) negate<T, ROWS, WIDTH>(sum);
  for (; t < count; t++) accumulate<T, ROWS, WIDTH, FULL>(sum, terms[t], m, n, rest);
  T* at = out + m * columns + n;
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
    for (int j = 0; j < WIDTH; j++) {
      if (FULL || j < WIDTH - 1) sum[i][j].store(at + i * columns + j * L);
      else sum[i][j].store(at + i * columns + j * L, rest);
    }
}

template <typename T, int WIDTH, bool FULL>
static void strip(const Product<T>* terms, int count, int64_t n, T* out, int64_t rows, int64_t columns, int64_t rest) {
  constexpr int ROWS = WIDTH == 1 ? 8 : 6;
  int64_t m = 0;
  for (; m + ROWS <= rows; m += ROWS) tile<T, ROWS, WIDTH, FULL>(terms, count, m, n, out, columns, rest);
  for (; m + 4 <= rows; m += 4) tile<T, 4, WIDTH, FULL>(terms, count, m, n, out, columns, rest);
  for (; m < rows; m++) tile<T, 1, WIDTH, FULL>(terms, count, m, n, out, columns, rest);
}

// from [rows, columns] to [columns, rows], the latter without gaps.
template <typename T>
static __attribute__((noinline)) void transpose(const T* from, int64_t stride, T* to, int64_t rows, int64_t columns) {
  constexpr int64_t SIDE = 16;
  for (int64_t m = 0; m < rows; m += SIDE) {
    const int64_t height = std::min(SIDE, rows - m);
    for (int64_t n = 0; n < columns; n += SIDE) {
      const int64_t width = std::min(SIDE, columns - n);
      const T* source = from + m * stride + n;
      T* target = to + n * rows + m;
      if constexpr (std::is_same_v<T, float>) {
        at::vec::transpose_mxn<T>(source, stride, target, rows, static_cast<int>(height), static_cast<int>(width));
      } else {
        for (int64_t i = 0; i < height; i++)
          for (int64_t j = 0; j < width; j++) target[j * rows + i] = source[i * stride + j];
      }
    }
  }
}

// The sum of a[k] b[k], both without gaps.
template <typename T>
static inline __attribute__((always_inline)) T dot(const T* a, const T* b, int64_t inner) {
  constexpr int64_t L = Vec<T>::size();
  Vec<T> sum(T(0));
  int64_t k = 0;
  for (; k + L <= inner; k += L) sum = at::vec::fmadd(Vec<T>::loadu(a + k), Vec<T>::loadu(b + k), sum);
  if (k < inner) sum = at::vec::fmadd(Vec<T>::loadu(a + k, inner - k), Vec<T>::loadu(b + k, inner - k), sum);
  return at::vec::vec_reduce_all<T>([](Vec<T>& x, Vec<T>& y) { return x + y; }, sum);
}

// The same as sum_of_products for one row without gaps in any a, which reads every b once and has nothing to gain from transposing
// it. Terms whose b would be, and which are dots here, come last, of the others those to be subtracted first.
template <typename T>
static __attribute__((noinline)) void row_of_products(const Product<T>* terms, int count, T* out, int64_t columns) {
  constexpr int64_t L = Vec<T>::size();
  const Product<T>* dots = std::find_if(terms, terms + count, [](const Product<T>& p) { return p.b_column != 1; });
  const int plain = static_cast<int>(dots - terms);
  int64_t n = 0;
  for (; n + 4 * WIDE<T> * L <= columns; n += 4 * WIDE<T> * L) tile<T, 1, 4 * WIDE<T>, true>(terms, plain, 0, n, out, columns, L);
  for (; n + WIDE<T> * L <= columns; n += WIDE<T> * L) tile<T, 1, WIDE<T>, true>(terms, plain, 0, n, out, columns, L);
  for (; n + L <= columns; n += L) tile<T, 1, 1, true>(terms, plain, 0, n, out, columns, L);
  if (n < columns) tile<T, 1, 1, false>(terms, plain, 0, n, out, columns, columns - n);
  for (; dots != terms + count; dots++)
#pragma GCC unroll 4
    for (int64_t j = 0; j < columns; j++) {
      const T sum = dot(dots->a, dots->b + j * dots->b_column, dots->inner);
      out[j] += dots->minus ? -sum : sum;
    }
}

// out [rows, columns] = sum of terms, those to be subtracted first. Rows of every b must have no gaps (b_column 1), or else its
// columns (b_row 1): such a b is transposed into `scratch` first.
template <typename T>
static void sum_of_products(Product<T>* terms, int count, T* out, int64_t rows, int64_t columns, T* scratch) {
  constexpr int64_t L = Vec<T>::size();
  for (int t = 0; t < count; t++) {
    Product<T>& p = terms[t];
    if (p.b_column == 1) continue;
    transpose<T>(p.b, p.b_column, scratch, columns, p.inner);
    p.b = scratch;
    p.b_row = columns;
    p.b_column = 1;
    scratch += p.inner * columns;
  }
  int64_t n = 0;
  for (; n + WIDE<T> * L <= columns; n += WIDE<T> * L) strip<T, WIDE<T>, true>(terms, count, n, out, rows, columns, L);
  for (; n + L <= columns; n += L) strip<T, 1, true>(terms, count, n, out, rows, columns, L);
  if (n < columns) strip<T, 1, false>(terms, count, n, out, rows, columns, columns - n);
}

// Sums over the rows up to and with each: out[i] = x[0] + ... + x[i], `columns` values a row, out without gaps. A vector of columns
// at a time, its sum in registers, in double precision as torch has it.
template <typename T>
static void running_sum(const T* x, int64_t stride, T* out, int64_t rows, int64_t columns) {
  constexpr int64_t L = Vec<T>::size();
  for (int64_t j = 0; j < columns; j += L) {
    const int64_t rest = std::min(L, columns - j);
    std::conditional_t<std::is_same_v<T, float>, at::vec::VectorizedN<double, 2>, Vec<double>> sum(0.0);
    for (int64_t i = 0; i < rows; i++) {
      const T* from = x + i * stride + j;
      const Vec<T> row = rest == L ? Vec<T>::loadu(from) : Vec<T>::loadu(from, rest);
      Vec<T> rounded;
      if constexpr (std::is_same_v<T, float>) {
        sum = sum + at::vec::convert<double, 2, float, 1>(row);
        rounded = at::vec::convert<float, 1, double, 2>(sum);
      } else {
        sum = sum + row;
        rounded = sum;
      }
      rest == L ? rounded.store(out + i * columns + j) : rounded.store(out + i * columns + j, rest);
    }
  }
}

}  // namespace titans_graph
