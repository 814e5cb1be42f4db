// The paths (ways to compute for one kind of processor) and the threads that the operations on a CPU take.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace quailora {

// Calls the function once for each of 0 .. units - 1, in any order, on any threads.
using Parallel = std::function<void(int64_t units, const std::function<void(int64_t)>& unit)>;

struct Path;

// The path of that name; of no name, the best this processor runs.
// Throws std::invalid_argument if there is none of that name, or the processor lacks it.
const Path& path_named(const std::string& name);
std::string name(const Path& path);

// The names of the paths this processor runs, the best first.
std::vector<std::string> paths_here();

}  // namespace quailora
