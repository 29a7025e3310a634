// Memory: of devices, in a file without a name for each device, which other processes can map too; and pinned memory of the
// host.
//
// An allocation is a mapping of its own that ends (but for the bytes up to a multiple of 256) where a page begins that nobody
// may touch, as the page before it is: a kernel or a copy that goes beyond it is seen.
//
// Of a device's memory it counts as whole pages of 2 MiB, each its own: a driver takes no more for it.
#include "driver.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace standin {

namespace {

constexpr size_t PAGE_BYTES = 4096;
constexpr size_t DEVICE_PAGE_BYTES = size_t{2} << 20;
constexpr size_t ALIGNMENT = 256;
// Of an allocation so much is filled with NaN. The rest of a large one reads as zero, and takes no memory before it is used.
constexpr size_t FILLED_BYTES = size_t{256} << 20;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

size_t counted_bytes(size_t bytes) { return round_up(bytes, DEVICE_PAGE_BYTES); }

// Bytes that nobody has. A file may say how many of each device other processes have, at any moment.
size_t free_bytes(const Device& device) {
  size_t others = 0;
  if (const char* const path = std::getenv("LOCKSTEP_EMULATED_GPU_OTHERS"); path != nullptr) {
    if (std::FILE* const file = std::fopen(path, "r"); file != nullptr) {
      if (std::fscanf(file, "%zu", &others) != 1) others = 0;
      std::fclose(file);
    }
  }
  const size_t taken = device.used_bytes + others;
  return taken < state().device_bytes ? state().device_bytes - taken : 0;
}

// Where in the system's files an allocation of another process is.
struct IpcHandle {
  uint64_t magic;
  int32_t process;
  int32_t fd;
  int32_t device;
  int32_t reserved;
  uint64_t file_offset;
  uint64_t file_bytes;
  uint64_t bytes;
};
constexpr uint64_t IPC_MAGIC = 0x4c4f434b53544550;
static_assert(sizeof(IpcHandle) <= 64);

bool open_memory(Device& device) {
  if (device.memory_fd >= 0) return true;
  char name[32];
  std::snprintf(name, sizeof name, "emulated-gpu-%d", device.index);
  device.memory_fd = memfd_create(name, MFD_CLOEXEC);
  return device.memory_fd >= 0;
}

// Maps `bytes` between two pages that may not be touched and says where they are: at the end of the mapping. Of a file, or of
// memory of the process's own if `fd` is negative.
char* map(Allocation& allocation, int fd) {
  const size_t inner = round_up(allocation.bytes, PAGE_BYTES);
  allocation.mapping_bytes = inner + 2 * PAGE_BYTES;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  allocation.mapping = mmap(nullptr, allocation.mapping_bytes, PROT_NONE, flags, -1, 0);
  if (allocation.mapping == MAP_FAILED) return nullptr;
  char* const start = static_cast<char*>(allocation.mapping) + PAGE_BYTES;
  const int protection = PROT_READ | PROT_WRITE;
  const void* const mapped = fd < 0 ? mmap(start, inner, protection, flags | MAP_FIXED, -1, 0)
                                    : mmap(start, inner, protection, MAP_SHARED | MAP_FIXED, fd,
                                           static_cast<off_t>(allocation.file_offset));
  if (mapped == MAP_FAILED) {
    munmap(allocation.mapping, allocation.mapping_bytes);
    return nullptr;
  }
  return start + inner - round_up(allocation.bytes, ALIGNMENT);
}

void release(const Allocation& allocation) {
  if (allocation.mapping != nullptr) munmap(allocation.mapping, allocation.mapping_bytes);
  if (allocation.kind != Memory::Device) return;
  fallocate(allocation.device->memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
            static_cast<off_t>(allocation.file_offset), static_cast<off_t>(allocation.file_bytes));
  allocation.device->used_bytes -= counted_bytes(allocation.bytes);
}

void keep(char* at, const Allocation& allocation) { state().allocations[reinterpret_cast<uintptr_t>(at)] = allocation; }

// Frees what begins here, once nothing is under way that could use it.
CUresult free_at(uintptr_t address, std::initializer_list<Memory> kinds) {
  STANDIN_CONTEXT(lock, device);
  if (address == 0) return CUDA_SUCCESS;
  const auto found = state().allocations.find(address);
  if (found == state().allocations.end() || std::find(kinds.begin(), kinds.end(), found->second.kind) == kinds.end()) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (const CUresult result = check_unsafe_call(); result != CUDA_SUCCESS) return result;
  drain_device(lock, *found->second.device);
  const auto again = state().allocations.find(address);
  if (again == state().allocations.end()) return CUDA_ERROR_INVALID_VALUE;
  release(again->second);
  state().allocations.erase(again);
  return device->error;
}

CUresult allocate_host(void** out, size_t bytes) {
  STANDIN_CONTEXT(lock, device);
  if (out == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  if (const CUresult result = check_unsafe_call(); result != CUDA_SUCCESS) return result;
  Allocation allocation{.kind = Memory::Pinned, .bytes = bytes, .device = device};
  char* const at = map(allocation, -1);
  if (at == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
  std::memset(at, 0xff, std::min(bytes, FILLED_BYTES));
  keep(at, allocation);
  *out = at;
  return CUDA_SUCCESS;
}

}  // namespace

const Allocation* find_allocation(uintptr_t from, size_t bytes) {
  auto found = state().allocations.upper_bound(from);
  if (found == state().allocations.begin()) return nullptr;
  --found;
  const uintptr_t offset = from - found->first;
  // The end of an allocation is a part of it, for arrays without elements.
  if (offset > found->second.bytes || bytes > found->second.bytes - offset) return nullptr;
  return &found->second;
}

bool reachable_locked(int device, uintptr_t from, size_t bytes) {
  const Allocation* const allocation = find_allocation(from, bytes);
  if (allocation == nullptr) return false;
  if (allocation->kind != Memory::Device || allocation->device->index == device) return true;
  return state().devices[device].reaches[allocation->device->index];
}

bool reachable(CUdevice device, const void* from, size_t bytes) {
  Lock lock(state().mutex);
  return device >= 0 && reachable_locked(device, reinterpret_cast<uintptr_t>(from), bytes);
}

void free_all(Device& device) {
  std::erase_if(state().allocations, [&](const auto& entry) {
    if (entry.second.device != &device) return false;
    release(entry.second);
    return true;
  });
}

}  // namespace standin

using namespace standin;

STANDIN_API CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
  STANDIN_CONTEXT(lock, device);
  *total = state().device_bytes;
  *free = free_bytes(*device);
  return CUDA_SUCCESS;
}

// For tests: bytes of the host that are pinned for the current device.
STANDIN_API size_t standin_pinned_bytes() {
  Lock lock(state().mutex);
  const Device* const device = current();
  size_t pinned = 0;
  for (const auto& [address, allocation] : state().allocations) {
    const bool counts = allocation.kind == Memory::Pinned && allocation.device == device;
    if (counts) pinned += round_up(allocation.bytes, PAGE_BYTES);
  }
  return pinned;
}

STANDIN_API CUresult cuMemAlloc_v2(CUdeviceptr* out, size_t bytes) {
  STANDIN_CONTEXT(lock, device);
  if (out == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  if (const CUresult result = check_unsafe_call(); result != CUDA_SUCCESS) return result;
  if (bytes > state().device_bytes || counted_bytes(bytes) > free_bytes(*device)) return CUDA_ERROR_OUT_OF_MEMORY;
  const size_t file_bytes = round_up(bytes, PAGE_BYTES);
  Allocation allocation{.kind = Memory::Device, .bytes = bytes, .device = device};
  allocation.file_offset = device->memory_end;
  allocation.file_bytes = file_bytes;
  if (!open_memory(*device)) return CUDA_ERROR_OPERATING_SYSTEM;
  if (ftruncate(device->memory_fd, static_cast<off_t>(device->memory_end + file_bytes)) != 0) {
    return CUDA_ERROR_OPERATING_SYSTEM;
  }
  char* const at = map(allocation, device->memory_fd);
  if (at == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
  device->memory_end += file_bytes;
  device->used_bytes += counted_bytes(bytes);
  std::memset(at, 0xff, std::min(bytes, FILLED_BYTES));
  keep(at, allocation);
  *out = reinterpret_cast<CUdeviceptr>(at);
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuMemFree_v2(CUdeviceptr address) { return free_at(address, {Memory::Device}); }

STANDIN_API CUresult cuMemHostAlloc(void** out, size_t bytes, unsigned flags) {
  constexpr unsigned PORTABLE = 1, DEVICE_MAP = 2, WRITE_COMBINED = 4;
  if (flags > (PORTABLE | DEVICE_MAP | WRITE_COMBINED)) return CUDA_ERROR_INVALID_VALUE;
  return allocate_host(out, bytes);
}

STANDIN_API CUresult cuMemAllocHost_v2(void** out, size_t bytes) { return allocate_host(out, bytes); }

STANDIN_API CUresult cuMemFreeHost(void* address) {
  return free_at(reinterpret_cast<uintptr_t>(address), {Memory::Pinned});
}

STANDIN_API CUresult cuMemHostGetFlags(unsigned* flags, void* address) {
  STANDIN_CONTEXT(lock, device);
  const Allocation* const found = find_allocation(reinterpret_cast<uintptr_t>(address), 1);
  if (found == nullptr || found->kind != Memory::Pinned) return CUDA_ERROR_INVALID_VALUE;
  *flags = 0;
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* out, void* address, unsigned flags) {
  STANDIN_CONTEXT(lock, device);
  const Allocation* const found = find_allocation(reinterpret_cast<uintptr_t>(address), 1);
  const bool is_host = found != nullptr && (found->kind == Memory::Pinned || found->kind == Memory::Registered);
  if (!is_host || flags != 0) return CUDA_ERROR_INVALID_VALUE;
  *out = reinterpret_cast<CUdeviceptr>(address);
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuMemHostRegister_v2(void* address, size_t bytes, unsigned) {
  STANDIN_CONTEXT(lock, device);
  if (address == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  if (const CUresult result = check_unsafe_call(); result != CUDA_SUCCESS) return result;
  const auto start = reinterpret_cast<uintptr_t>(address);
  for (const auto& [other, allocation] : state().allocations) {
    if (start < other + allocation.bytes && other < start + bytes) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  }
  keep(static_cast<char*>(address), {.kind = Memory::Registered, .bytes = bytes, .device = device});
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuMemHostUnregister(void* address) {
  const CUresult result = free_at(reinterpret_cast<uintptr_t>(address), {Memory::Registered});
  return result == CUDA_ERROR_INVALID_VALUE ? CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED : result;
}

struct CUipcMemHandle {
  char bytes[64];
};

STANDIN_API CUresult cuIpcGetMemHandle(CUipcMemHandle* out, CUdeviceptr address) {
  STANDIN_CONTEXT(lock, device);
  const Allocation* const found = find_allocation(address, 1);
  if (out == nullptr || found == nullptr || found->kind != Memory::Device) return CUDA_ERROR_INVALID_VALUE;
  // As of CUDA, the handle is that of the whole allocation.
  const IpcHandle handle{IPC_MAGIC, getpid(), found->device->memory_fd, found->device->index, 0,
                         found->file_offset, found->file_bytes, found->bytes};
  std::memset(out->bytes, 0, sizeof out->bytes);
  std::memcpy(out->bytes, &handle, sizeof handle);
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuIpcOpenMemHandle_v2(CUdeviceptr* out, CUipcMemHandle bytes, unsigned flags) {
  constexpr unsigned LAZY_ENABLE_PEER_ACCESS = 1;
  STANDIN_CONTEXT(lock, device);
  IpcHandle handle;
  std::memcpy(&handle, bytes.bytes, sizeof handle);
  if (out == nullptr || handle.magic != IPC_MAGIC || flags != LAZY_ENABLE_PEER_ACCESS) return CUDA_ERROR_INVALID_VALUE;
  if (const CUresult result = check_unsafe_call(); result != CUDA_SUCCESS) return result;
  // As of CUDA, a process does not open what it allocated itself.
  if (handle.process == getpid()) return CUDA_ERROR_INVALID_CONTEXT;
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.process, handle.fd);
  const int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return CUDA_ERROR_INVALID_VALUE;
  Allocation allocation{.kind = Memory::Peer, .bytes = handle.bytes, .device = device};
  allocation.file_offset = handle.file_offset;
  allocation.file_bytes = handle.file_bytes;
  char* const at = map(allocation, fd);
  close(fd);
  if (at == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
  keep(at, allocation);
  *out = reinterpret_cast<CUdeviceptr>(at);
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuIpcCloseMemHandle(CUdeviceptr address) { return free_at(address, {Memory::Peer}); }
