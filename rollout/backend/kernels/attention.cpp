// Causal attention over a paged KV cache in vLLM's "vec" layout. See backend/attention.py.
//
// The arithmetic of a query row depends on its sequence alone: on neither the batch, nor the threads, nor how many
// rows of the sequence come at once. A decoded row and the same row of a prefill are equal, bit for bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.h"

// Mirrors attention.py's Step, field by field. Strides are in elements, of a token or of a table's row.
struct Step {
  const void *query, *key, *value;  // (tokens, heads, head_dim), twice (tokens, kv_heads, head_dim)
  void *output, *cache;             // (tokens, heads, head_dim), (blocks, kv_heads, 2, head_dim * block_size)
  const int32_t *starts, *lengths;  // (sequences + 1,) first token of each; (sequences,) with this step's tokens
  const int32_t *tables;            // (sequences, blocks of the longest)
  int64_t query_stride, key_stride, value_stride, table_stride;
  int32_t sequences, heads, kv_heads, head_dim, block_size;
  float scale;
};

namespace {

constexpr int TILE = 2 * LANES;  // positions scored at once; blocks are multiples of it
constexpr int QUERIES = 8;       // rows x heads that share what was read of the cache
constexpr int LINE = 64;         // bytes of a cache line
constexpr int HEAD_DIM = 512;    // the largest

// One sequence's keys and values of one head. A block holds its keys first, the dimensions as rows and the positions
// as columns, then its values, a row a position.
template <typename T>
struct Pages {
  T* cache;
  const int32_t* table;
  int64_t block_stride;
  int block_size, head_dim;

  T* block(int position) const { return cache + table[position / block_size] * block_stride; }
  T* keys(int position) const { return block(position) + position % block_size; }
  T* values(int position) const {
    return block(position) + int64_t(block_size) * head_dim + int64_t(position % block_size) * head_dim;
  }
};

// Fetches the cache lines that the next piece of work will read, one with every few instructions of this one. In a
// burst, or left to the loads themselves, the misses are what attention spends its time on.
class Prefetch {
 public:
  template <typename T>
  void plan(const Pages<T>& pages, int length) {
    lines_.clear();
    next_ = 0;
    for (int start = 0; start < length; start += pages.block_size) {
      const int count = std::min(pages.block_size, length - start);
      const char* keys = reinterpret_cast<const char*>(pages.keys(start));
      for (int d = 0; d < pages.head_dim; d++)
        add(keys + int64_t(d) * pages.block_size * sizeof(T), count * sizeof(T));
      add(reinterpret_cast<const char*>(pages.values(start)), int64_t(count) * pages.head_dim * sizeof(T));
    }
  }
  void nothing() { next_ = lines_.size(); }
  void one() {
    if (next_ < lines_.size()) __builtin_prefetch(lines_[next_++]);
  }

 private:
  void add(const char* from, int64_t bytes) {
    for (int64_t offset = 0; offset < bytes; offset += LINE) lines_.push_back(from + offset);
  }
  std::vector<const char*> lines_;
  size_t next_ = 0;
};

struct Scratch {
  Prefetch prefetch;
  std::vector<float> scores;
  float query[QUERIES * HEAD_DIM];
  int limits[QUERIES];
};

// softmax over the first `limit` of a row's scores, unnormalised; zeros up to `end`. Returns 1 / their sum.
inline float weights(float* scores, int limit, int end) {
  const int whole = (limit + LANES - 1) / LANES * LANES;
  std::fill(scores + limit, scores + std::max(whole, end), -INFINITY);
  Floats peaks = Floats{} - INFINITY;
  for (int t = 0; t < whole; t += LANES) {
    const Floats score = load(scores + t);
    peaks = score > peaks ? score : peaks;
  }
  const float peak = largest(peaks);
  Floats sums = {};
  for (int t = 0; t < whole; t += LANES) {
    const Floats weight = exponential(load(scores + t) - peak);
    sums += weight;
    store(scores + t, weight);
  }
  if (end > whole) std::fill(scores + whole, scores + end, 0.0f);
  return 1.0f / sum(sums);
}

// Q query vectors of one sequence over its pages; vector i attends to the first limits[i] positions.
template <typename T, int Q>
void attend(const Pages<T>& pages, Scratch& scratch, int64_t width, T* const* outputs) {
  const int* limits = scratch.limits;
  const int end = *std::max_element(limits, limits + Q), head_dim = pages.head_dim;
  float* scores = scratch.scores.data();
  for (int start = 0; start < end; start += TILE) {
    const T* keys = pages.keys(start);
    Floats sums[Q][2] = {};
    for (int d = 0; d < head_dim; d++, keys += pages.block_size) {
      const Floats first = load(keys), second = load(keys + LANES);
      scratch.prefetch.one();
      for (int i = 0; i < Q; i++) {
        const float element = scratch.query[i * head_dim + d];
        sums[i][0] += element * first;
        sums[i][1] += element * second;
      }
    }
    for (int i = 0; i < Q; i++) {
      store(scores + i * width + start, sums[i][0]);
      store(scores + i * width + start + LANES, sums[i][1]);
    }
  }
  float norms[Q];
  for (int i = 0; i < Q; i++) norms[i] = weights(scores + i * width, limits[i], end);
  for (int from = 0; from < head_dim; from += 2 * LANES) {
    Floats sums[Q][2] = {};
    for (int start = 0; start < end; start += pages.block_size) {
      const T* values = pages.values(start) + from;
      const int count = std::min(pages.block_size, end - start);
      for (int t = 0; t < count; t++, values += head_dim) {
        const Floats first = load(values), second = load(values + LANES);
        scratch.prefetch.one();
        for (int i = 0; i < Q; i++) {
          const float weight = scores[i * width + start + t];
          sums[i][0] += weight * first;
          sums[i][1] += weight * second;
        }
      }
    }
    for (int i = 0; i < Q; i++) {
      store(outputs[i] + from, sums[i][0] * norms[i]);
      store(outputs[i] + from + LANES, sums[i][1] * norms[i]);
    }
  }
}

// A piece of work: up to QUERIES of the rows x heads of one sequence that share a head of the cache.
struct Work {
  int sequence, kv_head, first;
};

template <typename T>
class Attention {
 public:
  explicit Attention(const Step& step)
      : step_(step),
        group_(step.heads / step.kv_heads),
        head_stride_(2 * int64_t(step.block_size) * step.head_dim) {}

  void run() {
    std::vector<Work> works;
    for (int s = 0; s < step_.sequences; s++)
      for (int h = 0; h < step_.kv_heads; h++)
        for (int first = 0; first < rows(s) * group_; first += QUERIES) works.push_back({s, h, first});
    const int heads_of_all = step_.sequences * step_.kv_heads, num_works = works.size();
#pragma omp parallel
    {
#pragma omp for schedule(static)
      for (int i = 0; i < heads_of_all; i++)
        if (rows(i / step_.kv_heads) > 1) write(i / step_.kv_heads, i % step_.kv_heads);
      // Behind the loop above everybody waits: rows of a prefill read keys that other threads write.
      Scratch scratch;
#pragma omp for schedule(dynamic, 8)
      for (int i = 0; i < num_works; i++) {
        const Work& work = works[i];
        if (rows(work.sequence) == 1) write(work.sequence, work.kv_head);
        scratch.prefetch.nothing();
        if (i + 1 < num_works && works[i + 1].first == 0)
          scratch.prefetch.plan(pages(works[i + 1].sequence, works[i + 1].kv_head), step_.lengths[works[i + 1].sequence]);
        attend_to(work, scratch);
      }
    }
  }

 private:
  int rows(int sequence) const { return step_.starts[sequence + 1] - step_.starts[sequence]; }

  Pages<T> pages(int sequence, int kv_head) const {
    return {static_cast<T*>(step_.cache) + kv_head * head_stride_, step_.tables + sequence * step_.table_stride,
            step_.kv_heads * head_stride_, step_.block_size, step_.head_dim};
  }

  // This step's keys and values of one sequence and head into its pages.
  void write(int sequence, int kv_head) const {
    const Pages<T> into = pages(sequence, kv_head);
    for (int row = 0; row < rows(sequence); row++) {
      const int token = step_.starts[sequence] + row, position = step_.lengths[sequence] - rows(sequence) + row;
      const T* key = static_cast<const T*>(step_.key) + token * step_.key_stride + kv_head * step_.head_dim;
      const T* value = static_cast<const T*>(step_.value) + token * step_.value_stride + kv_head * step_.head_dim;
      T* column = into.keys(position);
      for (int d = 0; d < step_.head_dim; d++) column[int64_t(d) * step_.block_size] = key[d];
      memcpy(into.values(position), value, step_.head_dim * sizeof(T));
    }
  }

  void attend_to(const Work& work, Scratch& scratch) const {
    const int first_token = step_.starts[work.sequence], length = step_.lengths[work.sequence];
    const int count = std::min(QUERIES, rows(work.sequence) * group_ - work.first);
    const int64_t width = (length + TILE - 1) / TILE * TILE;
    scratch.scores.resize(QUERIES * width);
    T* outputs[QUERIES];
    for (int i = 0; i < count; i++) {
      const int row = (work.first + i) / group_, head = work.kv_head * group_ + (work.first + i) % group_;
      const T* query = static_cast<const T*>(step_.query) + (first_token + row) * step_.query_stride + head * step_.head_dim;
      for (int d = 0; d < step_.head_dim; d++) scratch.query[i * step_.head_dim + d] = number(query[d]) * step_.scale;
      scratch.limits[i] = length - rows(work.sequence) + row + 1;
      outputs[i] = static_cast<T*>(step_.output) + (int64_t(first_token + row) * step_.heads + head) * step_.head_dim;
    }
    const Pages<T> cache = pages(work.sequence, work.kv_head);
    switch (count) {
      case 1: return attend<T, 1>(cache, scratch, width, outputs);
      case 2: return attend<T, 2>(cache, scratch, width, outputs);
      case 3: return attend<T, 3>(cache, scratch, width, outputs);
      case 4: return attend<T, 4>(cache, scratch, width, outputs);
      case 5: return attend<T, 5>(cache, scratch, width, outputs);
      case 6: return attend<T, 6>(cache, scratch, width, outputs);
      case 7: return attend<T, 7>(cache, scratch, width, outputs);
      case 8: return attend<T, 8>(cache, scratch, width, outputs);
    }
  }

  const Step& step_;
  const int group_;
  const int64_t head_stride_;
};

}  // namespace

extern "C" void attend_bfloat16(const Step* step) { Attention<BFloat16>(*step).run(); }
extern "C" void attend_float32(const Step* step) { Attention<float>(*step).run(); }
