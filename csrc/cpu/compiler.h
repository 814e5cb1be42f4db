// What the compiler knows. What it does not know is left out, and a processor that has it takes the next best path.
//
// By version, not by __has_builtin and the like: tests may then claim an older gcc than there is.
#pragma once

#if defined(__clang__)

#define QUAILORA_SHUFFLEVECTOR
#if defined(__x86_64__) && __clang_major__ >= 12
#define QUAILORA_X86
#define QUAILORA_AVX512_BF16
#ifdef __linux__
#define QUAILORA_AMX
#endif
#endif

#elif defined(__GNUC__)

#if __GNUC__ >= 12
#define QUAILORA_SHUFFLEVECTOR
#endif
#ifdef __x86_64__
#define QUAILORA_X86
#if __GNUC__ >= 10
#define QUAILORA_AVX512_BF16
#endif
#if __GNUC__ >= 11 && defined(__linux__)
#define QUAILORA_AMX
#endif
#endif

#endif
