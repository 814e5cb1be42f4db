// Memory that begins with a cache line.
#pragma once

#include <cstdint>
#include <new>

namespace quailora {

struct Aligned {
  explicit Aligned(int64_t bytes) : data(::operator new(bytes, kCacheLine)) {}
  ~Aligned() { ::operator delete(data, kCacheLine); }
  Aligned(const Aligned&) = delete;
  static constexpr std::align_val_t kCacheLine{64};
  void* data;
};

}  // namespace quailora
