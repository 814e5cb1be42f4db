// The primitives of csrc/cuda/ptx.cuh on a CPU: a kernel's source, compiled by any C++20 compiler, runs with one fiber
// for each CUDA thread, block after block.
//
// What a GPU would do wrong in silence, or only now and then, ends the program here, with a message and status 3:
// - an access outside what `allow` named, or not aligned to its size; a read of what nobody has written
// - accesses to shared memory that no barrier orders, with a copy from its start to its wait counted as a write
// - threads that wait at different barriers, lanes of a warp at different instructions, and for ever
// - one launch in which two threads write the same element, or one reads what another writes.
// An asynchronous copy lands when its thread waits for it and not before; shared memory starts as NaN, and threads take
// turns in an order that `seed` shuffles. Registers start as garbage if compiled with -ftrivial-auto-var-init=pattern.
//
// Not modeled: time, caches, bank conflicts; lanes that meet in the same instruction at different places go unseen.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <vector>

#include <ucontext.h>

#define __global__ static
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

constexpr int kLanes = 32;
constexpr int kSeveral = -2;  // in place of a thread's number

// ---- the device, as a test sets it up

enum Access : uint8_t { kRead = 1, kWrite = 2 };  // what may only be written may be read once it has been

struct Allocation {
  size_t bytes;
  std::vector<uint8_t> access;   // of each byte
  std::vector<int64_t> written;  // of each 4 bytes, by whom: launch << 40 | thread of the grid
};

struct Device {
  std::map<uintptr_t, Allocation> allocations;
  int multiprocessors = 1;
  void* stream = nullptr;  // what launches must name
  int launch_error = 0;    // what a launch returns
  unsigned seed = 0;
  int64_t launches = 0;

  void allow(const void* begin, size_t bytes, int access) {
    allocations[reinterpret_cast<uintptr_t>(begin)] = {bytes, std::vector<uint8_t>(bytes, static_cast<uint8_t>(access)),
                                                       std::vector<int64_t>((bytes + 3) / 4, -1)};
  }
};

inline Device device;

// ---- threads

struct Copy {
  unsigned char* target;
  const unsigned char* source;
  int bytes;
};

enum class State { runs, at_barrier, at_instruction, ended };

struct Thread {
  int number;
  State state;
  bool started;
  ucontext_t context;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  std::vector<Copy> open;                 // copies of the group that is not closed yet
  std::vector<std::vector<Copy>> groups;  // closed, not landed
  std::source_location barrier;
};

// An instruction that a warp executes as one: the last lane to arrive does it for all.
struct Warp {
  const char* instruction;
  int arrived;
  void* lanes[kLanes];
};

// Four bytes of shared memory, and the threads that last touched them. Epochs lie between barriers.
struct Word {
  int writer = -1, write_epoch = -1;
  int reader = -1, read_epoch = -1;
  bool copying = false;
};

struct Block {
  dim3 index{0, 0, 0}, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  std::vector<Word> words;
  int epoch = 0;
  Thread* current = nullptr;
  jmp_buf scheduler;
  std::function<void()> kernel;
};

inline Block block_;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "simt: %s (block %u %u %u, thread %d)\n", what, block_.index.x, block_.index.y, block_.index.z,
               block_.current ? block_.current->number : -1);
  std::_Exit(3);
}

// Fibers begin with setcontext but switch by longjmp: each of swapcontext's switches is a system call.
inline void yield(State state) {
  Thread& thread = *block_.current;
  thread.state = state;
  if (!_setjmp(thread.resume)) _longjmp(block_.scheduler, 1);
}

inline void thread_main() {
  block_.kernel();
  block_.current->state = State::ended;
  _longjmp(block_.scheduler, 1);
}

inline void run(Thread& thread) {
  block_.current = &thread;
  if (_setjmp(block_.scheduler)) return;
  if (thread.started) _longjmp(thread.resume, 1);
  thread.started = true;
  setcontext(&thread.context);
}

inline void run_block(std::vector<int>& order, std::mt19937& random) {
  constexpr size_t kStackBytes = 64 << 10;
  Block& block = block_;
  for (size_t number = 0; number < block.threads.size(); ++number) {
    Thread& thread = block.threads[number];
    if (!thread.stack) thread.stack.reset(new char[kStackBytes]);
    thread.number = static_cast<int>(number);
    thread.state = State::runs;
    thread.started = false;
    thread.open.clear();
    thread.groups.clear();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, thread_main, 0);
  }
  for (;;) {
    std::shuffle(order.begin(), order.end(), random);
    bool any_ran = false;
    for (const int number : order) {
      if (block.threads[number].state == State::runs) {
        any_ran = true;
        run(block.threads[number]);
      }
    }
    if (any_ran) continue;
    block.current = nullptr;
    const Thread& first = block.threads[0];
    for (const Thread& thread : block.threads) {
      if (thread.state == State::at_instruction) fail("deadlock: some lanes of a warp never arrive at an instruction");
      if (thread.state != first.state) fail("deadlock: some threads have ended, others wait at a barrier");
      if (thread.state == State::at_barrier && thread.barrier.line() != first.barrier.line()) {
        fail("threads wait at different barriers");
      }
    }
    if (first.state == State::ended) {
      for (const Word& word : block.words) {
        if (word.copying) fail("a block ends with copies under way");
      }
      return;
    }
    ++block.epoch;
    for (Thread& thread : block.threads) thread.state = State::runs;
  }
}

inline int thread() { return block_.current->number; }
inline dim3 block() { return block_.index; }

inline void block_sync(std::source_location where = std::source_location::current()) {
  block_.current->barrier = where;
  yield(State::at_barrier);
}

// `execute` gets what the 32 lanes passed, in their order.
template <typename Operands>
void warp_instruction(const char* name, Operands& operands, void (*execute)(Operands* const (&)[kLanes])) {
  Thread& thread = *block_.current;
  Warp& warp = block_.warps[thread.number / kLanes];
  if (warp.arrived > 0 && std::strcmp(warp.instruction, name) != 0) fail("lanes of a warp at different instructions");
  warp.instruction = name;
  warp.lanes[thread.number % kLanes] = &operands;
  if (++warp.arrived < kLanes) return yield(State::at_instruction);
  warp.arrived = 0;
  Operands* lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<Operands*>(warp.lanes[lane]);
  execute(lanes);
  const int first = thread.number / kLanes * kLanes;
  for (int lane = 0; lane < kLanes; ++lane) block_.threads[first + lane].state = State::runs;
}

// ---- global memory

inline Allocation& global_access(const void* pointer, size_t bytes, size_t alignment, int access, int64_t& offset) {
  static Allocation* last = nullptr;
  static uintptr_t last_begin = 0;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address % alignment != 0) fail("access to global memory that is not aligned");
  if (last == nullptr || address < last_begin || address >= last_begin + last->bytes) {
    auto found = device.allocations.upper_bound(address);
    if (found == device.allocations.begin()) fail("access outside global memory");
    --found;
    last_begin = found->first;
    last = &found->second;
  }
  offset = static_cast<int64_t>(address - last_begin);
  if (offset + bytes > last->bytes) fail("access outside global memory");
  for (size_t byte = 0; byte < bytes; ++byte) {
    if (!(last->access[offset + byte] & access)) {
      fail(access == kRead ? "read of global memory that nobody has written"
                           : "write to global memory that is not to be written");
    }
  }
  return *last;
}

inline int64_t grid_thread() {
  const Block& b = block_;
  const int64_t block = (int64_t{b.index.z} * b.grid.y + b.index.y) * b.grid.x + b.index.x;
  return device.launches << 40 | (block * static_cast<int64_t>(b.threads.size()) + thread());
}

inline void check_read(const void* source, size_t bytes, size_t alignment) {
  int64_t offset;
  const Allocation& allocation = global_access(source, bytes, alignment, kRead, offset);
  for (size_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) {
    const int64_t writer = allocation.written[word];
    if (writer >> 40 == device.launches && writer != grid_thread()) {
      fail("read of what another thread of this launch has written");
    }
  }
}

template <typename T>
T load_global(const T* source) {
  check_read(source, sizeof(T), alignof(T));
  return *source;
}

template <typename T>
void store_global(T* target, T value) {
  int64_t offset;
  Allocation& allocation = global_access(target, sizeof(T), alignof(T), kWrite, offset);
  for (size_t word = offset / 4; word <= (offset + sizeof(T) - 1) / 4; ++word) {
    int64_t& writer = allocation.written[word];
    if (writer >> 40 == device.launches && writer != grid_thread())
      fail("two threads of a launch write the same element");
    writer = grid_thread();
  }
  std::fill_n(allocation.access.begin() + offset, sizeof(T), kRead | kWrite);
  *target = value;
}

// ---- shared memory

inline unsigned char* shared_memory() { return block_.shared.data(); }

template <typename Use>
void for_each_word(const void* pointer, size_t bytes, size_t alignment, Use use) {
  const auto* address = static_cast<const unsigned char*>(pointer);
  const auto& shared = block_.shared;
  if (address < shared.data() || address + bytes > shared.data() + shared.size()) fail("access outside shared memory");
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) fail("access to shared memory that is not aligned");
  const size_t offset = address - shared.data();
  for (size_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word) use(block_.words[word]);
}

inline void note_read(const void* source, size_t bytes, size_t alignment, int reader) {
  for_each_word(source, bytes, alignment, [&](Word& word) {
    if (word.copying) fail("read of shared memory to which a copy is under way");
    if (word.writer == -1) fail("read of shared memory that nobody has written");
    if (word.write_epoch == block_.epoch && word.writer != reader) fail("no barrier between a write and a read");
    word.reader = word.read_epoch == block_.epoch && word.reader != reader ? kSeveral : reader;
    word.read_epoch = block_.epoch;
  });
}

inline void note_write(const void* target, size_t bytes, size_t alignment, bool copying) {
  for_each_word(target, bytes, alignment, [&](Word& word) {
    const int writer = thread();
    if (word.copying) fail("write to shared memory to which a copy is under way");
    if (word.write_epoch == block_.epoch && word.writer != writer) fail("no barrier between two writes");
    if (word.read_epoch == block_.epoch && word.reader != writer) fail("no barrier between a read and a write");
    word.copying = copying;
    word.writer = writer;
    word.write_epoch = block_.epoch;
  });
}

template <typename T>
T load_shared(const T* source) {
  note_read(source, sizeof(T), alignof(T), thread());
  return *source;
}

template <typename T>
void store_shared(T* target, T value) {
  note_write(target, sizeof(T), alignof(T), false);
  *target = value;
}

inline void cp_async16(void* target, const void* source, int bytes) {
  if (bytes < 0 || bytes > 16) fail("cp.async of less than 0 or more than 16 bytes");
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0) fail("cp.async from an address that is not aligned");
  if (bytes > 0) check_read(source, bytes, 16);
  note_write(target, 16, 16, true);
  block_.current->open.push_back(
      {static_cast<unsigned char*>(target), static_cast<const unsigned char*>(source), bytes});
}

inline void cp_async_commit() {
  Thread& thread = *block_.current;
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}

template <int kPending>
void cp_async_wait() {
  auto& groups = block_.current->groups;
  while (groups.size() > kPending) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.target, 0, 16);
      std::memcpy(copy.target, copy.source, copy.bytes);
      for_each_word(copy.target, 16, 16, [](Word& word) { word.copying = false; });
      note_write(copy.target, 16, 16, false);
    }
    groups.erase(groups.begin());
  }
}

// ---- instructions of a warp; layouts as in NVIDIA's PTX ISA manual, checked by layouts.cpp

struct LdMatrix {
  const uint16_t* row;
  uint32_t* result;
};

inline void ldmatrix_x4_trans(uint32_t (&result)[4], const void* row) {
  note_read(row, 16, 16, thread());
  LdMatrix operands{static_cast<const uint16_t*>(row), result};
  warp_instruction<LdMatrix>("ldmatrix", operands, [](LdMatrix* const(&lanes)[kLanes]) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto element = [&](int row) { return uint32_t{lanes[matrix * 8 + row]->row[lane / 4]}; };
        lanes[lane]->result[matrix] = element(lane % 4 * 2) | element(lane % 4 * 2 + 1) << 16;
      }
    }
  });
}

// What a tensor core makes of c plus some products: all cut off one bit below the last of the largest, added up, and
// cut off to 24 bits. So an A100 does it (Fasi et al., PeerJ Computer Science 7:e330, 2021); later GPUs keep more bits.
inline float fused_sum(float c, const double* products, int count) {
  double largest = std::fabs(c);
  for (int k = 0; k < count; ++k) largest = std::max(largest, std::fabs(products[k]));
  if (!(largest > 0) || !std::isfinite(largest)) return c + std::accumulate(products, products + count, 0.0);
  constexpr uint64_t kBias = 1023;
  const uint64_t exponent = std::bit_cast<uint64_t>(largest) >> 52;
  const double units_per_one = std::bit_cast<double>((2 * kBias + 24 - exponent) << 52);  // 2^(24 - exponent)
  auto units = static_cast<int64_t>(c * units_per_one);
  for (int k = 0; k < count; ++k) units += static_cast<int64_t>(products[k] * units_per_one);
  const double sum = static_cast<double>(units) / units_per_one;
  const auto rounded = static_cast<float>(sum);
  return std::fabs(rounded) > std::fabs(sum) ? std::nextafter(rounded, 0.0f) : rounded;
}

// D += A B, A 16 x kDepth and B kDepth x 8, summed kAtOnce products at a time.
template <int kDepth, int kAtOnce>
void multiply(const double (&a)[16][kDepth], const double (&b)[kDepth][8], float (&d)[16][8]) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      for (int first = 0; first < kDepth; first += kAtOnce) {
        double products[kAtOnce];
        for (int k = 0; k < kAtOnce; ++k) products[k] = a[i][first + k] * b[first + k][j];
        d[i][j] = fused_sum(d[i][j], products, kAtOnce);
      }
    }
  }
}

inline double bfloat16_value(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline double float16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent == 31  ? (fraction ? NAN : INFINITY)
                      : exponent == 0 ? std::ldexp(fraction, -24)
                                      : std::ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 ? -size : size;
}

struct Mma16 {
  float* d;
  const uint32_t *a, *b;
};

template <double (*kValue)(uint16_t)>
void execute_mma_m16n8k16(Mma16* const (&lanes)[kLanes]) {
  double a[16][16], b[16][8];
  float d[16][8];
  const auto half = [](const uint32_t* registers, int i) {
    return kValue(static_cast<uint16_t>(registers[i / 2] >> (i % 2 * 16)));
  };
  const auto for_each_d = [&](auto use) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) use(lanes[lane]->d[i], d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
    }
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 8; ++i) a[group + i / 2 % 2 * 8][member * 2 + i % 2 + i / 4 * 8] = half(lanes[lane]->a, i);
    for (int i = 0; i < 4; ++i) b[member * 2 + i % 2 + i / 2 * 8][group] = half(lanes[lane]->b, i);
  }
  for_each_d([](float& lanes_own, float& element) { element = lanes_own; });
  multiply<16, 8>(a, b, d);
  for_each_d([](float& lanes_own, float& element) { lanes_own = element; });
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Mma16 operands{d, a, b};
  warp_instruction("mma.m16n8k16.bf16", operands, execute_mma_m16n8k16<bfloat16_value>);
}

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Mma16 operands{d, a, b};
  warp_instruction("mma.m16n8k16.f16", operands, execute_mma_m16n8k16<float16_value>);
}

struct Mma8 {
  float* d;
  const float *a, *b;
};

inline void execute_mma_m16n8k8(Mma8* const (&lanes)[kLanes]) {
  double a[16][8], b[8][8];
  float d[16][8];
  const auto tf32 = [](float value) {
    if (std::bit_cast<uint32_t>(value) & 0x1fff) fail("an operand of mma that was not rounded to TF32");
    return value;
  };
  const auto for_each_d = [&](auto use) {
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) use(lanes[lane]->d[i], d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
    }
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][member + i / 2 * 4] = tf32(lanes[lane]->a[i]);
    for (int i = 0; i < 2; ++i) b[member + i * 4][group] = tf32(lanes[lane]->b[i]);
  }
  for_each_d([](float& lanes_own, float& element) { element = lanes_own; });
  multiply<8, 4>(a, b, d);
  for_each_d([](float& lanes_own, float& element) { lanes_own = element; });
}

inline void mma_m16n8k8_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  Mma8 operands{d, a, b};
  warp_instruction("mma.m16n8k8.tf32", operands, execute_mma_m16n8k8);
}

inline float round_to_tf32(float value) {
  if (!std::isfinite(value)) return value;
  return std::bit_cast<float>((std::bit_cast<uint32_t>(value) + 0x1000) & ~uint32_t{0x1fff});
}

// ---- for the host

inline int multiprocessors(int* number) {
  *number = device.multiprocessors;
  return 0;
}

template <typename Arguments>
int launch(void (*kernel)(Arguments), dim3 blocks, int threads, int shared_bytes, void* stream,
           const Arguments& arguments) {
  if (device.launch_error != 0) return device.launch_error;
  if (stream != device.stream) fail("launch on another stream");
  if (blocks.y > 65535 || blocks.z > 65535) fail("too many blocks");
  ++device.launches;
  block_.grid = blocks;
  block_.kernel = [&] { kernel(arguments); };
  block_.threads.resize(threads);
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 random(device.seed);
  for (unsigned z = 0; z < blocks.z; ++z) {
    for (unsigned y = 0; y < blocks.y; ++y) {
      for (unsigned x = 0; x < blocks.x; ++x) {
        block_.index = {x, y, z};
        block_.epoch = 0;
        block_.warps.assign(threads / kLanes, {});
        block_.shared.assign(shared_bytes, 0xff);  // NaN as bf16, fp16 and fp32
        block_.words.assign(shared_bytes / 4, {});
        run_block(order, random);
      }
    }
  }
  block_.current = nullptr;
  return 0;
}

inline const char* error_string(int) { return "an error of the model"; }

}  // namespace simt
