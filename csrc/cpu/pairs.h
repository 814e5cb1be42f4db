// bf16 tokens in pairs, as the processors' bf16 instructions want them: a 32-bit lane holds one feature of two tokens,
// the earlier one in the lower half.
#pragma once

#include <cstdint>
#include <cstring>

#include "path.h"

namespace quailora {
namespace {

// Calls `write(pair, values)` with the kTile paired features of every pair of tokens; zeros where either ends.
template <class Write>
inline void for_each_pair(const Tokens& tokens, int64_t first, int64_t count, int64_t feature, int64_t pairs,
                          Write write) {
  const auto* data = static_cast<const uint16_t*>(tokens.data);
  const int64_t width = tokens.features - feature < kTile ? tokens.features - feature : kTile;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    uint16_t padded[2][kTile];
    const uint16_t* row[2];
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t token = 2 * pair + i;
      row[i] = token < count ? data + tokens.offsets[first + token] + feature : padded[i];
      if (token < count && width == kTile) continue;
      std::memset(padded[i], 0, sizeof padded[i]);
      if (token < count) std::memcpy(padded[i], row[i], width * sizeof(uint16_t));
      row[i] = padded[i];
    }
    uint32_t values[kTile];
    for (int64_t i = 0; i < kTile; ++i) values[i] = row[0][i] | static_cast<uint32_t>(row[1][i]) << 16;
    write(pair, values);
  }
}

}  // namespace
}  // namespace quailora
