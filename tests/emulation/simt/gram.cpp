// Runs csrc/cuda/gram.cu on one case and compares with fp64. Prints what test_gram_cuda.py asserts on.
#include "gram.cu"

#include <cstring>
#include <string>

#include <sys/mman.h>

using namespace quailora::cuda;

namespace {

struct Case {
  std::map<std::string, std::string> settings;

  Case(int count, char** words) {
    for (int word = 1; word < count; ++word) {
      const std::string text = words[word];
      const size_t equals = text.find('=');
      settings[text.substr(0, equals)] = text.substr(equals + 1);
    }
  }

  std::string operator[](const char* name) const { return settings.at(name); }
  int64_t number(const char* name) const { return std::stoll(settings.at(name)); }
};

// Address space: pages that are never touched cost nothing, so that strides may be as large as they come.
unsigned char* reserve(size_t bytes) {
  void* memory =
      mmap(nullptr, bytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("mmap");
    std::exit(1);
  }
  return static_cast<unsigned char*>(memory);
}

uint16_t to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t to_float16(float value) {
  const int exponent = std::max(std::ilogb(value), -14);
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(value), 10 - exponent)));
  return static_cast<uint16_t>((value < 0) << 15 | (((exponent + 14) << 10) + units));
}

// Writes the value as an element and returns what it then is.
double put(Element element, unsigned char* target, float value) {
  if (element == Element::float32) {
    std::memcpy(target, &value, 4);
    return value;
  }
  const uint16_t bits = element == Element::bfloat16 ? to_bfloat16(value) : to_float16(value);
  std::memcpy(target, &bits, 2);
  return element == Element::bfloat16 ? simt::bfloat16_value(bits) : simt::float16_value(bits);
}

}  // namespace

int main(int count, char** words) {
  const Case given(count, words);
  const int64_t n = given.number("features"), t = given.number("tokens");
  const int64_t x_stride = given.number("x_stride"), h_stride = given.number("h_stride");
  const Element element = given["element"] == "bf16"   ? Element::bfloat16
                          : given["element"] == "fp16" ? Element::float16
                                                       : Element::float32;
  const int64_t size = element == Element::float32 ? 4 : 2;
  const bool masked = given.number("masked"), alike = given.number("alike");
  std::mt19937 random(1);
  std::normal_distribution<float> normal;

  std::vector<uint8_t> keep(t, 1);
  unsigned char* x = reserve(t * x_stride * size) + given.number("offset") * size;
  std::vector<double> kept;  // (tokens, n), those that count
  for (int64_t token = 0; token < t; ++token) {
    keep[token] = !masked || random() % 4 != 0;
    unsigned char* row = x + token * x_stride * size;
    std::memset(row, 0xff, n * size);  // NaN, and if masked, it stays so and may not be read
    if (!keep[token]) continue;
    simt::device.allow(row, n * size, simt::kRead);
    for (int64_t i = 0; i < n; ++i) {
      // As activations are: some features a thousand times as large; if alike, all have a mean.
      const float value = (normal(random) + (alike ? 4 : 0)) * (i % 50 == 7 ? 1000 : 1);
      kept.push_back(put(element, row + i * size, value));
    }
  }
  if (masked) simt::device.allow(keep.data(), t, simt::kRead);

  auto* h = reinterpret_cast<float*>(reserve(n * h_stride * 4));
  std::vector<double> expected(n * n, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    simt::device.allow(h + i * h_stride, (i + 1) * 4, simt::kRead | simt::kWrite);
    for (int64_t j = 0; j <= i; ++j) {  // what is there already is to stay in the sum
      expected[i * n + j] = h[i * h_stride + j] = normal(random) + (i == j ? 10 : 0);
    }
  }
  for (size_t row = 0; row < kept.size(); row += n) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) expected[i * n + j] += kept[row + i] * kept[row + j];
    }
  }

  int stream = 0;
  simt::device.stream = &stream;
  simt::device.seed = static_cast<unsigned>(given.number("seed"));
  simt::device.multiprocessors = static_cast<int>(given.number("multiprocessors"));
  simt::device.launch_error = static_cast<int>(given.number("launch_error"));
  const Gram gram{element, x, x_stride, masked ? keep.data() : nullptr, t, static_cast<int>(n), h, h_stride};
  size_t bytes;
  int error = scratch_bytes(gram, &bytes);
  unsigned char* scratch = reserve(bytes);
  if (bytes > 0) simt::device.allow(scratch, bytes, simt::kWrite);
  if (error == 0) error = gram_(gram, scratch, &stream);

  // relative: of the Frobenius norms. scaled: the largest |ΔH_ij| / √(H_ii H_jj).
  double squares = 0, error_squares = 0, scaled = 0;
  uint64_t hash = 14695981039346656037u;  // FNV-1a, of H's bits
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      const double difference = h[i * h_stride + j] - expected[i * n + j];
      const double twice = i == j ? 1 : 2;
      squares += twice * expected[i * n + j] * expected[i * n + j];
      error_squares += twice * difference * difference;
      const double lengths = std::sqrt(std::fabs(expected[i * n + i] * expected[j * n + j]));
      if (difference != 0) scaled = std::fmax(scaled, std::fabs(difference) / lengths);
      if (std::isnan(difference)) error_squares = scaled = INFINITY;
      hash = (hash ^ std::bit_cast<uint32_t>(h[i * h_stride + j])) * 1099511628211u;
    }
  }
  const double relative = error_squares == 0 ? 0 : std::sqrt(error_squares / squares);
  std::printf(
      "{\"error\": %d, \"relative\": %.3g, \"scaled\": %.3g, \"hash\": %lu, \"scratch\": %zu, \"launches\": %ld}\n",
      error, std::min(relative, 1e300), std::min(scaled, 1e300), hash, bytes, simt::device.launches);
}
