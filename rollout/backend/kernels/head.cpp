// The output head of a vocabulary shard, and what sampling wants of it, without writing the logits down. See
// backend/head.py. Needs AVX512-BF16: two bfloat16 products summed into a float at once; elsewhere the library is empty.
//
// A logit's arithmetic depends on its row and its token alone, not on what is computed beside it.

#ifdef __AVX512BF16__

#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "vectors.h"

// Mirrors head.py's Head, field by field.
struct Head {
  const BFloat16 *hidden, *weight;  // (rows, size), (tokens, size), both contiguous
  int32_t rows, size, tokens;       // size: a multiple of 32
};

namespace {

constexpr int BLOCK = 64;    // tokens; rollout/sampling.py's
constexpr int PRODUCTS = 32; // elements of one instruction
constexpr int ROWS = 4, TOKENS = 4;  // ROWS x TOKENS sums fill half the registers, and LANES
constexpr float OUTSIDE = -1e30f;    // rollout/sampling.py's

static_assert(ROWS * TOKENS == LANES, "their sums make one vector");

inline __m512bh elements(const BFloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }

// Lane i of the result is the sum of the lanes of vector i: a transposition in four steps, adding in each.
inline Floats sums_of(const __m512* vectors) {
  __m512 pairs[8], fours[4], eights[2];
  for (int i = 0; i < 8; i++) {
    const __m512 a = vectors[2 * i], b = vectors[2 * i + 1];
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; i++) {
    const __m512 a = fours[2 * i], b = fours[2 * i + 1];
    eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  }
  const __m512 a = eights[0], b = eights[1];
  return (Floats)_mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}

// The logits of R rows, R <= ROWS, and TOKENS tokens; lane i * TOKENS + j is row i's of token j.
template <int R>
inline Floats logits_of(const BFloat16* hidden, const BFloat16* const* weights, int size) {
  __m512 sums[LANES];
  for (int i = 0; i < LANES; i++) sums[i] = _mm512_setzero_ps();
  for (int k = 0; k < size; k += PRODUCTS) {
    __m512bh tokens[TOKENS];
    for (int j = 0; j < TOKENS; j++) tokens[j] = elements(weights[j] + k);
    for (int i = 0; i < R; i++) {
      const __m512bh row = elements(hidden + int64_t(i) * size + k);
      for (int j = 0; j < TOKENS; j++)
        sums[i * TOKENS + j] = _mm512_dpbf16_ps(sums[i * TOKENS + j], row, tokens[j]);
    }
  }
  return sums_of(sums);
}

// The logits of `rows` rows and the tokens of one block into (rows, BLOCK); OUTSIDE for what is behind the last token.
void block_logits(const Head& head, int block, const BFloat16* hidden, int rows, float* logits) {
  const int count = std::min(BLOCK, head.tokens - block * BLOCK);
  const int64_t size = head.size;
  for (int t = 0; t < BLOCK; t += TOKENS) {
    const BFloat16* weights[TOKENS];
    for (int j = 0; j < TOKENS; j++)
      weights[j] = head.weight + (int64_t(block) * BLOCK + std::min(t + j, count - 1)) * size;
    for (int r = 0; r < rows; r += ROWS) {
      Floats found;
      switch (std::min(ROWS, rows - r)) {
        case 1: found = logits_of<1>(hidden + r * size, weights, size); break;
        case 2: found = logits_of<2>(hidden + r * size, weights, size); break;
        case 3: found = logits_of<3>(hidden + r * size, weights, size); break;
        default: found = logits_of<4>(hidden + r * size, weights, size);
      }
      for (int i = 0; i < std::min(ROWS, rows - r); i++)
        memcpy(logits + (r + i) * BLOCK + t, reinterpret_cast<float*>(&found) + i * TOKENS, TOKENS * sizeof(float));
    }
  }
  for (int r = 0; r < rows; r++) std::fill(logits + r * BLOCK + count, logits + (r + 1) * BLOCK, OUTSIDE);
}

}  // namespace

// sums (rows, blocks): of exp(scale * logit - peak) over each block; peaks (rows, blocks): the largest scale * logit.
extern "C" void block_masses(const Head* head, const float* scale, float* sums, float* peaks) {
  const int blocks = (head->tokens + BLOCK - 1) / BLOCK, rows = head->rows;
#pragma omp parallel
  {
    std::vector<float> logits(rows * BLOCK);
#pragma omp for schedule(static)
    for (int block = 0; block < blocks; block++) {
      block_logits(*head, block, head->hidden, rows, logits.data());
      for (int row = 0; row < rows; row++) {
        Floats scaled[BLOCK / LANES], peaks_of_lanes = Floats{} - INFINITY, masses = {};
        for (int i = 0; i < BLOCK / LANES; i++) {
          scaled[i] = load(&logits[row * BLOCK + i * LANES]) * scale[row];
          peaks_of_lanes = scaled[i] > peaks_of_lanes ? scaled[i] : peaks_of_lanes;
        }
        const float peak = largest(peaks_of_lanes);
        for (int i = 0; i < BLOCK / LANES; i++) masses += exponential(scaled[i] - peak);
        sums[int64_t(row) * blocks + block] = sum(masses);
        peaks[int64_t(row) * blocks + block] = peak;
      }
    }
  }
}

// logits (rows, BLOCK): each row's of the tokens of its own block.
extern "C" void logits_of_blocks(const Head* head, const int64_t* block_of_row, float* logits) {
#pragma omp parallel for schedule(static)
  for (int row = 0; row < head->rows; row++)
    block_logits(*head, block_of_row[row], head->hidden + int64_t(row) * head->size, 1, logits + int64_t(row) * BLOCK);
}

#endif
