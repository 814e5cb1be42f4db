// Which path runs: the best the processor has, or the one the environment names.
#include <cstdlib>
#include <stdexcept>

#include "path.h"
#include "x86.h"

namespace quailora {
namespace {

const std::vector<const Path*>& all_paths() {
  static const std::vector<const Path*> paths{
#ifdef QUAILORA_X86
      &amx_bf16, &avx512_bf16, &avx512, &avx2,
#endif
      &portable,
#if defined(__GNUC__)
      &amx_model,
#endif
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

const Path& chosen_path() {
  const char* forced = std::getenv("QUAILORA_CPU_PATH");
  for (const Path* path : all_paths()) {
    if (forced && path->name != std::string(forced)) continue;
    if (path->runs_here()) return *path;
    if (forced)
      throw std::invalid_argument(std::string("QUAILORA_CPU_PATH is '") + forced +
                                  "', which this processor lacks; it has " + listed(paths_here()));
  }
  throw std::invalid_argument(std::string("QUAILORA_CPU_PATH is '") + forced +
                              "', which is no path; this processor has " + listed(paths_here()));
}

}  // namespace quailora
