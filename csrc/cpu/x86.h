// Code for x86-64 processors that not every x86-64 processor runs: compiled without -march, called only where
// cpuid says it runs. All headers come before TARGET_BEGIN, so that nothing the linker shares between files is compiled
// for one processor only.
#pragma once

#include "compiler.h"

#ifdef QUAILORA_X86
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "path.h"

#define QUAILORA_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TARGET_BEGIN(list) QUAILORA_PRAGMA(clang attribute push(__attribute__((target(list))), apply_to = function))
#define TARGET_END _Pragma("clang attribute pop")
#else
#define TARGET_BEGIN(list) _Pragma("GCC push_options") QUAILORA_PRAGMA(GCC target(list))
#define TARGET_END _Pragma("GCC pop_options")
#endif

#endif
