// kSide × kSide values of 32 bits, in vectors of that many, transposed: by exchanging blocks of 8, 4, 2 and 1 between
// vectors.
#pragma once

#include <cstdint>
#include <utility>

#include "compiler.h"

namespace quailora {
namespace {

template <int kSide>
struct Transposition {
#if defined(__GNUC__) && !defined(QUAILORA_PLAIN_VECTORS)
  typedef uint32_t Row __attribute__((vector_size(kSide * sizeof(uint32_t))));

  static void in_place(Row (&rows)[kSide]) { exchange_blocks<kSide / 2>(rows); }

 private:
  template <int kSpan>
  static void exchange_blocks(Row (&rows)[kSide]) {
    for (int i = 0; i < kSide; ++i)
      if (!(i & kSpan)) exchange<kSpan>(rows[i], rows[i + kSpan], std::make_integer_sequence<int, kSide>());
    if constexpr (kSpan > 1) exchange_blocks<kSpan / 2>(rows);
  }

  template <int kSpan, int... kLane>
  static void exchange(Row& upper, Row& lower, std::integer_sequence<int, kLane...>) {
    const Row a = upper, b = lower;
    shuffle<(kLane & kSpan ? kSide + kLane - kSpan : kLane)...>(upper, a, b);
    shuffle<(kLane & kSpan ? kSide + kLane : kLane + kSpan)...>(lower, a, b);
  }

  // to = values of a and, numbered on from them, of b: those of the numbers given.
  template <int... kFrom, class Vector>
  static void shuffle(Vector& to, const Vector& a, const Vector& b) {
#ifdef QUAILORA_SHUFFLEVECTOR
    to = __builtin_shufflevector(a, b, kFrom...);
#else
    to = __builtin_shuffle(a, b, Vector{uint32_t{kFrom}...});
#endif
  }
#else
  struct Row {
    uint32_t lane[kSide];
  };

  static void in_place(Row (&rows)[kSide]) {
    for (int i = 0; i < kSide; ++i)
      for (int j = 0; j < i; ++j) {
        const uint32_t value = rows[i].lane[j];
        rows[i].lane[j] = rows[j].lane[i];
        rows[j].lane[i] = value;
      }
  }
#endif
};

}  // namespace
}  // namespace quailora
