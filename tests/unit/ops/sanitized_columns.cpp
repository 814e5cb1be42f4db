// Every path of the rounding of columns over shapes and strides, in a program of its own to be built with sanitizers:
// matrices lie in memory of just their size, and what lies between their rows is poisoned, so that reading or writing
// any of it is caught.
#include <sanitizer/asan_interface.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "path.h"

using namespace quailora;

namespace {

// A matrix with `gap` values after each row but the last.
template <class Value>
struct Matrix {
  Matrix(int64_t rows, int64_t columns, int64_t gap)
      : stride(columns + gap), memory(rows ? (rows - 1) * stride + columns : 0) {
    ASAN_POISON_MEMORY_REGION(memory.data(), memory.size() * sizeof(Value));
    for (int64_t row = 0; row < rows; ++row)
      ASAN_UNPOISON_MEMORY_REGION(memory.data() + row * stride, columns * sizeof(Value));
  }
  ~Matrix() { ASAN_UNPOISON_MEMORY_REGION(memory.data(), memory.size() * sizeof(Value)); }
  Value& at(int64_t row, int64_t column) { return memory[row * stride + column]; }
  Rows<const Value> in() const { return {memory.data(), stride}; }
  Rows<Value> out() { return {memory.data(), stride}; }
  int64_t stride;
  std::vector<Value> memory;
};

void on_four_threads(int64_t units, const std::function<void(int64_t)>& unit) {
  std::vector<std::thread> threads;
  for (int64_t first = 0; first < 4; ++first)
    threads.emplace_back([=, &unit] {
      for (int64_t i = first; i < units; i += 4) unit(i);
    });
  for (auto& thread : threads) thread.join();
}

struct Shape {
  int64_t rows, columns, group;
};

enum class Kind { symmetric, with_zeros, given, table };

void check(const Path& path, Shape shape, int bits, Kind kind, int64_t gap) {
  const auto [rows, columns, group] = shape;
  const int64_t groups = columns / group;
  const int top = (1 << bits) - 1;
  Matrix<float> weight(rows, columns, gap), feedback(rows, columns, gap), factor(columns, columns, gap),
      errors(rows, columns, gap), scales(rows, groups, gap), found_scales(rows, groups, gap);
  Matrix<uint8_t> zeros(rows, groups, gap), codes(rows, columns, gap), found_zeros(rows, groups, gap);
  std::vector<float> importance(columns, 1), levels(top + 1);
  for (int i = 0; i <= top; ++i) levels[i] = static_cast<float>(i - top / 2);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t j = 0; j < columns; ++j) {
      weight.at(row, j) = static_cast<float>((row * 7 + j * 5) % 23 - 11) / 4;
      feedback.at(row, j) = static_cast<float>((row + j) % 3 - 1) / 8;
    }
    for (int64_t g = 0; g < groups; ++g) {
      scales.at(row, g) = static_cast<float>(1 << (row + g) % 2);
      zeros.at(row, g) = static_cast<uint8_t>((row + g) % (top + 1));
    }
  }
  // Errors of even columns go to odd ones only: all sums are of few bits, so exact in any order.
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t j = 0; j < columns; ++j) factor.at(i, j) = i < j && i % 2 == 0 && j % 2 == 1 ? 0.5f : 0;

  const double clips[] = {1, 0.8};
  const bool given = kind == Kind::given || kind == Kind::table;
  const ColumnsIn in{weight.in(), feedback.in(), factor.in(), importance.data(), rows, columns, group, bits,
                     kind == Kind::symmetric, clips, 2, given ? scales.in() : Rows<const float>{},
                     kind == Kind::given ? zeros.in() : Rows<const uint8_t>{},
                     kind == Kind::table ? levels.data() : nullptr};
  const ColumnsOut out{codes.out(), found_scales.out(), found_zeros.out(), errors.out()};
  quantize_columns(in, out, path, on_four_threads);

  for (int64_t row = 0; row < rows; ++row)
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t g = j / group;
      const float scale = found_scales.at(row, g);
      const int code = codes.at(row, j), zero = found_zeros.at(row, g);
      float x = weight.at(row, j) + feedback.at(row, j);
      for (int64_t i = 0; i < j; ++i) x += errors.at(row, i) * factor.at(i, j);
      const auto level = [&](int of) { return kind == Kind::table ? levels[of] : static_cast<float>(of - zero); };
      const float error = weight.at(row, j) - scale * level(code);
      bool right = code <= top && std::fabs(errors.at(row, j) - error) < 1e-5f;
      // No other level is nearer. (Where scales were chosen, sums may have rounded.)
      for (int other = 0; other <= top; ++other)
        right = right && std::fabs(x - scale * level(code)) <= std::fabs(x - scale * level(other)) + 1e-5f;
      if (given) right = right && scale == scales.at(row, g) && zero == (kind == Kind::table ? 0 : zeros.at(row, g));
      if (kind == Kind::symmetric) right = right && zero == 1 << (bits - 1);
      if (!right) {
        std::fprintf(stderr, "%s: %d bits, kind %d, [%ld, %ld] in groups of %ld: wrong in row %ld, column %ld\n",
                     path.name, bits, static_cast<int>(kind), static_cast<long>(rows), static_cast<long>(columns),
                     static_cast<long>(group), static_cast<long>(row), static_cast<long>(j));
        std::exit(1);
      }
    }
}

// None, few, and around the lanes, the panels and the tiles of the paths.
constexpr Shape kShapes[] = {{0, 4, 2}, {1, 1, 1}, {3, 7, 7}, {17, 24, 12}, {31, 33, 11}, {65, 48, 16}, {5, 130, 65}};

}  // namespace

int main() {
  for (const std::string& name : paths_here()) {
    for (const Shape& shape : kShapes)
      for (const int bits : {1, 4, 8})
        for (const Kind kind : {Kind::symmetric, Kind::with_zeros, Kind::given, Kind::table})
          for (const int64_t gap : {0, 3}) check(path_named(name), shape, bits, kind, gap);
    std::printf("%s\n", name.c_str());
  }
}
