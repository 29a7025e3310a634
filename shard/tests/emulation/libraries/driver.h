// The state of the stand-in for libcuda.so.
//
// One lock guards all of it. It is not held while a stream works, nor while a call waits. What a handle names is found in a
// table, so that a handle that was destroyed or never existed is an error and not a crash.
#pragma once

#include "standin.h"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace emulation {
class Begun;
}

namespace standin {

constexpr int MAX_DEVICES = 16;
// Operations that a stream takes before a call waits for the first of them to end, about as many as on a GPU.
constexpr size_t MAX_QUEUED = 1024;
constexpr size_t STATIC_SHARED_BYTES = 48 << 10;
constexpr size_t MAX_SHARED_BYTES = 227 << 10;

using Lock = std::unique_lock<std::mutex>;

struct Stream;

struct Device {
  int index = 0;
  unsigned retained = 0;
  size_t used_bytes = 0;
  // Where allocations are, one after the other: places are not used again, and what is freed is given back to the system.
  int memory_fd = -1;
  uint64_t memory_end = 0;
  bool reaches[MAX_DEVICES] = {};
  // What went wrong in the context, which answers all later calls.
  CUresult error = CUDA_SUCCESS;
  std::shared_ptr<Stream> null_stream;
};

// Which operations come before a moment of a capture: so many of each of its streams.
using Seen = std::map<const Stream*, size_t>;

struct Capture {
  Stream* origin = nullptr;
  unsigned mode = 0;
  std::thread::id thread;
  bool invalid = false;
  bool ended = false;
  std::vector<Operation> operations;
  // For each stream that takes part what its next operation comes after, itself included.
  std::map<const Stream*, Seen> seen;
  std::vector<std::shared_ptr<Stream>> streams;
};

struct Stream {
  Device* device = nullptr;
  bool blocks_null_stream = true;
  std::deque<Operation> queue;
  uint64_t num_enqueued = 0;
  uint64_t num_finished = 0;
  bool destroyed = false;
  std::condition_variable arrival;
  std::shared_ptr<Capture> capture;
};

// A moment that an event stands for.
struct Record {
  const Device* device = nullptr;
  bool done = false;
  std::chrono::steady_clock::time_point at;
  std::shared_ptr<Capture> capture;
  Seen seen;
};

struct Event {
  bool has_time = true;
  std::shared_ptr<Record> record;
};

struct Graph {
  std::vector<Operation> operations;
};

enum class Memory { Device, Peer, Pinned, Registered };

struct Allocation {
  Memory kind = Memory::Device;
  size_t bytes = 0;
  Device* device = nullptr;
  // The mapping that it lies in, with what guards its ends.
  void* mapping = nullptr;
  size_t mapping_bytes = 0;
  // The place in the file of the device's memory.
  uint64_t file_offset = 0;
  uint64_t file_bytes = 0;
};

struct Module;

struct State {
  std::mutex mutex;
  // Told when an operation has finished.
  std::condition_variable finished;
  bool initialized = false;
  int num_devices = 0;
  size_t device_bytes = 0;
  // Whether devices can reach one another's memory.
  bool has_peers = true;
  // An operation begins after up to so many microseconds.
  unsigned max_delay_us = 0;
  uint64_t seed = 1;
  uint64_t num_streams = 0;
  Device devices[MAX_DEVICES];
  std::unordered_map<const void*, std::shared_ptr<Stream>> streams;
  std::unordered_map<const void*, std::shared_ptr<Event>> events;
  std::unordered_map<const void*, std::shared_ptr<Graph>> graphs;
  std::unordered_map<const void*, std::shared_ptr<const Graph>> executables;
  std::unordered_map<const void*, std::shared_ptr<Module>> modules;
  std::vector<std::shared_ptr<Capture>> captures;
  std::map<uintptr_t, Allocation> allocations;
};

// Never destroyed: streams may still be at work when the process ends.
State& state();

// The device of the thread's current context, or null.
Device* current();

// What a call that needs a context answers if there is none, or if it has failed.
CUresult check_context(const Device* device);

// How a call begins that needs a context: it takes the lock, and has the context's device.
#define STANDIN_CONTEXT(lock, device)                    \
  standin::Lock lock(standin::state().mutex);            \
  standin::Device* const device = standin::current();    \
  if (const CUresult result = standin::check_context(device); result != CUDA_SUCCESS) return result

// streams.cpp

std::shared_ptr<Stream> new_stream(Device& device);
// The stream of a handle, that of the current device for the null handle, or null.
std::shared_ptr<Stream> find_stream(CUstream handle);
// Waits until all that is in the queue now is done.
void drain(Lock& lock, Stream& stream);
// Waits for all streams of a device, or for those that the null stream waits for.
void drain_device(Lock& lock, const Device& device, bool only_blocking = false);
// `enqueue` under the lock, which is given up while the queue is full. On the null stream it returns when the operation is done.
CUresult enqueue_locked(Lock& lock, const std::shared_ptr<Stream>& stream, Operation operation);

// launch.cpp

// Runs operations one after the other. A kernel that may begin early begins before the kernel before it.
class Runner {
 public:
  Runner();
  ~Runner();
  // Runs an operation and begins the next one, if there is one and it may. That one is then to be run next.
  CUresult run(const Operation& operation, const Operation& next);
  // Gives up what has begun.
  void forget();

 private:
  std::unique_ptr<emulation::Begun> begun_;
};

// capture.cpp

// What a call answers that may not be made by this thread while a stream is captured; it invalidates the captures.
CUresult check_unsafe_call();
// The same for a call that waits for this stream, or asks whether it is done.
CUresult check_not_captured(Stream& stream);
CUresult invalidate(Capture& capture, CUresult result);

// memory.cpp

// The allocation in which these bytes lie, or null.
const Allocation* find_allocation(uintptr_t from, size_t bytes);
bool reachable_locked(int device, uintptr_t from, size_t bytes);
void free_all(Device& device);

}  // namespace standin
