// The kernels that are compiled into libcuda.so.
#pragma once

#include "standin.h"

#include "../cuda_emulation.h"

#include <string_view>
#include <vector>

namespace standin {

using Run = std::function<void(const emulation::Launch&)>;

struct Kernel {
  std::string_view name;
  size_t num_parameters;
  // Copies the arguments' values, of which each is behind one of `values`, and returns what runs the kernel with them. The
  // addresses among them are added to `addresses`.
  Run (*bind)(void* const* values, std::vector<uintptr_t>& addresses);
};

// Of all source files.
std::vector<Kernel>& kernels();

}  // namespace standin
