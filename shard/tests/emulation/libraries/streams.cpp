// Streams, each with a thread that works through its queue, and events.
#include "driver.h"

#include <algorithm>

namespace standin {

namespace {

// Waits as long as the stream's seed says, so that what is not synchronised happens too late.
class Delay {
 public:
  Delay(uint64_t seed, unsigned max_us) : state_((seed + 1) * 0x9e3779b97f4a7c15u | 1), max_us_(max_us) {}
  void pass() {
    if (max_us_ == 0) return;
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    std::this_thread::sleep_for(std::chrono::microseconds((state_ >> 16) % (max_us_ + uint64_t{1})));
  }

 private:
  uint64_t state_;
  unsigned max_us_;
};

void work(const std::shared_ptr<Stream>& stream, Delay delay) {
  Runner runner;
  Lock lock(state().mutex);
  for (;;) {
    stream->arrival.wait(lock, [&] { return !stream->queue.empty() || stream->destroyed; });
    if (stream->queue.empty()) return;
    Operation operation = std::move(stream->queue.front());
    stream->queue.pop_front();
    Operation next = stream->queue.empty() ? nullptr : stream->queue.front();
    CUresult result = stream->device->error;
    lock.unlock();
    delay.pass();
    // After an error nothing is done any more.
    if (result == CUDA_SUCCESS) {
      result = runner.run(operation, next);
    } else {
      runner.forget();
    }
    operation = next = nullptr;
    lock.lock();
    if (stream->device->error == CUDA_SUCCESS) stream->device->error = result;
    ++stream->num_finished;
    state().finished.notify_all();
  }
}

std::shared_ptr<Event> find_event(CUevent handle) {
  const auto found = state().events.find(handle);
  return found == state().events.end() ? nullptr : found->second;
}

CUresult create_stream(CUstream* handle, unsigned flags) {
  constexpr unsigned NON_BLOCKING = 1;
  STANDIN_CONTEXT(lock, device);
  if (handle == nullptr || flags > NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
  const auto stream = new_stream(*device);
  stream->blocks_null_stream = flags != NON_BLOCKING;
  *handle = reinterpret_cast<CUstream>(stream.get());
  state().streams[stream.get()] = stream;
  return CUDA_SUCCESS;
}

Operation mark(const std::shared_ptr<Record>& record) {
  return [record] {
    Lock lock(state().mutex);
    record->done = true;
    record->at = std::chrono::steady_clock::now();
    state().finished.notify_all();
    return CUDA_SUCCESS;
  };
}

Operation wait_for(const std::shared_ptr<Record>& record, const Device& waiting) {
  return [record, &waiting] {
    Lock lock(state().mutex);
    // What is waited for never comes from a context that has failed.
    state().finished.wait(lock, [&] {
      return record->done || waiting.error != CUDA_SUCCESS || record->device->error != CUDA_SUCCESS;
    });
    return waiting.error;
  };
}

}  // namespace

std::shared_ptr<Stream> new_stream(Device& device) {
  const auto stream = std::make_shared<Stream>();
  stream->device = &device;
  std::thread(work, stream, Delay(state().seed + state().num_streams++, state().max_delay_us)).detach();
  return stream;
}

std::shared_ptr<Stream> find_stream(CUstream handle) {
  const auto legacy = reinterpret_cast<CUstream>(1);
  if (handle == nullptr || handle == legacy) return current() == nullptr ? nullptr : current()->null_stream;
  const auto found = state().streams.find(handle);
  return found == state().streams.end() ? nullptr : found->second;
}

void drain(Lock& lock, Stream& stream) {
  const uint64_t target = stream.num_enqueued;
  state().finished.wait(lock, [&] { return stream.num_finished >= target; });
}

void drain_device(Lock& lock, const Device& device, bool only_blocking) {
  std::vector<std::shared_ptr<Stream>> streams = {device.null_stream};
  for (const auto& [handle, stream] : state().streams) {
    if (stream->device == &device && (stream->blocks_null_stream || !only_blocking)) streams.push_back(stream);
  }
  for (const auto& stream : streams) drain(lock, *stream);
}

CUresult enqueue_locked(Lock& lock, const std::shared_ptr<Stream>& stream, Operation operation) {
  Device& device = *stream->device;
  if (const CUresult result = check_context(&device); result != CUDA_SUCCESS) return result;
  if (const auto& capture = stream->capture; capture != nullptr) {
    if (capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    capture->operations.push_back(std::move(operation));
    ++capture->seen[stream.get()][stream.get()];
    return CUDA_SUCCESS;
  }
  const bool is_null_stream = stream == device.null_stream;
  if (is_null_stream) {
    for (const auto& capture : state().captures) {
      for (const auto& captured : capture->streams) {
        if (captured->device != &device || !captured->blocks_null_stream) continue;
        return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
      }
    }
    drain_device(lock, device, true);
  }
  state().finished.wait(lock, [&] { return stream->num_enqueued - stream->num_finished < MAX_QUEUED; });
  stream->queue.push_back(std::move(operation));
  ++stream->num_enqueued;
  stream->arrival.notify_one();
  if (!is_null_stream) return CUDA_SUCCESS;
  drain(lock, *stream);
  return device.error;
}

CUresult enqueue(CUstream handle, Operation operation) {
  Lock lock(state().mutex);
  const auto stream = find_stream(handle);
  if (stream == nullptr) return handle == nullptr ? CUDA_ERROR_INVALID_CONTEXT : CUDA_ERROR_INVALID_HANDLE;
  return enqueue_locked(lock, stream, std::move(operation));
}

CUdevice device_of(CUstream handle) {
  Lock lock(state().mutex);
  const auto stream = find_stream(handle);
  return stream == nullptr ? -1 : stream->device->index;
}

bool is_captured(CUstream handle) {
  Lock lock(state().mutex);
  const auto stream = find_stream(handle);
  return stream != nullptr && stream->capture != nullptr;
}

}  // namespace standin

using namespace standin;

STANDIN_API CUresult cuStreamCreate(CUstream* handle, unsigned flags) { return create_stream(handle, flags); }

STANDIN_API CUresult cuStreamCreateWithPriority(CUstream* handle, unsigned flags, int) {
  return create_stream(handle, flags);
}

// A call on a stream that exists, in a context that has not failed.
#define STANDIN_STREAM(lock, stream, handle)                                              \
  Lock lock(state().mutex);                                                               \
  const auto stream = find_stream(handle);                                                \
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;                                \
  if (const CUresult result = check_context(stream->device); result != CUDA_SUCCESS) return result

STANDIN_API CUresult cuStreamDestroy_v2(CUstream handle) {
  Lock lock(state().mutex);
  const auto found = state().streams.find(handle);
  if (found == state().streams.end()) return CUDA_ERROR_INVALID_HANDLE;
  const auto stream = found->second;
  if (stream->capture != nullptr) invalidate(*stream->capture, CUDA_SUCCESS);
  // What is in the queue is still done.
  stream->destroyed = true;
  stream->arrival.notify_one();
  state().streams.erase(found);
  return stream->device->error;
}

STANDIN_API CUresult cuStreamSynchronize(CUstream handle) {
  STANDIN_STREAM(lock, stream, handle);
  if (const CUresult result = check_not_captured(*stream); result != CUDA_SUCCESS) return result;
  if (stream == stream->device->null_stream) drain_device(lock, *stream->device, true);
  drain(lock, *stream);
  return stream->device->error;
}

STANDIN_API CUresult cuStreamQuery(CUstream handle) {
  STANDIN_STREAM(lock, stream, handle);
  if (const CUresult result = check_not_captured(*stream); result != CUDA_SUCCESS) return result;
  return stream->num_finished == stream->num_enqueued ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

STANDIN_API CUresult cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned flags) {
  constexpr unsigned EXTERNAL = 1;
  STANDIN_STREAM(lock, stream, handle);
  const auto event = find_event(event_handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (flags > EXTERNAL) return CUDA_ERROR_INVALID_VALUE;
  const auto record = event->record;
  const auto capture = stream->capture;
  if (capture != nullptr && capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (record == nullptr) return CUDA_SUCCESS;
  if (record->capture == nullptr) {
    if (capture != nullptr && flags != EXTERNAL) return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    return enqueue_locked(lock, stream, wait_for(record, *stream->device));
  }
  // A moment of a graph, which is none of a stream.
  if (record->capture->ended) return CUDA_ERROR_CAPTURED_EVENT;
  // The operations of a graph run in the order in which they were captured, so that there is nothing to wait for.
  if (record->capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (capture != nullptr && capture != record->capture) return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_MERGE);
  if (capture == nullptr) {
    if (stream == stream->device->null_stream) return invalidate(*record->capture, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    stream->capture = record->capture;
    record->capture->streams.push_back(stream);
  }
  Seen& seen = record->capture->seen[stream.get()];
  for (const auto& [other, count] : record->seen) seen[other] = std::max(seen[other], count);
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuEventCreate(CUevent* handle, unsigned flags) {
  constexpr unsigned BLOCKING_SYNC = 1, DISABLE_TIMING = 2, INTERPROCESS = 4;
  STANDIN_CONTEXT(lock, device);
  if (handle == nullptr || flags > (BLOCKING_SYNC | DISABLE_TIMING | INTERPROCESS)) return CUDA_ERROR_INVALID_VALUE;
  const auto event = std::make_shared<Event>();
  event->has_time = !(flags & DISABLE_TIMING);
  *handle = reinterpret_cast<CUevent>(event.get());
  state().events[event.get()] = event;
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuEventDestroy_v2(CUevent handle) {
  Lock lock(state().mutex);
  return state().events.erase(handle) == 1 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

STANDIN_API CUresult cuEventRecordWithFlags(CUevent event_handle, CUstream handle, unsigned flags) {
  constexpr unsigned EXTERNAL = 1;
  STANDIN_STREAM(lock, stream, handle);
  const auto event = find_event(event_handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (flags > EXTERNAL) return CUDA_ERROR_INVALID_VALUE;
  const auto record = std::make_shared<Record>();
  record->device = stream->device;
  if (stream->capture != nullptr && flags != EXTERNAL) {
    if (stream->capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    record->capture = stream->capture;
    record->seen = stream->capture->seen[stream.get()];
    event->record = record;
    return CUDA_SUCCESS;
  }
  event->record = record;
  return enqueue_locked(lock, stream, mark(record));
}

STANDIN_API CUresult cuEventRecord(CUevent event, CUstream stream) { return cuEventRecordWithFlags(event, stream, 0); }

// A call that asks an event; `record` is null if it was never recorded.
#define STANDIN_RECORD(lock, record, handle)                                                        \
  STANDIN_CONTEXT(lock, device);                                                                    \
  const auto event = find_event(handle);                                                            \
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;                                           \
  if (const CUresult result = check_unsafe_call(); result != CUDA_SUCCESS) return result;            \
  const auto record = event->record;                                                                \
  if (record != nullptr && record->capture != nullptr) return invalidate(*record->capture, CUDA_ERROR_CAPTURED_EVENT)

STANDIN_API CUresult cuEventQuery(CUevent handle) {
  STANDIN_RECORD(lock, record, handle);
  return record == nullptr || record->done ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

STANDIN_API CUresult cuEventSynchronize(CUevent handle) {
  STANDIN_RECORD(lock, record, handle);
  if (record == nullptr) return CUDA_SUCCESS;
  state().finished.wait(lock, [&] { return record->done || device->error != CUDA_SUCCESS; });
  return device->error;
}

STANDIN_API CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent start_handle, CUevent end_handle) {
  STANDIN_CONTEXT(lock, device);
  const auto start = find_event(start_handle), end = find_event(end_handle);
  if (start == nullptr || end == nullptr || start->record == nullptr || end->record == nullptr) {
    return CUDA_ERROR_INVALID_HANDLE;
  }
  if (!start->has_time || !end->has_time) return CUDA_ERROR_INVALID_HANDLE;
  if (!start->record->done || !end->record->done) return CUDA_ERROR_NOT_READY;
  *milliseconds = std::chrono::duration<float, std::milli>(end->record->at - start->record->at).count();
  return CUDA_SUCCESS;
}
