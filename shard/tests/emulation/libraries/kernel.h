// The kernels that are compiled into libcuda.so.
#pragma once

#include "standin.h"

#include "../cuda_emulation.h"
#include "../early_emulation.h"

#include <string_view>
#include <vector>

namespace standin {

// A thread of a kernel.
using Run = std::function<void()>;

struct Kernel {
  std::string_view name;
  size_t num_parameters;
  // Copies the arguments' values, of which each is behind one of `values`, and returns what a thread does with them. The addresses
  // among them are added to `addresses`.
  Run (*bind)(void* const* values, std::vector<uintptr_t>& addresses);
};

// Of all source files.
std::vector<Kernel>& kernels();

}  // namespace standin
