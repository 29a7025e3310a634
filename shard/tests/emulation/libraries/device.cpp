// Devices, contexts, and the names of errors.
#include "driver.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>

namespace standin {

namespace {

thread_local Device* current_device = nullptr;

uint64_t setting(const char* name, uint64_t otherwise) {
  const char* const text = std::getenv(name);
  return text == nullptr || *text == '\0' ? otherwise : std::strtoull(text, nullptr, 10);
}

Device* find_device(int index) {
  return index < 0 || index >= state().num_devices ? nullptr : &state().devices[index];
}

Device* find_context(CUcontext handle) {
  for (int i = 0; i < state().num_devices; ++i) {
    Device& device = state().devices[i];
    if (handle == reinterpret_cast<CUcontext>(&device) && device.retained > 0) return &device;
  }
  return nullptr;
}

struct ErrorName {
  CUresult error;
  const char* name;
  const char* text;
};

constexpr ErrorName ERRORS[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED, "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", "peer access is already enabled"},
    {CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "part or all of the requested memory range is already mapped"},
    {CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "pointer does not correspond to a registered memory region"},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {CUDA_ERROR_STREAM_CAPTURE_MERGE, "CUDA_ERROR_STREAM_CAPTURE_MERGE",
     "operation would result in a merge of separate capture sequences"},
    {CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream"},
    {CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED",
     "capturing stream has unjoined work"},
    {CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
     "dependency created on uncaptured work in another stream"},
    {CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {CUDA_ERROR_CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capture"},
    {CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
     "attempt to terminate a thread-local capture sequence from another thread"},
};

const ErrorName* find_error(CUresult error) {
  for (const ErrorName& known : ERRORS) {
    if (known.error == error) return &known;
  }
  return nullptr;
}

int attribute(int which, const Device& device) {
  switch (which) {
    case 1:    // MAX_THREADS_PER_BLOCK
    case 2:    // MAX_BLOCK_DIM_X
    case 3:    // MAX_BLOCK_DIM_Y
      return 1024;
    case 4:  // MAX_BLOCK_DIM_Z
      return 64;
    case 5:  // MAX_GRID_DIM_X
      return 0x7fffffff;
    case 6:  // MAX_GRID_DIM_Y
    case 7:  // MAX_GRID_DIM_Z
      return 65535;
    case 8:  // MAX_SHARED_MEMORY_PER_BLOCK
      return STATIC_SHARED_BYTES;
    case 9:  // TOTAL_CONSTANT_MEMORY
      return 64 << 10;
    case 10:  // WARP_SIZE
      return 32;
    case 12:  // MAX_REGISTERS_PER_BLOCK
    case 82:  // MAX_REGISTERS_PER_MULTIPROCESSOR
      return 64 << 10;
    case 16:  // MULTIPROCESSOR_COUNT
      return 132;
    case 19:   // CAN_MAP_HOST_MEMORY
    case 31:   // CONCURRENT_KERNELS
    case 41:   // UNIFIED_ADDRESSING
    case 78:   // STREAM_PRIORITIES_SUPPORTED
    case 114:  // READ_ONLY_HOST_REGISTER_SUPPORTED
      return 1;
    case 33:  // PCI_BUS_ID
      return device.index + 1;
    case 38:  // L2_CACHE_SIZE
      return 50 << 20;
    case 39:  // MAX_THREADS_PER_MULTIPROCESSOR
      return 2048;
    case 40:  // ASYNC_ENGINE_COUNT
      return 3;
    case 75:  // COMPUTE_CAPABILITY_MAJOR
      return 9;
    case 81:  // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
      return MAX_SHARED_BYTES + 1024;
    case 97:  // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
      return MAX_SHARED_BYTES;
    case 106:  // MAX_BLOCKS_PER_MULTIPROCESSOR
      return 32;
    case 111:  // RESERVED_SHARED_MEMORY_PER_BLOCK
      return 1024;
    default:
      return 0;
  }
}

}  // namespace

State& state() {
  static State* const state = new State;
  return *state;
}

Device* current() { return current_device; }

CUresult check_context(const Device* device) {
  if (!state().initialized) return CUDA_ERROR_NOT_INITIALIZED;
  if (device == nullptr || device->retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
  return device->error;
}

}  // namespace standin

using namespace standin;

STANDIN_API CUresult cuInit(unsigned flags) {
  Lock lock(state().mutex);
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (state().initialized) return CUDA_SUCCESS;
  state().num_devices = static_cast<int>(std::min<uint64_t>(setting("LOCKSTEP_EMULATED_GPUS", 8), MAX_DEVICES));
  state().device_bytes = setting("LOCKSTEP_EMULATED_GPU_BYTES", uint64_t{4} << 30);
  state().has_peers = setting("LOCKSTEP_EMULATED_PEERS", 1) != 0;
  state().max_delay_us = static_cast<unsigned>(setting("LOCKSTEP_EMULATED_DELAY_US", 0));
  state().seed = setting("LOCKSTEP_EMULATED_SEED", 1);
  for (int i = 0; i < state().num_devices; ++i) state().devices[i].index = i;
  state().initialized = true;
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuDriverGetVersion(int* version) {
  if (version == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *version = 13000;
  return CUDA_SUCCESS;
}

// The device of an index, of a call that needs no context.
#define STANDIN_DEVICE(lock, device, index)                                  \
  Lock lock(state().mutex);                                                  \
  if (!state().initialized) return CUDA_ERROR_NOT_INITIALIZED;               \
  [[maybe_unused]] Device* const device = find_device(index);                \
  if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE

STANDIN_API CUresult cuDeviceGetCount(int* count) {
  Lock lock(state().mutex);
  if (!state().initialized) return CUDA_ERROR_NOT_INITIALIZED;
  *count = state().num_devices;
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuDeviceGet(CUdevice* out, int ordinal) {
  STANDIN_DEVICE(lock, device, ordinal);
  *out = ordinal;
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuDeviceGetName(char* name, int length, CUdevice index) {
  STANDIN_DEVICE(lock, device, index);
  std::snprintf(name, static_cast<size_t>(length), "Emulated GPU");
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice index) {
  STANDIN_DEVICE(lock, device, index);
  *bytes = state().device_bytes;
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuDeviceGetAttribute(int* value, int which, CUdevice index) {
  STANDIN_DEVICE(lock, device, index);
  if (which < 1) return CUDA_ERROR_INVALID_VALUE;
  *value = attribute(which, *device);
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuDeviceGetPCIBusId(char* id, int length, CUdevice index) {
  STANDIN_DEVICE(lock, device, index);
  if (length < 13) return CUDA_ERROR_INVALID_VALUE;
  std::snprintf(id, static_cast<size_t>(length), "0000:%02X:00.0", index + 1);
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuDeviceGetUuid_v2(char (*uuid)[16], CUdevice index) {
  STANDIN_DEVICE(lock, device, index);
  std::memcpy(*uuid, "emulated device", sizeof *uuid);
  (*uuid)[15] = static_cast<char>(index);
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuDeviceCanAccessPeer(int* can, CUdevice index, CUdevice peer) {
  STANDIN_DEVICE(lock, device, index);
  if (find_device(peer) == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  *can = state().has_peers && index != peer;
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice index) {
  STANDIN_DEVICE(lock, device, index);
  if (device->null_stream == nullptr) device->null_stream = new_stream(*device);
  ++device->retained;
  *context = reinterpret_cast<CUcontext>(device);
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice index) {
  STANDIN_DEVICE(lock, device, index);
  if (device->retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
  if (device->retained == 1) {
    drain_device(lock, *device);
    free_all(*device);
    device->error = CUDA_SUCCESS;
    std::fill(std::begin(device->reaches), std::end(device->reaches), false);
  }
  --device->retained;
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuCtxSetCurrent(CUcontext context) {
  Lock lock(state().mutex);
  if (!state().initialized) return CUDA_ERROR_NOT_INITIALIZED;
  Device* const device = context == nullptr ? nullptr : find_context(context);
  if (context != nullptr && device == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  current_device = device;
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuCtxGetCurrent(CUcontext* context) {
  Lock lock(state().mutex);
  if (!state().initialized) return CUDA_ERROR_NOT_INITIALIZED;
  *context = reinterpret_cast<CUcontext>(current_device);
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuCtxGetDevice(CUdevice* index) {
  STANDIN_CONTEXT(lock, device);
  *index = device->index;
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuCtxGetApiVersion(CUcontext, unsigned* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  STANDIN_CONTEXT(lock, device);
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = -5;
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuCtxEnablePeerAccess(CUcontext peer, unsigned flags) {
  STANDIN_CONTEXT(lock, device);
  Device* const other = find_context(peer);
  if (other == nullptr || other == device) return CUDA_ERROR_INVALID_CONTEXT;
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (device->reaches[other->index]) return CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
  device->reaches[other->index] = true;
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuCtxSynchronize() {
  STANDIN_CONTEXT(lock, device);
  for (const auto& [handle, stream] : state().streams) {
    if (stream->device != device || stream->capture == nullptr) continue;
    return invalidate(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  }
  drain_device(lock, *device);
  return device->error;
}

STANDIN_API CUresult cuGetErrorName(CUresult error, const char** name) {
  const ErrorName* const known = find_error(error);
  *name = known == nullptr ? nullptr : known->name;
  return known == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

STANDIN_API CUresult cuGetErrorString(CUresult error, const char** text) {
  const ErrorName* const known = find_error(error);
  *text = known == nullptr ? nullptr : known->text;
  return known == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
