// Holds the layouts of simt.h against NVIDIA's PTX ISA manual, read off its figures and formulas by hand: "Matrix
// Fragments for mma.m16n8k16 with floating point type", "... for mma.m16n8k8", "ldmatrix". Prints nothing if all fit.
#include "simt.h"

namespace {

struct Place {
  int lane, element, row, column;
};

// Lane 0 is group 0, member 0; lane 5 group 1, member 1; lane 14 group 3, member 2; lane 31 group 7, member 3.
constexpr Place kA16[] = {{0, 0, 0, 0},  {0, 1, 0, 1},   {0, 2, 8, 0},   {0, 4, 0, 8},   {0, 6, 8, 8},
                          {5, 1, 1, 3},  {5, 3, 9, 3},   {5, 4, 1, 10},  {14, 0, 3, 4},  {14, 7, 11, 13},
                          {31, 1, 7, 7}, {31, 3, 15, 7}, {31, 5, 7, 15}, {31, 7, 15, 15}};
constexpr Place kB16[] = {{0, 0, 0, 0},   {0, 1, 1, 0},  {0, 2, 8, 0},   {5, 1, 3, 1}, {5, 2, 10, 1}, {14, 0, 4, 3},
                          {14, 3, 13, 3}, {31, 1, 7, 7}, {31, 3, 15, 7}, {4, 0, 0, 1}, {29, 0, 2, 7}};
constexpr Place kA8[] = {{0, 0, 0, 0}, {0, 1, 8, 0},   {0, 2, 0, 4},  {0, 3, 8, 4},   {5, 0, 1, 1},  {5, 1, 9, 1},
                         {5, 2, 1, 5}, {14, 3, 11, 6}, {31, 0, 7, 3}, {31, 1, 15, 3}, {31, 2, 7, 7}, {31, 3, 15, 7}};
constexpr Place kB8[] = {{0, 0, 0, 0},  {0, 1, 4, 0},  {5, 0, 1, 1}, {5, 1, 5, 1},
                         {14, 1, 6, 3}, {31, 0, 3, 7}, {31, 1, 7, 7}};
constexpr Place kD[] = {{0, 0, 0, 0},  {0, 1, 0, 1},   {0, 2, 8, 0},  {0, 3, 8, 1},  {4, 0, 1, 0},   {5, 0, 1, 2},
                        {5, 1, 1, 3},  {5, 2, 9, 2},   {7, 3, 9, 7},  {14, 1, 3, 5}, {13, 3, 11, 3}, {28, 0, 7, 0},
                        {31, 1, 7, 7}, {31, 3, 15, 7}, {28, 1, 7, 1}, {1, 1, 0, 3},  {3, 1, 0, 7},   {29, 1, 7, 3},
                        {12, 1, 3, 1}, {15, 1, 3, 7},  {13, 1, 3, 3}};

// Of 32 lanes, a single element of A and one of B are 1: so is one element of D at most, where row and column cross.
float a_values[32][8], b_values[32][4], d_values[32][4];

struct Nothing {};

void clear() {
  std::memset(a_values, 0, sizeof a_values);
  std::memset(b_values, 0, sizeof b_values);
}

uint32_t pair(const float* values) {  // of 0 and 1, in bf16
  return (values[0] != 0 ? 0x3f80u : 0u) | (values[1] != 0 ? 0x3f80u : 0u) << 16;
}

void mma16(Nothing) {
  const int lane = simt::thread();
  const uint32_t a[4] = {pair(&a_values[lane][0]), pair(&a_values[lane][2]), pair(&a_values[lane][4]),
                         pair(&a_values[lane][6])};
  const uint32_t b[2] = {pair(&b_values[lane][0]), pair(&b_values[lane][2])};
  float d[4] = {};
  simt::mma_m16n8k16_bf16(d, a, b);
  std::copy_n(d, 4, d_values[lane]);
}

void mma8(Nothing) {
  const int lane = simt::thread();
  const float a[4] = {a_values[lane][0], a_values[lane][1], a_values[lane][2], a_values[lane][3]};
  const float b[2] = {b_values[lane][0], b_values[lane][1]};
  float d[4] = {};
  simt::mma_m16n8k8_tf32(d, a, b);
  std::copy_n(d, 4, d_values[lane]);
}

uint32_t loaded[32][4];

// Element (row, column) of matrix m is 100 m + 10 row + column.
void ldmatrix(Nothing) {
  const int lane = simt::thread();
  auto* row = reinterpret_cast<uint16_t*>(simt::shared_memory()) + lane * 8;
  struct alignas(16) Row {
    uint16_t element[8];
  } filled;
  for (int column = 0; column < 8; ++column)
    filled.element[column] = static_cast<uint16_t>(lane / 8 * 100 + lane % 8 * 10 + column);
  simt::store_shared(reinterpret_cast<Row*>(row), filled);
  simt::block_sync();
  simt::ldmatrix_x4_trans(loaded[lane], row);
}

int faults = 0;

void expect(bool holds, const char* what, int lane, int element) {
  if (holds) return;
  std::printf("%s: lane %d, element %d\n", what, lane, element);
  ++faults;
}

template <size_t kCountA, size_t kCountB>
void check_mma(const char* name, void (*kernel)(Nothing), const Place (&a_places)[kCountA],
               const Place (&b_places)[kCountB]) {
  int crossings = 0;
  for (const Place& a : a_places) {
    for (const Place& b : b_places) {
      clear();
      a_values[a.lane][a.element] = 1;
      b_values[b.lane][b.element] = 1;
      simt::launch(kernel, dim3(1), 32, 0, nullptr, Nothing{});
      const bool meet = a.column == b.row;
      float sum = 0;
      for (const auto& lane : d_values) sum += lane[0] + lane[1] + lane[2] + lane[3];
      expect(sum == (meet ? 1 : 0), name, a.lane, a.element);
      for (const Place& d : kD) {
        const bool here = meet && d.row == a.row && d.column == b.column;
        crossings += here;
        expect(d_values[d.lane][d.element] == (here ? 1 : 0), name, d.lane, d.element);
      }
    }
  }
  expect(crossings >= 8, "too few products meet in a place that the table knows", 0, 0);
}

}  // namespace

int main() {
  check_mma("mma.m16n8k16", mma16, kA16, kB16);
  check_mma("mma.m16n8k8", mma8, kA8, kB8);
  simt::launch(ldmatrix, dim3(1), 32, 512, nullptr, Nothing{});
  // lane, matrix, lower and upper half of the register: lane l holds column l / 4 of rows 2 (l % 4) and the next
  constexpr int kLoaded[][4] = {{0, 0, 0, 10},    {0, 3, 300, 310},  {1, 0, 20, 30},  {3, 1, 160, 170}, {4, 0, 1, 11},
                                {5, 2, 221, 231}, {14, 1, 143, 153}, {31, 0, 67, 77}, {31, 3, 367, 377}};
  for (const auto& [lane, matrix, low, high] : kLoaded) {
    expect(loaded[lane][matrix] == (static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16), "ldmatrix", lane,
           matrix);
  }
  // Ties away from zero, to 10 bits after the first.
  expect(simt::round_to_tf32(1 + 0x1p-11f) == 1 + 0x1p-10f, "tf32, a tie", 0, 0);
  expect(simt::round_to_tf32(-1 - 0x1p-11f) == -1 - 0x1p-10f, "tf32, a negative tie", 0, 0);
  expect(simt::round_to_tf32(1 + 0x1p-11f - 0x1p-23f) == 1, "tf32, below a tie", 0, 0);
  // 1 + 7/4 of its last place is cut off to 1 + 1 of it, in fp32; -1 likewise, towards zero.
  const double products[] = {1.5 * 0x1p-23, 0.25 * 0x1p-23};
  expect(simt::fused_sum(1, products, 2) == 1 + 0x1p-23f, "a sum is cut off", 0, 0);
  const double negative[] = {-1.5 * 0x1p-23, -0.25 * 0x1p-23};
  expect(simt::fused_sum(-1, negative, 2) == -1 - 0x1p-23f, "a negative sum is cut off", 0, 0);
  return faults != 0;
}
