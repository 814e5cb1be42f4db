// AMX: Intel's servers since 2023 (Sapphire Rapids), under Linux.
#include "x86.h"

#ifdef QUAILORA_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

TARGET_BEGIN("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,fma")
#include "amx.h"

namespace quailora {
namespace {

// Assembly, not intrinsics: gcc's are macros that want literal register numbers, and gcc 12's do not say that they read
// memory, so that what was to be stored there may come too late or not at all.
struct Tiles {
  static void configure() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const configuration;
    __asm__ volatile("ldtilecfg %0" : : "m"(configuration));
  }
  static void release() { __asm__ volatile("tilerelease"); }
  template <int kTo>
  static void load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kTo), "r"(from), "r"(stride) : "memory");
  }
  template <int kFrom>
  static void store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(kFrom), "r"(to), "r"(stride) : "memory");
  }
  template <int kSums, int kLeft, int kRight>
  static void multiply_add() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kLeft), "i"(kRight));
  }
};

constexpr Kernel kKernel = amx_kernel<Tiles>();

}  // namespace
TARGET_END

namespace {

bool runs() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // of leaf 7, edx
  if (!avx512.runs_here() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || ~edx & (kBf16 | kTiles)) return false;
  // Tile registers are 8 KiB of state for the kernel to save, so Linux wants to be asked for them, once in a process.
  constexpr long kArchReqXcompPerm = 0x1023, kXtileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
  return granted;
}

}  // namespace

extern const Kernel avx512_fp32;
extern const ColumnKernel avx512_columns;

const Path amx_bf16{"amx-bf16", runs, &kKernel, &avx512_fp32, &avx512_columns};

}  // namespace quailora
#endif
