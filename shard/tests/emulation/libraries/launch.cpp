// Modules, and launches of the kernels in them.
#include "driver.h"
#include "kernel.h"

#include <algorithm>
#include <csignal>
#include <set>

namespace standin {

struct Function {
  const Kernel* kernel = nullptr;
  const Device* device = nullptr;
  size_t max_dynamic_shared_bytes = STATIC_SHARED_BYTES;
};

struct Module {
  const Device* device = nullptr;
  std::set<std::string, std::less<>> names;
  std::map<std::string, Function, std::less<>> functions;
};

std::vector<Kernel>& kernels() {
  static auto* const kernels = new std::vector<Kernel>;
  return *kernels;
}

namespace {

// The emulation has one state for the process.
std::mutex& emulation_mutex() {
  static auto* const mutex = new std::mutex;
  return *mutex;
}

thread_local bool is_in_kernel = false;
bool was_address_illegal = false;
struct sigaction earlier_action[NSIG];

// Ends a launch that touches what it may not. What another part of the process does is left to the handler of before.
void on_fault(int signal, siginfo_t* info, void* context) {
  if (is_in_kernel) {
    was_address_illegal = true;
    emulation::fail("a kernel reads or writes outside of all allocations");
  }
  const struct sigaction& earlier = earlier_action[signal];
  if (earlier.sa_flags & SA_SIGINFO) return earlier.sa_sigaction(signal, info, context);
  if (earlier.sa_handler != SIG_DFL && earlier.sa_handler != SIG_IGN) return earlier.sa_handler(signal);
  // The instruction faults again, and the process ends as it would have.
  std::signal(signal, SIG_DFL);
}

void watch_faults() {
  for (const int signal : {SIGSEGV, SIGBUS}) {
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    // A launch that failed is left from within the handler, which therefore may not block the signal.
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(signal, &action, &earlier_action[signal]);
  }
}

// A kernel, its arguments, and how it is launched.
struct KernelOperation {
  const Kernel* kernel;
  emulation::Launch launch;
  int device;
  std::vector<uintptr_t> addresses;
  Run thread;

  CUresult operator()() const {
    if (const CUresult result = check_addresses(); result != CUDA_SUCCESS) return result;
    return emulate([&] { emulation::run(launch, thread); });
  }

  // Has a block run until it waits for the kernel before.
  CUresult begin(std::unique_ptr<emulation::Begun>& begun) const {
    if (const CUresult result = check_addresses(); result != CUDA_SUCCESS) return result;
    return emulate([&] { begun = std::make_unique<emulation::Begun>(launch, thread); });
  }

  CUresult finish(std::unique_ptr<emulation::Begun> begun) const {
    return emulate([&] {
      // Also if it fails, it is given up under the lock.
      const std::unique_ptr<emulation::Begun> last = std::move(begun);
      last->finish();
    });
  }

  CUresult check_addresses() const {
    for (size_t i = 0; i < addresses.size(); ++i) {
      const Lock lock(state().mutex);
      if (addresses[i] == 0 || reachable_locked(device, addresses[i], 0)) continue;
      std::fprintf(stderr, "emulated GPU: %s: pointer %zu of its arguments (%#zx) is in no allocation of GPU %d\n",
                   kernel->name.data(), i, static_cast<size_t>(addresses[i]), device);
      return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    return CUDA_SUCCESS;
  }

  template <typename Work>
  CUresult emulate(Work work) const {
    const std::lock_guard lock(emulation_mutex());
    [[maybe_unused]] static const bool watched = (watch_faults(), true);
    emulation::state.survives = true;
    was_address_illegal = false;
    is_in_kernel = true;
    try {
      work();
      is_in_kernel = false;
      return CUDA_SUCCESS;
    } catch (const emulation::Failure& failure) {
      is_in_kernel = false;
      std::fprintf(stderr, "emulated GPU: %s: %s\n", kernel->name.data(), failure.why);
      return was_address_illegal ? CUDA_ERROR_ILLEGAL_ADDRESS : CUDA_ERROR_LAUNCH_FAILED;
    }
  }
};

Operation launch_operation(const Kernel& kernel, const emulation::Launch& launch, int device, void* const* values) {
  std::vector<uintptr_t> addresses;
  Run thread = kernel.bind(values, addresses);
  return KernelOperation{&kernel, launch, device, std::move(addresses), std::move(thread)};
}

bool fits(const emulation::Launch& launch, const Function& function) {
  const dim3 grid = launch.grid, block = launch.block;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0) return false;
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) return false;
  if (block.x > 1024 || block.y > 1024 || block.z > 64) return false;
  if (static_cast<size_t>(block.x) * block.y * block.z > emulation::MAX_THREADS) return false;
  return launch.shared_bytes <= function.max_dynamic_shared_bytes;
}

Function* find_function(CUfunction handle) {
  for (const auto& [module_handle, module] : state().modules) {
    for (auto& [name, function] : module->functions) {
      if (reinterpret_cast<CUfunction>(&function) == handle) return &function;
    }
  }
  return nullptr;
}

CUresult launch_kernel(CUfunction handle, emulation::Launch launch, CUstream stream_handle, void** values, void** extra) {
  STANDIN_CONTEXT(lock, device);
  const Function* const function = find_function(handle);
  const auto stream = find_stream(stream_handle);
  if (function == nullptr || stream == nullptr || function->device != stream->device) return CUDA_ERROR_INVALID_HANDLE;
  if (extra != nullptr) return CUDA_ERROR_NOT_SUPPORTED;
  if (values == nullptr && function->kernel->num_parameters > 0) return CUDA_ERROR_INVALID_VALUE;
  if (!fits(launch, *function)) return CUDA_ERROR_INVALID_VALUE;
  launch.seed = state().seed;
  return enqueue_locked(lock, stream, launch_operation(*function->kernel, launch, stream->device->index, values));
}

CUresult load_module(CUmodule* handle, const void* image) {
  STANDIN_CONTEXT(lock, device);
  if (handle == nullptr || image == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (const CUresult result = check_unsafe_call(); result != CUDA_SUCCESS) return result;
  if (std::strncmp(static_cast<const char*>(image), STANDIN_IMAGE, sizeof STANDIN_IMAGE - 1) != 0) {
    return CUDA_ERROR_INVALID_IMAGE;
  }
  const auto module = std::make_shared<Module>();
  module->device = device;
  const char* name = static_cast<const char*>(image) + sizeof STANDIN_IMAGE - 1;
  for (; *name != '\0'; name += std::strlen(name) + 1) module->names.emplace(name);
  *handle = reinterpret_cast<CUmodule>(module.get());
  state().modules[module.get()] = module;
  return CUDA_SUCCESS;
}

enum FunctionAttribute {
  MAX_THREADS_PER_BLOCK = 0,
  NUM_REGS = 4,
  PTX_VERSION = 5,
  BINARY_VERSION = 6,
  MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
  PREFERRED_SHARED_MEMORY_CARVEOUT = 9,
  NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14,
  NUM_ATTRIBUTES = 16,
};

}  // namespace

Runner::Runner() = default;
Runner::~Runner() { forget(); }

void Runner::forget() {
  const std::lock_guard lock(emulation_mutex());
  begun_.reset();
}

CUresult Runner::run(const Operation& operation, const Operation& next) {
  std::unique_ptr<emulation::Begun> begun = std::move(begun_);
  const auto* const kernel = operation.target<KernelOperation>();
  const auto* const next_kernel = next.target<KernelOperation>();
  if (kernel != nullptr && next_kernel != nullptr && next_kernel->launch.begins_early) {
    if (const CUresult result = next_kernel->begin(begun_); result != CUDA_SUCCESS) {
      begun_ = std::move(begun);
      forget();
      return result;
    }
  }
  return begun == nullptr ? operation() : kernel->finish(std::move(begun));
}

}  // namespace standin

using namespace standin;

STANDIN_API CUresult cuModuleLoadData(CUmodule* handle, const void* image) { return load_module(handle, image); }

STANDIN_API CUresult cuModuleLoadDataEx(CUmodule* handle, const void* image, unsigned, void*, void**) {
  return load_module(handle, image);
}

STANDIN_API CUresult cuModuleUnload(CUmodule handle) {
  STANDIN_CONTEXT(lock, device);
  if (!state().modules.contains(handle)) return CUDA_ERROR_INVALID_HANDLE;
  drain_device(lock, *device);
  state().modules.erase(handle);
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuModuleGetFunction(CUfunction* handle, CUmodule module_handle, const char* name) {
  STANDIN_CONTEXT(lock, device);
  const auto found = state().modules.find(module_handle);
  if (found == state().modules.end()) return CUDA_ERROR_INVALID_HANDLE;
  Module& module = *found->second;
  const auto kernel =
      std::find_if(kernels().begin(), kernels().end(), [&](const Kernel& kernel) { return kernel.name == name; });
  if (!module.names.contains(std::string_view(name)) || kernel == kernels().end()) return CUDA_ERROR_NOT_FOUND;
  Function& function = module.functions.try_emplace(name).first->second;
  function.kernel = &*kernel;
  function.device = module.device;
  *handle = reinterpret_cast<CUfunction>(&function);
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, CUmodule, const char*) { return CUDA_ERROR_NOT_FOUND; }

STANDIN_API CUresult cuFuncSetAttribute(CUfunction handle, int attribute, int value) {
  STANDIN_CONTEXT(lock, device);
  Function* const function = find_function(handle);
  if (function == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (attribute == PREFERRED_SHARED_MEMORY_CARVEOUT || attribute == NON_PORTABLE_CLUSTER_SIZE_ALLOWED) return CUDA_SUCCESS;
  const bool is_size = attribute == MAX_DYNAMIC_SHARED_SIZE_BYTES && value >= 0;
  if (!is_size || static_cast<size_t>(value) > MAX_SHARED_BYTES) return CUDA_ERROR_INVALID_VALUE;
  function->max_dynamic_shared_bytes = static_cast<size_t>(value);
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuFuncGetAttribute(int* value, int attribute, CUfunction handle) {
  STANDIN_CONTEXT(lock, device);
  const Function* const function = find_function(handle);
  if (function == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (attribute < 0 || attribute >= NUM_ATTRIBUTES) return CUDA_ERROR_INVALID_VALUE;
  switch (attribute) {
    case MAX_THREADS_PER_BLOCK:
      *value = emulation::MAX_THREADS;
      break;
    case NUM_REGS:
      *value = 64;
      break;
    case PTX_VERSION:
    case BINARY_VERSION:
      *value = 90;
      break;
    case MAX_DYNAMIC_SHARED_SIZE_BYTES:
      *value = static_cast<int>(function->max_dynamic_shared_bytes);
      break;
    default:
      *value = 0;
  }
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuFuncSetCacheConfig(CUfunction, unsigned) { return CUDA_SUCCESS; }

STANDIN_API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction handle, int threads,
                                                                          size_t shared_bytes, unsigned) {
  STANDIN_CONTEXT(lock, device);
  if (find_function(handle) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (threads < 1 || threads > 1024) return CUDA_ERROR_INVALID_VALUE;
  // Of 2048 threads, 32 blocks, and 228 KiB, of which each block takes one more than it asks for.
  const size_t by_shared = (MAX_SHARED_BYTES + 1024) / (shared_bytes + 1024);
  *blocks = static_cast<int>(std::min({by_shared, static_cast<size_t>(2048 / threads), size_t{32}}));
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction handle, int threads,
                                                                 size_t shared_bytes) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, handle, threads, shared_bytes, 0);
}

STANDIN_API CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                                    unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void** values,
                                    void** extra) {
  const emulation::Launch launch{{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, 0};
  return launch_kernel(function, launch, stream, values, extra);
}

struct CUlaunchAttribute {
  unsigned id;
  char pad[4];
  union {
    unsigned cluster[3];
    int number;
    uint64_t bytes[8];
  } value;
};
static_assert(sizeof(CUlaunchAttribute) == 72);

struct CUlaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  CUstream stream;
  const CUlaunchAttribute* attributes;
  unsigned num_attributes;
};
static_assert(sizeof(CUlaunchConfig) == 56);

STANDIN_API CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** values, void** extra) {
  enum Attribute : unsigned { CLUSTER_DIMENSION = 4, PROGRAMMATIC_STREAM_SERIALIZATION = 6, LAST = 16 };
  constexpr unsigned MAX_CLUSTER = 8;
  bool begins_early = false;
  if (config == nullptr || (config->attributes == nullptr && config->num_attributes > 0)) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < config->num_attributes; ++i) {
    const CUlaunchAttribute& attribute = config->attributes[i];
    if (attribute.id > LAST) return CUDA_ERROR_INVALID_VALUE;
    const bool is_flag = (attribute.value.number & ~1) == 0;
    if (attribute.id == PROGRAMMATIC_STREAM_SERIALIZATION && !is_flag) return CUDA_ERROR_INVALID_VALUE;
    if (attribute.id == PROGRAMMATIC_STREAM_SERIALIZATION) begins_early = attribute.value.number == 1;
    if (attribute.id != CLUSTER_DIMENSION) continue;
    const auto [x, y, z] = attribute.value.cluster;
    if (x == 0 || y == 0 || z == 0 || x * y * z > MAX_CLUSTER) return CUDA_ERROR_INVALID_VALUE;
    if (config->grid_x % x != 0 || config->grid_y % y != 0 || config->grid_z % z != 0) return CUDA_ERROR_INVALID_VALUE;
  }
  emulation::Launch launch{{config->grid_x, config->grid_y, config->grid_z},
                           {config->block_x, config->block_y, config->block_z},
                           config->shared_bytes};
  launch.begins_early = begins_early;
  return launch_kernel(function, launch, config->stream, values, extra);
}

STANDIN_API CUresult cuLaunchHostFunc(CUstream stream, void (*function)(void*), void* argument) {
  if (function == nullptr) return CUDA_ERROR_INVALID_VALUE;
  return enqueue(stream, [function, argument] {
    function(argument);
    return CUDA_SUCCESS;
  });
}
