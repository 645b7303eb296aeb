// Vectors of 16 floats, in the compiler's own notation: AVX-512 where there is such a thing, split where there is not.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

constexpr int LANES = 16;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct BFloat16 {
  uint16_t bits;
};

inline float number(float element) { return element; }
inline float number(BFloat16 element) {
  const uint32_t word = uint32_t(element.bits) << 16;
  float result;
  memcpy(&result, &word, sizeof result);
  return result;
}

inline Floats load(const float* from) {
  Floats vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}

inline Floats load(const BFloat16* from) {
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

inline void store(float* to, Floats vector) { memcpy(to, &vector, sizeof vector); }

inline void store(BFloat16* to, Floats vector) {
  Words words = (Words)vector;
  words = (words + 0x7FFF + ((words >> 16) & 1)) >> 16;  // to the nearest, ties to even
  Halves halves = __builtin_convertvector(words, Halves);
  memcpy(to, &halves, sizeof halves);
}

inline float largest(Floats vector) {
  float result = vector[0];
  for (int lane = 1; lane < LANES; lane++) result = vector[lane] > result ? vector[lane] : result;
  return result;
}

inline float sum(Floats vector) {
  float result = 0;
  for (int lane = 0; lane < LANES; lane++) result += vector[lane];
  return result;
}

// e**x for x <= 0, to 2 units in the last place; 0 below -87, where floats end. The polynomial is that of Cephes' expf
// (Moshier), its argument reduced by ln 2 in two parts.
inline Floats exponential(Floats x) {
  const Floats clamped = x < -87.0f ? Floats{} - 87.0f : x;
  const Floats n = (clamped * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // rounds: 1.5 * 2**23
  const Floats r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints shifted = (Ints)p + (__builtin_convertvector(n, Ints) << 23);
  return x < -87.0f ? Floats{} : (Floats)shifted;
}
