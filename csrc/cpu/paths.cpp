// Which paths this processor runs.
#include <stdexcept>

#include "path.h"
#include "x86.h"

namespace quailora {
namespace {

const std::vector<const Path*>& all_paths() {
  static const std::vector<const Path*> paths{
#ifdef QUAILORA_AMX
      &amx_bf16,
#endif
#ifdef QUAILORA_AVX512_BF16
      &avx512_bf16,
#endif
#ifdef QUAILORA_X86
      &avx512, &avx2,
#endif
      &portable,
  };
  return paths;
}

std::string listed(const std::vector<std::string>& names) {
  std::string list;
  for (const auto& name : names) list += (list.empty() ? "" : ", ") + name;
  return list;
}

}  // namespace

std::string name(const Path& path) { return path.name; }

std::vector<std::string> paths_here() {
  std::vector<std::string> names;
  for (const Path* path : all_paths())
    if (path->runs_here()) names.emplace_back(path->name);
  return names;
}

const Path& path_named(const std::string& name) {
  for (const Path* path : all_paths())
    if ((name.empty() || path->name == name) && path->runs_here()) return *path;
  throw std::invalid_argument("QUAILORA_CPU_PATH is '" + name + "', which is none of the paths that were built and " +
                              "this processor runs: " + listed(paths_here()));
}

}  // namespace quailora
