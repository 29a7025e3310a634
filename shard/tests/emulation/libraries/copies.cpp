// Copies and fills.
#include "driver.h"

#include <cstring>

namespace standin {

namespace {

// Where one end of a copy is.
enum class Side { Device, Host, Any };

bool is_valid(uintptr_t address, size_t bytes, Side side) {
  return side == Side::Device ? find_allocation(address, bytes) != nullptr : address != 0;
}

bool is_pageable(uintptr_t address, size_t bytes, Side side) {
  return side != Side::Device && find_allocation(address, bytes) == nullptr;
}

Operation copy_between(uintptr_t to, uintptr_t from, size_t bytes) {
  return [to, from, bytes] {
    std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    return CUDA_SUCCESS;
  };
}

// What is copied from pageable memory is read at the call; what is copied to it is there when the call returns. While a stream
// is captured neither can be, and the copy is refused.
CUresult copy(uintptr_t to, Side to_side, uintptr_t from, Side from_side, size_t bytes, CUstream handle) {
  Lock lock(state().mutex);
  const auto stream = find_stream(handle);
  if (stream == nullptr) return handle == nullptr ? CUDA_ERROR_INVALID_CONTEXT : CUDA_ERROR_INVALID_HANDLE;
  const Device& device = *stream->device;
  if (const CUresult result = check_context(&device); result != CUDA_SUCCESS) return result;
  if (bytes == 0) return CUDA_SUCCESS;
  if (!is_valid(to, bytes, to_side) || !is_valid(from, bytes, from_side)) return CUDA_ERROR_INVALID_VALUE;
  const bool reads_pageable = is_pageable(from, bytes, from_side), writes_pageable = is_pageable(to, bytes, to_side);
  if (stream->capture != nullptr && (reads_pageable || writes_pageable)) {
    return invalidate(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  }
  if (reads_pageable && !writes_pageable) {
    const auto* const start = reinterpret_cast<const char*>(from);
    return enqueue_locked(lock, stream, [to, copied = std::vector<char>(start, start + bytes)] {
      std::memcpy(reinterpret_cast<void*>(to), copied.data(), copied.size());
      return CUDA_SUCCESS;
    });
  }
  const CUresult result = enqueue_locked(lock, stream, copy_between(to, from, bytes));
  if (result != CUDA_SUCCESS || !writes_pageable) return result;
  drain(lock, *stream);
  return device.error;
}

CUresult copy_now(uintptr_t to, Side to_side, uintptr_t from, Side from_side, size_t bytes) {
  {
    Lock lock(state().mutex);
    if (const CUresult result = check_context(current()); result != CUDA_SUCCESS) return result;
    if (const CUresult result = check_unsafe_call(); result != CUDA_SUCCESS) return result;
  }
  return copy(to, to_side, from, from_side, bytes, nullptr);
}

template <typename T>
CUresult fill(CUdeviceptr to, T value, size_t count, CUstream handle) {
  Lock lock(state().mutex);
  const auto stream = find_stream(handle);
  if (stream == nullptr) return handle == nullptr ? CUDA_ERROR_INVALID_CONTEXT : CUDA_ERROR_INVALID_HANDLE;
  if (const CUresult result = check_context(stream->device); result != CUDA_SUCCESS) return result;
  if (count == 0) return CUDA_SUCCESS;
  if (to % sizeof(T) != 0 || !is_valid(to, count * sizeof(T), Side::Device)) return CUDA_ERROR_INVALID_VALUE;
  return enqueue_locked(lock, stream, [to, value, count] {
    T* const elements = reinterpret_cast<T*>(to);
    for (size_t i = 0; i < count; ++i) elements[i] = value;
    return CUDA_SUCCESS;
  });
}

uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace

}  // namespace standin

using namespace standin;

STANDIN_API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
  return copy(to, Side::Device, address(from), Side::Host, bytes, stream);
}

STANDIN_API CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return copy(address(to), Side::Host, from, Side::Device, bytes, stream);
}

STANDIN_API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return copy(to, Side::Device, from, Side::Device, bytes, stream);
}

STANDIN_API CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return copy(to, Side::Any, from, Side::Any, bytes, stream);
}

STANDIN_API CUresult cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t bytes, CUstream stream) {
  return copy(to, Side::Device, from, Side::Device, bytes, stream);
}

STANDIN_API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
  return copy_now(to, Side::Device, address(from), Side::Host, bytes);
}

STANDIN_API CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
  return copy_now(address(to), Side::Host, from, Side::Device, bytes);
}

STANDIN_API CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  return copy_now(to, Side::Device, from, Side::Device, bytes);
}

STANDIN_API CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  return copy_now(to, Side::Any, from, Side::Any, bytes);
}

STANDIN_API CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
  return fill(to, value, count, stream);
}

STANDIN_API CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, CUstream stream) {
  return fill(to, value, count, stream);
}

STANDIN_API CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
  return fill(to, value, count, stream);
}

STANDIN_API CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count) {
  return fill(to, value, count, nullptr);
}

STANDIN_API CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t count) { return fill(to, value, count, nullptr); }
