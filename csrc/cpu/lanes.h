// Vectors of fp32 values in which every lane does the same by itself: those of gcc and clang, or plain loops.
#pragma once

#include <cstdint>
#include <cstring>

namespace quailora {
namespace {

template <int kLanes>
struct Lanes {
#if defined(__GNUC__) && !defined(QUAILORA_PLAIN_VECTORS)
  typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
  typedef int32_t Bits __attribute__((vector_size(kLanes * sizeof(float))));

  static Vector broadcast(float value) { return value - Vector{}; }
  static Vector where_less(Vector a, Vector b, Vector then, Vector otherwise) { return a < b ? then : otherwise; }
  // For positive bounds: the bits of positive floats, as integers, have the same order. This is two instructions where
  // comparisons of floats are four. (Of a NaN, it makes one of the bounds.)
  static Vector clamp_bits(Vector value, Vector low, Vector high) {
    Bits bits = (Bits)value;
    bits = bits > (Bits)low ? bits : (Bits)low;
    return (Vector)(bits < (Bits)high ? bits : (Bits)high);
  }
#else
  struct Vector {
    float lane[kLanes];
    template <class Make>
    static Vector of(Make make) {
      Vector v;
      for (int i = 0; i < kLanes; ++i) v.lane[i] = make(i);
      return v;
    }
    friend Vector operator+(const Vector& a, const Vector& b) {
      return of([&](int i) { return a.lane[i] + b.lane[i]; });
    }
    friend Vector operator-(const Vector& a, const Vector& b) {
      return of([&](int i) { return a.lane[i] - b.lane[i]; });
    }
    friend Vector operator*(const Vector& a, const Vector& b) {
      return of([&](int i) { return a.lane[i] * b.lane[i]; });
    }
  };

  static Vector broadcast(float value) {
    return Vector::of([&](int) { return value; });
  }
  static Vector where_less(const Vector& a, const Vector& b, const Vector& then, const Vector& otherwise) {
    return Vector::of([&](int i) { return a.lane[i] < b.lane[i] ? then.lane[i] : otherwise.lane[i]; });
  }
  static Vector clamp_bits(const Vector& value, const Vector& low, const Vector& high) {
    return where_less(where_less(low, value, value, low), high, where_less(low, value, value, low), high);
  }
#endif

  static Vector load(const float* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  static void store(Vector v, float* to) { std::memcpy(to, &v, sizeof v); }
  // What is NaN remains so.
  static Vector at_least(Vector v, Vector low) { return where_less(v, low, low, v); }
  static Vector at_most(Vector v, Vector high) { return where_less(high, v, high, v); }
};

}  // namespace
}  // namespace quailora
