// Columns rounded with error feedback, a row a lane.
//
// A tile of rows lies transposed in the first cache: w_j, which becomes the error e_j; and x_j, which is
// w_j + feedback_j and all errors before j, and becomes the code. A group of columns first takes up the errors of the groups before it,
// and gets its scales. Then it is rounded a panel at a time:
//
//            a panel of columns j
//            ┌────┬────┬────┬────┐
//      e_i → │                   │   x_j += e_i · u_ij for all i of the group that are before the panel. The sums x_j
//      e_i → │       u_ij        │   stay in registers; each u_ij is broadcast to all vectors of rows.
//      e_i → │                   │
//            ├────┴────┴────┴────┤
//            │  ╲    e_i → x_j   │   Column by column, x_j is rounded, and what it leaves goes to those after it.
//            │     ╲             │
//            └───────────────────┘
//
// To be included after the pragma that names the path's processor, so that all of it is compiled for that one.
#pragma once

#include <cstdint>
#include <cstring>

#include "bits.h"
#include "lanes.h"
#include "path.h"
#include "transpose.h"

namespace quailora {
namespace {

// Added to a number of less than 2²², it leaves no places for a fraction: the sum rounds half to even.
constexpr float kToInteger = 12582912.0f;  // 1.5 · 2²³
constexpr float kInfinity = __builtin_huge_valf();

// As `fp16_and_bf16` of the reference. Without a branch, so that a loop of it becomes vector code.
inline float fp16_and_bf16(float scale) {
  const uint32_t bits = to_bits(scale);
  uint32_t half = (bits + 0x0fffu + (bits >> 13 & 1)) & ~0x1fffu;           // 10 bits of fraction
  half = half < 0x47800000u ? half : 0x7f800000u;                           // from 2¹⁶ on infinite
  const uint32_t subnormal = to_bits((scale + 0.5f) - 0.5f);                // the last place of 0.5 is 2⁻²⁴
  half = bits < 0x38800000u ? subnormal : half;                             // below 2⁻¹⁴
  const uint32_t both = (half + 0x7fffu + (half >> 16 & 1)) & 0xffff0000u;  // 7 bits of fraction
  const float least = 1.0f / (1 << 24);
  return from_bits(both) < least ? least : from_bits(both);
}

inline float reciprocal(float scale) { return scale == 0 ? 0 : 1 / scale; }

// kVectors of kLanes rows are a tile.
template <int kLanes, int kVectors, int kPanel>
class Rounding {
 public:
  static constexpr int kRows = kLanes * kVectors;

  Rounding(const ColumnsIn& in, const ColumnsOut& out, const float* factor, int64_t first, float* scratch)
      : in_(in),
        out_(out),
        factor_(factor),
        first_(first),
        count_(in.rows - first < kRows ? in.rows - first : kRows),
        errors_(scratch),
        targets_(scratch + (in.columns + kLanes - 1) / kLanes * kLanes * kRows) {
    if (in.levels)
      for (int i = 0; i + 1 < 1 << in.bits; ++i) middles_[i] = (in.levels[i + 1] + in.levels[i]) / 2;
  }

  void run() {
    read();
    for (int64_t start = 0; start < in_.columns; start += in_.group) {
      for_each_panel(start, [&](int64_t j, auto width) {
        Column sums[width];
        take_up<width>(0, start, j, sums);
        for (int c = 0; c < width; ++c) sums[c].store(targets_ + (j + c) * kRows);
      });
      const int64_t group = start / in_.group;
      const Grid grid = in_.scales.data ? given(group) : in_.symmetric ? chosen<true>(start) : chosen<false>(start);
      write(grid, group);
      if (in_.levels)
        round_group<true>(start, grid);
      else
        round_group<false>(start, grid);
    }
    write_codes_and_errors();
  }

 private:
  using Math = Lanes<kLanes>;
  using Vector = typename Math::Vector;
  using Block = Transposition<kLanes>;

  // A value for each row of the tile.
  struct Column {
    Vector v[kVectors];

    static Column of(float value) {
      Column column;
      for (auto& vector : column.v) vector = Math::broadcast(value);
      return column;
    }
    static Column load(const float* from) {
      Column column;
      for (int i = 0; i < kVectors; ++i) column.v[i] = Math::load(from + i * kLanes);
      return column;
    }
    void store(float* to) const {
      for (int i = 0; i < kVectors; ++i) Math::store(v[i], to + i * kLanes);
    }
    template <class Function>
    Column each(Function function) const {
      float values[kRows];
      store(values);
      for (float& value : values) value = function(value);
      return load(values);
    }
  };

  struct Grid {
    Column scale, zero;
  };

  // A grid with what rounding to it takes. The bounds are of code - zero.
  struct Rounder {
    Column scale, reciprocal, zero, lowest, highest;
  };

  template <int kWidth>
  struct Width {
    constexpr operator int() const { return kWidth; }
  };

  // Of the group that begins with column `start`, as `pack_panels` cuts it.
  template <class Function>
  void for_each_panel(int64_t start, Function function) {
    const int64_t stop = start + in_.group;
    int64_t j = start;
    for (; j + kPanel <= stop; j += kPanel) function(j, Width<kPanel>());
    for (; j < stop; ++j) function(j, Width<1>());
  }

  // sums = x_j + Σ e_i · u_ij over i = first .. last - 1, for the columns of the panel that begins with column j.
  template <int kWidth>
  void take_up(int64_t first, int64_t last, int64_t j, Column (&sums)[kWidth]) const {
    for (int c = 0; c < kWidth; ++c) sums[c] = Column::load(targets_ + (j + c) * kRows);
    const float* u = factor_ + j * in_.columns;
    for (int64_t i = first; i < last; ++i) {
      const Column error = Column::load(errors_ + i * kRows);
      for (int c = 0; c < kWidth; ++c)
        for (int v = 0; v < kVectors; ++v)
          sums[c].v[v] = error.v[v] * Math::broadcast(u[i * kWidth + c]) + sums[c].v[v];
    }
  }

  template <bool kTable>
  void round_group(int64_t start, const Grid& chosen) {
    Rounder grid{chosen.scale, chosen.scale.each(reciprocal), chosen.zero, {}, {}};
    for (int v = 0; v < kVectors; ++v) {
      grid.lowest.v[v] = Math::broadcast(0) - chosen.zero.v[v];
      grid.highest.v[v] = Math::broadcast(top()) - chosen.zero.v[v];
    }
    for_each_panel(start, [&](int64_t j, auto width) {
      Column sums[width];
      take_up<width>(start, j, j, sums);
      round_panel<kTable, width, 0>(j, grid, sums);
    });
  }

  // Column kFirst of the panel that begins with column j, then those after it: by recursion, and inline, so that sums
  // stay in registers.
  template <bool kTable, int kWidth, int kFirst>
  [[gnu::always_inline]] inline void round_panel(int64_t j, const Rounder& grid, Column (&sums)[kWidth]) {
    const int64_t i = j + kFirst;
    const Column weight = Column::load(errors_ + i * kRows);
    Column values, levels, codes, error;
    for (int v = 0; v < kVectors; ++v) values.v[v] = sums[kFirst].v[v] * grid.reciprocal.v[v];
    if constexpr (kTable)
      nearest_in_table(values, &levels, &codes);
    else
      nearest_integers(values, grid, &levels, &codes);
    for (int v = 0; v < kVectors; ++v) error.v[v] = weight.v[v] - grid.scale.v[v] * levels.v[v];
    error.store(errors_ + i * kRows);
    codes.store(targets_ + i * kRows);
    const float* u = factor_ + j * in_.columns + i * kWidth;
    for (int c = kFirst + 1; c < kWidth; ++c)
      for (int v = 0; v < kVectors; ++v) sums[c].v[v] = error.v[v] * Math::broadcast(u[c]) + sums[c].v[v];
    if constexpr (kFirst + 1 < kWidth) round_panel<kTable, kWidth, kFirst + 1>(j, grid, sums);
  }

  // The level is code - zero. A value is clamped before it is rounded, or a compiler would fuse the product that it is
  // with the sum that rounds, and what is half way between two levels would not always go to the even one.
  static void nearest_integers(const Column& values, const Rounder& grid, Column* levels, Column* codes) {
    const Vector round = Math::broadcast(kToInteger);
    for (int v = 0; v < kVectors; ++v) {
      const Vector clamped = Math::at_most(Math::at_least(values.v[v], grid.lowest.v[v]), grid.highest.v[v]);
      levels->v[v] = (clamped + round) - round;
      codes->v[v] = levels->v[v] + grid.zero.v[v];
    }
  }

  void nearest_in_table(const Column& values, Column* levels, Column* codes) const {
    Column level = Column::of(in_.levels[0]), code = Column::of(0);
    for (int i = 1; i < 1 << in_.bits; ++i)
      for (int v = 0; v < kVectors; ++v) {
        const Vector middle = Math::broadcast(middles_[i - 1]);
        level.v[v] = Math::where_less(middle, values.v[v], Math::broadcast(in_.levels[i]), level.v[v]);
        code.v[v] = Math::where_less(middle, values.v[v], Math::broadcast(static_cast<float>(i)), code.v[v]);
      }
    *levels = level;
    *codes = code;
  }

  float top() const { return static_cast<float>((1 << in_.bits) - 1); }
  float middle() const { return static_cast<float>(1 << (in_.bits - 1)); }

  Grid given(int64_t group) const {
    float scales[kRows] = {}, zeros[kRows] = {};
    for (int64_t row = 0; row < count_; ++row) {
      scales[row] = in_.scales[first_ + row][group];
      if (!in_.levels) zeros[row] = in_.zeros.data ? in_.zeros[first_ + row][group] : middle();
    }
    return {Column::load(scales), Column::load(zeros)};
  }

  // As `choose_scales` of the reference. A row that holds a NaN or an infinity, so that every cost does, gets scale 0.
  template <bool kSymmetric>
  Grid chosen(int64_t start) const {
    const float* targets = targets_ + start * kRows;
    Column low = Column::of(0), high = Column::of(0), best = Column::of(kInfinity);
    for (int64_t j = 0; j < in_.group; ++j) {
      const Column x = Column::load(targets + j * kRows);
      for (int v = 0; v < kVectors; ++v) {
        low.v[v] = Math::at_most(low.v[v], x.v[v]);
        high.v[v] = Math::at_least(high.v[v], x.v[v]);
      }
    }
    const Vector none = Math::broadcast(0), round = Math::broadcast(kToInteger);
    Grid grid{Column::of(0), Column::of(0)};
    const auto take_better = [&](int v, Vector cost, Vector scale, Vector zero) {
      grid.scale.v[v] = Math::where_less(cost, best.v[v], scale, grid.scale.v[v]);
      grid.zero.v[v] = Math::where_less(cost, best.v[v], zero, grid.zero.v[v]);
      best.v[v] = Math::where_less(cost, best.v[v], cost, best.v[v]);
    };

    for (int64_t c = 0; c < in_.clip_count; ++c) {
      const auto clip = static_cast<float>(in_.clips[c]), ratio = static_cast<float>(in_.clips[c] / top());
      Column span;
      for (int v = 0; v < kVectors; ++v) {
        const Vector larger = Math::at_least(none - low.v[v], high.v[v]);
        span.v[v] = (kSymmetric ? larger + larger : high.v[v] - low.v[v]) * Math::broadcast(ratio);
      }
      const Column scale = span.each(fp16_and_bf16), reciprocals = scale.each(reciprocal);
      Column zero = Column::of(middle());
      if (!kSymmetric)
        for (int v = 0; v < kVectors; ++v) {
          const Vector value = (none - low.v[v]) * Math::broadcast(clip) * reciprocals.v[v];
          zero.v[v] = Math::at_most(Math::at_least(value, Math::broadcast(1)), Math::broadcast(top())) + round - round;
        }

      // Of the other sign a scale has the same levels but for the outermost: from 1 - middle to middle times `scale`.
      Column costs = Column::of(0), negative_costs = Column::of(0);
      for (int64_t j = 0; j < in_.group; ++j) {
        const Column x = Column::load(targets + j * kRows);
        const Vector importance = Math::broadcast(in_.importance[start + j]);
        for (int v = 0; v < kVectors; ++v) {
          // Fused or not: of two levels that are equally near, either costs the same.
          const Vector rounded = x.v[v] * reciprocals.v[v] + round, least = round - zero.v[v];
          const auto cost = [&](Vector first) {
            const Vector level = Math::clamp_bits(rounded, first, first + Math::broadcast(top())) - round;
            const Vector off = level * scale.v[v] - x.v[v];
            return off * off * importance;
          };
          costs.v[v] = cost(least) + costs.v[v];
          if (kSymmetric) negative_costs.v[v] = cost(least + Math::broadcast(1)) + negative_costs.v[v];
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        take_better(v, costs.v[v], scale.v[v], zero.v[v]);
        if (kSymmetric) take_better(v, negative_costs.v[v], none - scale.v[v], zero.v[v]);
      }
    }
    return grid;
  }

  void write(const Grid& grid, int64_t group) const {
    float scales[kRows], zeros[kRows];
    grid.scale.store(scales);
    grid.zero.store(zeros);
    for (int64_t row = 0; row < count_; ++row) {
      out_.scales[first_ + row][group] = scales[row];
      out_.zeros[first_ + row][group] = static_cast<uint8_t>(zeros[row]);
    }
  }

  // kLanes rows from `row` on, `width` columns from j on, transposed; zeros where rows or columns end.
  void read_block(const Rows<const float>& from, int64_t row, int64_t j, int64_t width,
                  typename Block::Row (&block)[kLanes]) const {
    const int64_t rows = count_ - row;
    if (rows >= kLanes && width == kLanes) {
      for (int r = 0; r < kLanes; ++r) std::memcpy(&block[r], from[first_ + row + r] + j, sizeof block[r]);
    } else {
      std::memset(block, 0, sizeof block);
      for (int r = 0; r < kLanes && r < rows; ++r)
        std::memcpy(&block[r], from[first_ + row + r] + j, width * sizeof(float));
    }
    Block::in_place(block);
  }

  void read() {
    for_each_block([&](int64_t row, int64_t j, int64_t width) {
      typename Block::Row weight[kLanes], feedback[kLanes];
      read_block(in_.weight, row, j, width, weight);
      read_block(in_.feedback, row, j, width, feedback);
      for (int c = 0; c < kLanes; ++c) {
        Vector w, f;
        std::memcpy(&w, &weight[c], sizeof w);
        std::memcpy(&f, &feedback[c], sizeof f);
        Math::store(w, errors_ + (j + c) * kRows + row);
        Math::store(w + f, targets_ + (j + c) * kRows + row);
      }
    });
  }

  // The other way round.
  void write_block(const float* from, typename Block::Row (&block)[kLanes]) const {
    for (int c = 0; c < kLanes; ++c) std::memcpy(&block[c], from + c * kRows, sizeof block[c]);
    Block::in_place(block);
  }

  void write_codes_and_errors() const {
    for_each_block([&](int64_t row, int64_t j, int64_t width) {
      typename Block::Row codes[kLanes], errors[kLanes];
      write_block(targets_ + j * kRows + row, codes);
      write_block(errors_ + j * kRows + row, errors);
      for (int64_t r = 0; r < kLanes && row + r < count_; ++r) {
        float values[kLanes];
        uint8_t bytes[kLanes];
        std::memcpy(values, &codes[r], sizeof values);
        // The sum with 2²³ ends in the code as an integer; of a NaN it ends in 0.
        for (int c = 0; c < kLanes; ++c) bytes[c] = static_cast<uint8_t>(to_bits(values[c] + 8388608.0f));
        copy(&bytes, width, out_.codes[first_ + row + r] + j);
        copy(&errors[r], width * static_cast<int64_t>(sizeof(float)), out_.errors[first_ + row + r] + j);
      }
    });
  }

  // The first bytes of something: mostly of all of it, which is one instruction.
  template <class Source>
  static void copy(const Source* from, int64_t bytes, void* to) {
    if (bytes == sizeof *from)
      std::memcpy(to, from, sizeof *from);
    else
      std::memcpy(to, from, bytes);
  }

  template <class Function>
  void for_each_block(Function function) const {
    for (int64_t j = 0; j < in_.columns; j += kLanes)
      for (int64_t row = 0; row < kRows; row += kLanes)
        function(row, j, in_.columns - j < kLanes ? in_.columns - j : kLanes);
  }

  const ColumnsIn& in_;
  const ColumnsOut& out_;
  const float* factor_;
  const int64_t first_, count_;  // rows
  float* const errors_;          // (columns, kRows): W, of which a column becomes E as it is rounded
  float* const targets_;         // (columns, kRows): what is to be rounded, and then the codes
  float middles_[255];           // between the levels
};

template <int kLanes, int kVectors, int kPanel>
constexpr ColumnKernel column_kernel() {
  using Kind = Rounding<kLanes, kVectors, kPanel>;
  return {Kind::kRows, kPanel,
          [](const ColumnsIn& in, const ColumnsOut& out, const float* factor, int64_t first, float* scratch) {
            Kind(in, out, factor, first, scratch).run();
          }};
}

}  // namespace
}  // namespace quailora
