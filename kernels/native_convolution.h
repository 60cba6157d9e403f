// The short causal convolution of a stream of features, with its activation and the norm of its heads: one pass forward, one back.
// Included after Inductor's prefix, which brings at::vec. A task is one sequence and some columns; K rows of it fit the first cache.
#pragma once

namespace titans_graph {

template <typename T>
using Vec = at::vec::Vectorized<T>;

constexpr int64_t MOST = 64;  // taps
constexpr int64_t STRETCH = 64;  // slots: the taps' cotangents are summed in T within one, and in double over all
constexpr double LEAST = 1e-12;  // of a norm that a head is divided by, as in torch.nn.functional.normalize

// Sizes as in convolution.py: x and gx [B, G, D], tail, tail_out and their cotangents [B, K - 1, D], taps [K, D], bias [D] or null,
// y and gy [B, H, G, D / H]; gtaps [B, K + 1, D], the last row for the bias. Forward reads no cotangents, backward no results.
template <typename T>
struct Streams {
  const T *x, *tail, *taps, *bias;
  const int64_t *lead, *end, *position;
  T *y, *tail_out;
  const T *gy, *gtail_out;
  T *gx, *gtail, *gtaps;
  int64_t batch, slots, heads, dim, kernel, activated, unit, width, threads;
};

// Where slot `p` (down to 1 - K) of a sequence lies: its own stream from `lead` on, before that the end of earlier calls.
template <typename T>
struct Rows {
  T *x, *tail;
  int64_t lead, reach, dim;
  T* operator[](int64_t p) const {
    return p >= lead ? x + p * dim : tail + std::max<int64_t>(reach + p - lead, 0) * dim;
  }
};

template <typename T>
static inline T total(Vec<T> v) {
  return at::vec::vec_reduce_all<T>([](Vec<T>& a, Vec<T>& b) { return a + b; }, v);
}

// One sequence `b` and `width` columns from `column` on. USUAL: 4 taps, and columns that fill vectors.
template <typename T, bool USUAL>
class Task {
 public:
  Task(const Streams<T>& s, int64_t b, int64_t column, int64_t width)
      : s(s), b(b), column(column), width(width), count(USUAL ? 4 : s.kernel), taps(count * width), zeros(width) {
    for (int64_t j = 0; j < count; j++) std::copy_n(s.taps + j * s.dim + column, width, &taps[j * width]);
  }

  void forward() {
    const Rows<const T> in = rows(s.x, s.tail);
    const bool activated = s.activated, unit = s.unit;
    const int64_t slots = s.slots, width = this->width;
    const T *const bias = s.bias ? s.bias + column : zeros.data(), *const w = taps.data(), *none = zeros.data();
    const T* x[SIZE];
    for (int64_t t = 0; t < slots; t++) {
      look(in, t, none, x);
      T* const y = s.y + answer(t);
      Vec<T> squares(T(0));
      for (int64_t c = 0; c < width; c += L) {
        Vec<T> a = convolved(x, w, bias, c, width);
        if (activated) a = a / (Vec<T>(T(1)) + a.neg().exp_u20());
        squares = squares + a * a;
        store(a, y + c, width - c);
      }
      if (!unit) continue;
      const Vec<T> scale(T(1) / std::max(std::sqrt(total(squares)), T(LEAST)));
      for (int64_t c = 0; c < width; c += L) store(load(y + c, width - c) * scale, y + c, width - c);
    }
    for (int64_t i = 0; i + 1 < count; i++) std::copy_n(in[s.end[b] + 1 - count + i], width, s.tail_out + end_of(i));
  }

  void backward() {
    const Rows<const T> in = rows(s.x, s.tail);
    const Rows<T> out = rows(s.gx, s.gtail);
    std::vector<T> sums(width), gates(width), gtaps((count + 1) * width), unused(width);
    std::vector<double> totals((count + 1) * width);
    for (int64_t i = 0; i + 1 < count; i++) std::fill_n(s.gtail + end_of(i), width, T(0));
    const bool activated = s.activated, unit = s.unit;
    const int64_t slots = s.slots, width = this->width;
    const T *const bias = s.bias ? s.bias + column : zeros.data(), *const w = taps.data(), *none = zeros.data();
    T *const z = sums.data(), *const gate = gates.data(), *const gw = gtaps.data();
    const T* x[SIZE];
    T* gx[SIZE];
    const Vec<T> one(T(1));
    for (int64_t t = 0; t < slots; t++) {
      look(in, t, none, x);
      look(out, t, unused.data(), gx);
      std::fill_n(out.x + t * out.dim, width, T(0));
      const T* const gy = s.gy + answer(t);
      Vec<T> squares(T(0)), along(T(0));
      for (int64_t c = 0; c < width; c += L) {
        const Vec<T> v = convolved(x, w, bias, c, width), open = activated ? one / (one + v.neg().exp_u20()) : one, a = v * open;
        squares = squares + a * a;
        along = along + a * load(gy + c, width - c);
        store(v, z + c, width - c);
        store(open, gate + c, width - c);
      }
      // y = a / |a|: its cotangent has no part along y, where |a| is not the least.
      T scale(1), shrink(0);
      if (unit) {
        const T norm = std::sqrt(total(squares));
        scale = T(1) / std::max(norm, T(LEAST));
        if (norm >= T(LEAST)) shrink = total(along) * scale * scale * scale;
      }
      for (int64_t c = 0; c < width; c += L) {
        const int64_t rest = width - c;
        const Vec<T> v = load(z + c, rest), open = load(gate + c, rest);
        Vec<T> g = load(gy + c, rest) * Vec<T>(scale) - v * open * Vec<T>(shrink);
        if (activated) g = g * open * (one + v * (one - open));
        add(g, gw + count * width + c, rest);
#pragma GCC unroll 8
        for (int64_t j = 0; j < count; j++) {
          add(g * load(x[j] + c, rest), gw + j * width + c, rest);
          add(g * load(w + j * width + c, rest), gx[j] + c, rest);
        }
      }
      if ((t + 1) % STRETCH == 0 || t + 1 == slots) {
        for (size_t i = 0; i < gtaps.size(); i++) totals[i] += gw[i];
        std::fill(gtaps.begin(), gtaps.end(), T(0));
      }
    }
    for (int64_t j = 0; j <= count; j++)
      for (int64_t c = 0; c < width; c++)
        s.gtaps[(b * (count + 1) + j) * s.dim + column + c] = static_cast<T>(totals[j * width + c]);
    for (int64_t i = 0; i + 1 < count; i++) {
      const T* g = s.gtail_out + end_of(i);
      T* to = out[s.end[b] + 1 - count + i];
      for (int64_t c = 0; c < width; c++) to[c] += g[c];
    }
  }

 private:
  static constexpr int64_t L = Vec<T>::size(), SIZE = USUAL ? 4 : MOST;

  static inline Vec<T> load(const T* from, int64_t rest) {
    return USUAL || rest >= L ? Vec<T>::loadu(from) : Vec<T>::loadu(from, rest);
  }

  static inline void store(Vec<T> v, T* to, int64_t rest) {
    USUAL || rest >= L ? v.store(to) : v.store(to, static_cast<int>(rest));
  }

  static inline void add(Vec<T> v, T* to, int64_t rest) { store(load(to, rest) + v, to, rest); }

  template <typename U>
  Rows<U> rows(U* x, U* tail) const {
    return {x + b * s.slots * s.dim + column, tail + end_of(0), s.lead[b], count - 1, s.dim};
  }

  int64_t end_of(int64_t i) const { return (b * (count - 1) + i) * s.dim + column; }

  int64_t answer(int64_t t) const {
    const int64_t size = s.dim / s.heads;
    return ((b * s.heads + column / size) * s.slots + t) * size + column % size;
  }

  // What every tap of slot t reads or writes; `none` where it would reach past the start of its document.
  template <typename U>
  inline void look(const Rows<U>& rows, int64_t t, U* none, U** at) const {
    const int64_t position = s.position[b * s.slots + t];
    at[0] = rows[t];
#pragma GCC unroll 8
    for (int64_t j = 1; j < count; j++) at[j] = position >= j ? rows[t - j] : none;
  }

  inline __attribute__((always_inline)) Vec<T> convolved(
      const T* const* x, const T* w, const T* bias, int64_t c, int64_t width) const {
    Vec<T> z = load(bias + c, width - c);
#pragma GCC unroll 8
    for (int64_t j = 0; j < count; j++) z = at::vec::fmadd(load(x[j] + c, width - c), load(w + j * width + c, width - c), z);
    return z;
  }

  const Streams<T>& s;
  const int64_t b, column, width, count;
  std::vector<T> taps;
  const std::vector<T> zeros;
};

template <typename T, bool USUAL>
static void run_streams(const Streams<T>& s, void (Task<T, USUAL>::*pass)()) {
  const int64_t size = s.dim / s.heads, blocks = (size + s.width - 1) / s.width;
#pragma omp parallel for num_threads(s.threads) schedule(static)
  for (int64_t i = 0; i < s.batch * s.heads * blocks; i++) {
    const int64_t from = i % blocks * s.width;
    Task<T, USUAL> task(s, i / (blocks * s.heads), i / blocks % s.heads * size + from, std::min(s.width, size - from));
    (task.*pass)();
  }
}

template <typename T>
static bool usual(const Streams<T>& s) {
  return s.kernel == 4 && s.dim / s.heads % Vec<T>::size() == 0 && s.width % Vec<T>::size() == 0;
}

template <typename T>
static void forward(const Streams<T>& s) {
  usual(s) ? run_streams(s, &Task<T, true>::forward) : run_streams(s, &Task<T, false>::forward);
}

template <typename T>
static void backward(const Streams<T>& s) {
  usual(s) ? run_streams(s, &Task<T, true>::backward) : run_streams(s, &Task<T, false>::backward);
}

}  // namespace titans_graph

extern "C" void forward_float(const titans_graph::Streams<float>* s) { titans_graph::forward(*s); }
extern "C" void backward_float(const titans_graph::Streams<float>* s) { titans_graph::backward(*s); }
extern "C" void forward_double(const titans_graph::Streams<double>* s) { titans_graph::forward(*s); }
extern "C" void backward_double(const titans_graph::Streams<double>* s) { titans_graph::backward(*s); }
