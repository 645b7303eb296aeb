// A matrix copied into its transpose, with the cast on the way. See backend/transpose.py.

#include <algorithm>

#include "vectors.h"

// Mirrors transpose.py's Copy, field by field.
struct Copy {
  const void* from;             // (rows, columns), a row's numbers side by side
  void* to;                     // (columns, rows), likewise
  int64_t rows, columns;
  int64_t from_stride, to_stride;  // from row to row, in numbers
};

namespace {

// So many rows and columns at a time: few enough for the pages of both sides to stay known to the processor, long enough
// stretches for whole cache lines on both.
constexpr int64_t ROWS = 512, COLUMNS = 128;
constexpr int AHEAD = 32;  // columns; they are not next to what is read, so that the processor would not fetch them itself

// Swaps the parts of two rows of a square that lie across its diagonal: lanes with bit `step` of a, without it of b.
template <int step>
inline void swap_across(Floats& a, Floats& b) {
  Ints upper, lower;
  for (int lane = 0; lane < LANES; lane++) {
    upper[lane] = lane & step ? LANES + (lane ^ step) : lane;
    lower[lane] = lane & step ? LANES + lane : lane ^ step;
  }
  const Floats first = __builtin_shuffle(a, b, upper);
  b = __builtin_shuffle(a, b, lower);
  a = first;
}

template <int step>
inline void swap_rows(Floats* square) {
  for (int row = 0; row < LANES; row++)
    if (!(row & step)) swap_across<step>(square[row], square[row + step]);
}

// As vectors.h's store, which is for numbers, but what is none stays so, as torch writes it.
inline void keep(float* to, Floats vector) { store(to, vector); }
inline void keep(BFloat16* to, Floats vector) {
  const Words words = (Words)vector;
  const Words rounded = (words + 0x7FFF + ((words >> 16) & 1)) >> 16;  // to the nearest, ties to even
  const Words kept = (words & 0x7FFFFFFF) > 0x7F800000 ? (Words{} + 0x7FC0) : rounded;
  const Halves halves = __builtin_convertvector(kept, Halves);
  memcpy(to, &halves, sizeof halves);
}

template <typename From, typename To>
void tile(const From* from, int64_t from_stride, To* to, int64_t to_stride) {
  Floats square[LANES];
  for (int row = 0; row < LANES; row++) {
    square[row] = load(from + row * from_stride);
    __builtin_prefetch(from + row * from_stride + AHEAD);
  }
  swap_rows<1>(square);
  swap_rows<2>(square);
  swap_rows<4>(square);
  swap_rows<8>(square);
  for (int row = 0; row < LANES; row++) keep(to + row * to_stride, square[row]);
}

inline void put(float* to, float element) { *to = element; }
inline void put(BFloat16* to, float element) {
  Floats vector = {element};
  BFloat16 all[LANES];
  keep(all, vector);
  *to = all[0];
}

template <typename From, typename To>
void copy(const Copy& what) {
  const From* from = static_cast<const From*>(what.from);
  To* to = static_cast<To*>(what.to);
  const int64_t rows = what.rows / LANES * LANES, columns = what.columns / LANES * LANES;
  for (int64_t first_row = 0; first_row < rows; first_row += ROWS)
    for (int64_t first_column = 0; first_column < columns; first_column += COLUMNS)
      for (int64_t column = first_column; column < std::min(first_column + COLUMNS, columns); column += LANES)
        for (int64_t row = first_row; row < std::min(first_row + ROWS, rows); row += LANES)
          tile(from + row * what.from_stride + column, what.from_stride, to + column * what.to_stride + row,
               what.to_stride);
  for (int64_t row = 0; row < what.rows; row++)
    for (int64_t column = row < rows ? columns : 0; column < what.columns; column++)
      put(to + column * what.to_stride + row, number(from[row * what.from_stride + column]));
}

}  // namespace

extern "C" {
void float_to_float(const Copy* what) { copy<float, float>(*what); }
void float_to_bfloat16(const Copy* what) { copy<float, BFloat16>(*what); }
void bfloat16_to_bfloat16(const Copy* what) { copy<BFloat16, BFloat16>(*what); }
void bfloat16_to_float(const Copy* what) { copy<BFloat16, float>(*what); }
}
