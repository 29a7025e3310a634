// The stand-in for libnccl.so: ranks are threads or processes of this host, which meet in memory that they share.
//
// The memory is a file without a name in the process that made the id, found through the system's list of that process's files:
// as with NCCL itself, that process must live until all ranks have joined, and nothing is left behind by a process that is
// killed. A collective is an operation of its stream. It waits for ranks that are missing until the communicator is aborted.
//
// A communicator that does not block puts collectives into the queue from a thread of its own, for a queue may be full.
#include "standin.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <linux/futex.h>
#include <memory>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <thread>
#include <unistd.h>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

enum ncclResult_t : unsigned {
  ncclSuccess = 0,
  ncclUnhandledCudaError = 1,
  ncclSystemError = 2,
  ncclInternalError = 3,
  ncclInvalidArgument = 4,
  ncclInvalidUsage = 5,
  ncclRemoteError = 6,
  ncclInProgress = 7,
};

enum DataType : unsigned { FLOAT32 = 7, BFLOAT16 = 9 };
enum ReduceOp : unsigned { SUM = 0, MAX = 2 };
enum class Kind : uint32_t { AllReduce = 1, AllGather = 2 };

constexpr int MAX_RANKS = 16;
constexpr size_t CHUNK_BYTES = 256 << 10;

// What a rank is about to do, which must be the same for all.
struct Step {
  Kind kind;
  uint32_t type;
  uint32_t op;
  uint32_t reserved;
  uint64_t bytes;
  bool operator==(const Step&) const = default;
};

struct Rank {
  // Process and the time of its start, so that another one of the same number is not taken for it; 0 until it has joined.
  std::atomic<int32_t> process;
  std::atomic<uint64_t> started;
  std::atomic<int32_t> device;
  std::atomic<uint32_t> has_left;
  // Chunks that it has shown so far.
  std::atomic<uint64_t> shown;
  // Of the last two chunks, by turns: a rank that shows the next one has read all of the last but one.
  Step steps[2];
  alignas(64) char data[2][CHUNK_BYTES];
};

struct Shared {
  std::atomic<uint32_t> num_ranks;
  std::atomic<uint32_t> num_joined;
  // Counts what happens, for those that wait.
  std::atomic<uint32_t> events;
  Rank ranks[MAX_RANKS];
};

struct UniqueId {
  uint64_t magic;
  uint64_t started;
  int32_t process;
  int32_t fd;
};
constexpr uint64_t ID_MAGIC = 0x4c4f434b4e43434c;

// When a process started, or 0 if it has ended, be it reaped or not.
uint64_t start_of(int process) {
  char path[64], text[1024];
  std::snprintf(path, sizeof path, "/proc/%d/stat", process);
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  const ssize_t length = read(fd, text, sizeof text - 1);
  close(fd);
  if (length <= 0) return 0;
  text[length] = '\0';
  // The name before may hold spaces and brackets. The state is the first field after it, and the start the twentieth.
  const char* field = std::strrchr(text, ')');
  if (field == nullptr || field[1] == '\0' || field[2] == 'Z' || field[2] == 'X') return 0;
  field += 2;
  for (int i = 0; i < 19 && field != nullptr; ++i) field = std::strchr(field + 1, ' ');
  return field == nullptr ? 0 : std::strtoull(field + 1, nullptr, 10);
}

class Comm {
 public:
  Shared* shared = nullptr;
  int rank = 0;
  int num_ranks = 0;
  CUdevice device = 0;
  uint64_t num_chunks = 0;
  std::atomic<bool> aborted{false};
  // Of the last call that takes time.
  std::atomic<unsigned> state{ncclInProgress};
  std::atomic<int> num_pending{0};
  std::atomic<int> num_running{0};
  // Calls that go on in the background, and graphs and launches of them that have a collective.
  std::atomic<int> num_calls{0};
  std::atomic<int> num_in_graphs{0};
  bool blocks = true;

  ~Comm() {
    if (shared != nullptr) munmap(shared, sizeof *shared);
  }
  void set_error(const char* why) {
    const std::lock_guard lock(error_mutex_);
    error_ = why;
  }
  std::string last_error() {
    const std::lock_guard lock(error_mutex_);
    return error_;
  }
  Rank& mine() const { return shared->ranks[rank]; }

  void tell() const {
    shared->events.fetch_add(1);
    syscall(SYS_futex, &shared->events, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }

  // Waits until it holds, or returns false when the communicator is aborted.
  template <typename Condition>
  bool wait(Condition holds) const {
    for (;;) {
      const uint32_t seen = shared->events.load();
      if (aborted) return false;
      if (holds()) return true;
      const timespec most{0, 50'000'000};
      syscall(SYS_futex, &shared->events, FUTEX_WAIT, seen, &most, nullptr, 0);
    }
  }

  bool has_dead_rank() const {
    for (int i = 0; i < num_ranks; ++i) {
      const Rank& other = shared->ranks[i];
      const int process = other.process;
      if (process <= 0 || process == getpid() || other.has_left) continue;
      if (start_of(process) != other.started) return true;
    }
    return false;
  }

 private:
  std::mutex error_mutex_;
  std::string error_;
};

using CommPtr = std::shared_ptr<Comm>;

struct Registry {
  std::mutex mutex;
  std::unordered_map<const void*, CommPtr> comms;
};

Registry& registry() {
  static auto* const registry = new Registry;
  return *registry;
}

using ncclComm_t = struct ncclComm*;

CommPtr find(ncclComm_t handle) {
  const std::lock_guard lock(registry().mutex);
  const auto found = registry().comms.find(handle);
  return found == registry().comms.end() ? nullptr : found->second;
}

// Calls between `ncclGroupStart` and `ncclGroupEnd`.
struct Group {
  int depth = 0;
  std::vector<std::function<ncclResult_t()>> calls;
};
thread_local Group group;

ncclResult_t now_or_with_group(std::function<ncclResult_t()> call) {
  if (group.depth == 0) return call();
  group.calls.push_back(std::move(call));
  return ncclSuccess;
}

ncclResult_t fail(Comm& comm, ncclResult_t result, const char* why) {
  std::fprintf(stderr, "emulated NCCL: rank %d: %s\n", comm.rank, why);
  comm.set_error(why);
  return result;
}

void join(const CommPtr& comm) {
  comm->mine().device = comm->device;
  comm->mine().started = start_of(getpid());
  comm->mine().process = getpid();
  comm->shared->num_joined.fetch_add(1);
  comm->tell();
  const auto all = [&] { return comm->shared->num_joined.load() >= static_cast<uint32_t>(comm->num_ranks); };
  if (!comm->wait(all)) {
    comm->state = ncclInternalError;
    return;
  }
  for (int i = 0; i < comm->num_ranks; ++i) {
    if (i == comm->rank || comm->shared->ranks[i].device != comm->device) continue;
    comm->state = fail(*comm, ncclInvalidUsage, "another rank uses the same GPU");
    return;
  }
  comm->state = ncclSuccess;
}

Shared* open_shared(const UniqueId& id) {
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%d/fd/%d", id.process, id.fd);
  if (id.magic != ID_MAGIC || start_of(id.process) != id.started) return nullptr;
  const int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return nullptr;
  void* const mapped = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  return mapped == MAP_FAILED ? nullptr : static_cast<Shared*>(mapped);
}

struct ncclConfig_t {
  size_t size;
  unsigned magic;
  unsigned version;
  int blocking;
};

ncclResult_t init(ncclComm_t* handle, int num_ranks, const UniqueId& id, int rank, const ncclConfig_t* config) {
  constexpr unsigned CONFIG_MAGIC = 0xcafebeef;
  if (handle == nullptr || num_ranks < 1 || num_ranks > MAX_RANKS || rank < 0 || rank >= num_ranks) return ncclInvalidArgument;
  if (config != nullptr && (config->magic != CONFIG_MAGIC || config->size < sizeof *config)) return ncclInvalidArgument;
  const auto comm = std::make_shared<Comm>();
  comm->rank = rank;
  comm->num_ranks = num_ranks;
  comm->blocks = config == nullptr || config->blocking != 0;
  comm->device = standin::device_of(nullptr);
  if (comm->device < 0) return ncclUnhandledCudaError;
  comm->shared = open_shared(id);
  if (comm->shared == nullptr) return ncclSystemError;
  uint32_t none = 0;
  const auto expected = static_cast<uint32_t>(num_ranks);
  if (!comm->shared->num_ranks.compare_exchange_strong(none, expected) && none != expected) return ncclInvalidArgument;
  int32_t nobody = 0;
  // Claimed before the join, so that two calls with the same rank are seen.
  if (!comm->mine().process.compare_exchange_strong(nobody, -1)) return ncclInvalidUsage;
  *handle = reinterpret_cast<ncclComm_t>(comm.get());
  {
    const std::lock_guard lock(registry().mutex);
    registry().comms[comm.get()] = comm;
  }
  std::thread(join, comm).detach();
  if (!comm->blocks) return ncclInProgress;
  return now_or_with_group([comm] {
    while (comm->state == ncclInProgress) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return static_cast<ncclResult_t>(comm->state.load());
  });
}

float element(const char* data, unsigned type, size_t index) {
  if (type == BFLOAT16) return to_float(reinterpret_cast<const uint16_t*>(data)[index]);
  return reinterpret_cast<const float*>(data)[index];
}

// In the order of ranks, in f32, rounded once: the same bits on all of them.
void reduce(const Comm& comm, const Step& step, size_t turn, size_t bytes, char* to) {
  const size_t width = step.type == BFLOAT16 ? 2 : 4;
  for (size_t i = 0; i < bytes / width; ++i) {
    float sum = element(comm.shared->ranks[0].data[turn], step.type, i);
    for (int rank = 1; rank < comm.num_ranks; ++rank) {
      const float x = element(comm.shared->ranks[rank].data[turn], step.type, i);
      sum = step.op == SUM ? sum + x : std::max(sum, x);
    }
    if (step.type == BFLOAT16) {
      reinterpret_cast<uint16_t*>(to)[i] = to_bf16(sum);
    } else {
      reinterpret_cast<float*>(to)[i] = sum;
    }
  }
}

// One chunk of a collective. False if the communicator was aborted.
bool exchange(Comm& comm, const Step& step, const char* from, size_t bytes, CUresult& result) {
  const size_t turn = comm.num_chunks++ % 2;
  Rank& mine = comm.mine();
  std::memcpy(mine.data[turn], from, bytes);
  mine.steps[turn] = step;
  mine.shown.store(comm.num_chunks);
  comm.tell();
  const auto all = [&] {
    return std::all_of(comm.shared->ranks, comm.shared->ranks + comm.num_ranks,
                       [&](const Rank& rank) { return rank.shown.load() >= comm.num_chunks; });
  };
  if (!comm.wait(all)) return false;
  for (int rank = 0; rank < comm.num_ranks; ++rank) {
    if (comm.shared->ranks[rank].steps[turn] == step) continue;
    fail(comm, ncclInvalidUsage, "another rank calls another collective");
    result = CUDA_ERROR_LAUNCH_FAILED;
  }
  return result == CUDA_SUCCESS;
}

CUresult collect(Comm& comm, const Step& step, const char* from, char* to) {
  if (comm.aborted) return CUDA_SUCCESS;
  const size_t received = step.kind == Kind::AllGather ? step.bytes * static_cast<size_t>(comm.num_ranks) : step.bytes;
  if (!standin::reachable(comm.device, from, step.bytes) || !standin::reachable(comm.device, to, received)) {
    fail(comm, ncclInvalidArgument, "a buffer is in no allocation");
    return CUDA_ERROR_ILLEGAL_ADDRESS;
  }
  CUresult result = CUDA_SUCCESS;
  for (size_t done = 0; done < step.bytes; done += CHUNK_BYTES) {
    const size_t turn = comm.num_chunks % 2;
    const size_t bytes = std::min(CHUNK_BYTES, step.bytes - done);
    // A collective that was aborted ends, and what it wrote is of no use.
    if (!exchange(comm, step, from + done, bytes, result)) return result;
    if (step.kind == Kind::AllReduce) {
      reduce(comm, step, turn, bytes, to + done);
      continue;
    }
    for (int rank = 0; rank < comm.num_ranks; ++rank) {
      std::memcpy(to + static_cast<size_t>(rank) * step.bytes + done, comm.shared->ranks[rank].data[turn], bytes);
    }
  }
  return CUDA_SUCCESS;
}

// Counts one until all copies of what it gives are gone.
std::shared_ptr<void> count(const CommPtr& comm, std::atomic<int>& number) {
  ++number;
  return std::shared_ptr<void>(nullptr, [comm, &number](void*) { --number; });
}

ncclResult_t enqueue(ncclComm_t handle, const Step& step, const void* from, void* to, CUstream stream) {
  const auto comm = find(handle);
  if (comm == nullptr || comm->state != ncclSuccess) return ncclInvalidArgument;
  if (standin::device_of(stream) != comm->device) return ncclInvalidUsage;
  // Of a captured one, until no graph has it.
  const bool is_captured = standin::is_captured(stream);
  const auto call = [=] {
    // Until it is done or given up.
    const auto kept = count(comm, is_captured ? comm->num_in_graphs : comm->num_pending);
    const CUresult result = standin::enqueue(stream, [=, kept = kept] {
      const auto running = count(comm, comm->num_running);
      return collect(*comm, step, static_cast<const char*>(from), static_cast<char*>(to));
    });
    return result == CUDA_SUCCESS ? ncclSuccess : ncclUnhandledCudaError;
  };
  if (comm->blocks || is_captured || group.depth > 0) return now_or_with_group(call);
  comm->state = ncclInProgress;
  std::thread([comm, call, calling = count(comm, comm->num_calls)] {
    unsigned in_progress = ncclInProgress;
    const ncclResult_t result = call();
    comm->state.compare_exchange_strong(in_progress, result);
  }).detach();
  return ncclInProgress;
}

void wait_for_none(const std::atomic<int>& number) {
  while (number > 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
}

// What a communicator that ends waits for, aborted or not.
void wait_for_graphs(const Comm& comm) {
  wait_for_none(comm.num_calls);
  wait_for_none(comm.num_in_graphs);
}

void leave(const CommPtr& comm) {
  wait_for_none(comm->num_pending);
  comm->mine().has_left = 1;
  comm->state = ncclSuccess;
}

void forget(ncclComm_t handle) {
  const std::lock_guard lock(registry().mutex);
  registry().comms.erase(handle);
}

size_t width_of(DataType type) {
  switch (type) {
    case FLOAT32:
      return 4;
    case BFLOAT16:
      return 2;
  }
  return 0;
}

}  // namespace

STANDIN_API ncclResult_t ncclGetVersion(int* version) {
  *version = 22803;
  return ncclSuccess;
}

struct ncclUniqueId {
  char bytes[128];
};

STANDIN_API ncclResult_t ncclGetUniqueId(ncclUniqueId* out) {
  const int fd = memfd_create("emulated-nccl", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, sizeof(Shared)) != 0) return ncclSystemError;
  const UniqueId id{ID_MAGIC, start_of(getpid()), getpid(), fd};
  std::memset(out->bytes, 0, sizeof out->bytes);
  std::memcpy(out->bytes, &id, sizeof id);
  return ncclSuccess;
}

STANDIN_API ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int num_ranks, ncclUniqueId bytes, int rank,
                                                const ncclConfig_t* config) {
  UniqueId id;
  std::memcpy(&id, bytes.bytes, sizeof id);
  return init(comm, num_ranks, id, rank, config);
}

STANDIN_API ncclResult_t ncclCommInitRank(ncclComm_t* comm, int num_ranks, ncclUniqueId id, int rank) {
  return ncclCommInitRankConfig(comm, num_ranks, id, rank, nullptr);
}

STANDIN_API ncclResult_t ncclCommGetAsyncError(ncclComm_t handle, ncclResult_t* result) {
  const auto comm = find(handle);
  if (comm == nullptr || result == nullptr) return ncclInvalidArgument;
  const unsigned state = comm->state;
  *result = static_cast<ncclResult_t>(state);
  if ((state == ncclSuccess || state == ncclInProgress) && comm->has_dead_rank()) {
    *result = fail(*comm, ncclRemoteError, "the process of another rank has ended");
    // From now on the communicator is only good for being aborted.
    comm->state = ncclRemoteError;
  }
  return ncclSuccess;
}

STANDIN_API ncclResult_t ncclCommFinalize(ncclComm_t handle) {
  const auto comm = find(handle);
  if (comm == nullptr || comm->state != ncclSuccess) return ncclInvalidArgument;
  if (comm->blocks) {
    leave(comm);
    return ncclSuccess;
  }
  comm->state = ncclInProgress;
  std::thread(leave, comm).detach();
  return ncclInProgress;
}

STANDIN_API ncclResult_t ncclCommDestroy(ncclComm_t handle) {
  const auto comm = find(handle);
  if (comm == nullptr) return ncclInvalidArgument;
  wait_for_none(comm->num_pending);
  wait_for_graphs(*comm);
  comm->mine().has_left = 1;
  forget(handle);
  return ncclSuccess;
}

STANDIN_API ncclResult_t ncclCommAbort(ncclComm_t handle) {
  const auto comm = find(handle);
  if (comm == nullptr) return ncclInvalidArgument;
  comm->aborted = true;
  comm->tell();
  // Afterwards no collective touches a buffer any more; those still in a queue do nothing.
  wait_for_none(comm->num_running);
  wait_for_graphs(*comm);
  forget(handle);
  return ncclSuccess;
}

STANDIN_API ncclResult_t ncclCommCount(ncclComm_t handle, int* count) {
  const auto comm = find(handle);
  if (comm == nullptr) return ncclInvalidArgument;
  *count = comm->num_ranks;
  return ncclSuccess;
}

STANDIN_API ncclResult_t ncclCommUserRank(ncclComm_t handle, int* rank) {
  const auto comm = find(handle);
  if (comm == nullptr) return ncclInvalidArgument;
  *rank = comm->rank;
  return ncclSuccess;
}

STANDIN_API ncclResult_t ncclCommCuDevice(ncclComm_t handle, int* device) {
  const auto comm = find(handle);
  if (comm == nullptr) return ncclInvalidArgument;
  *device = comm->device;
  return ncclSuccess;
}

STANDIN_API ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, DataType type, ReduceOp op, ncclComm_t comm,
                                       CUstream stream) {
  if (width_of(type) == 0 || (op != SUM && op != MAX)) return ncclInvalidArgument;
  return enqueue(comm, {Kind::AllReduce, type, op, 0, count * width_of(type)}, from, to, stream);
}

STANDIN_API ncclResult_t ncclAllGather(const void* from, void* to, size_t count, DataType type, ncclComm_t comm,
                                       CUstream stream) {
  if (width_of(type) == 0) return ncclInvalidArgument;
  return enqueue(comm, {Kind::AllGather, type, 0, 0, count * width_of(type)}, from, to, stream);
}

STANDIN_API ncclResult_t ncclGroupStart() {
  ++group.depth;
  return ncclSuccess;
}

STANDIN_API ncclResult_t ncclGroupEnd() {
  if (group.depth == 0) return ncclInvalidUsage;
  if (--group.depth > 0) return ncclSuccess;
  ncclResult_t first = ncclSuccess;
  for (const auto& call : std::exchange(group.calls, {})) {
    const ncclResult_t result = call();
    if (first == ncclSuccess) first = result;
  }
  return first;
}

STANDIN_API const char* ncclGetErrorString(ncclResult_t result) {
  switch (result) {
    case ncclSuccess:
      return "no error";
    case ncclUnhandledCudaError:
      return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
    case ncclSystemError:
      return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
    case ncclInternalError:
      return "internal error - please report this issue to the NCCL developers";
    case ncclInvalidArgument:
      return "invalid argument (run with NCCL_DEBUG=WARN for details)";
    case ncclInvalidUsage:
      return "invalid usage (run with NCCL_DEBUG=WARN for details)";
    case ncclRemoteError:
      return "remote process exited or there was a network error";
    case ncclInProgress:
      return "NCCL operation in progress";
  }
  return "unknown result code";
}

// Of the thread's last question: a text may not change while it is read.
STANDIN_API const char* ncclGetLastError(ncclComm_t handle) {
  thread_local std::string text;
  const auto comm = find(handle);
  text = comm == nullptr ? "" : comm->last_error();
  return text.c_str();
}
