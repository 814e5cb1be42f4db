// The bits of an fp32 value.
#pragma once

#include <cstdint>
#include <cstring>

namespace quailora {
namespace {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace
}  // namespace quailora
