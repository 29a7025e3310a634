// Capture of streams, and graphs: lists of operations, in the order in which they were captured.
#include "driver.h"

#include <algorithm>

namespace standin {

namespace {

enum Mode : unsigned { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };

thread_local unsigned mode_of_thread = GLOBAL;

bool forbids_unsafe_calls(const Capture& capture) {
  if (mode_of_thread == RELAXED || capture.invalid) return false;
  if (capture.thread == std::this_thread::get_id()) return capture.mode != RELAXED;
  return mode_of_thread == GLOBAL && capture.mode == GLOBAL;
}

void end(const std::shared_ptr<Capture>& capture) {
  capture->ended = true;
  for (const auto& stream : capture->streams) stream->capture = nullptr;
  std::erase(state().captures, capture);
}

// Whether the origin comes after all that was captured in other streams.
bool is_joined(Capture& capture) {
  Seen& joined = capture.seen[capture.origin];
  return std::all_of(capture.streams.begin(), capture.streams.end(), [&](const auto& stream) {
    return joined[stream.get()] == capture.seen[stream.get()][stream.get()];
  });
}

CUresult instantiate(CUgraphExec* handle, CUgraph graph_handle) {
  STANDIN_CONTEXT(lock, device);
  const auto found = state().graphs.find(graph_handle);
  if (handle == nullptr || found == state().graphs.end()) return CUDA_ERROR_INVALID_VALUE;
  const std::shared_ptr<const Graph> copy = std::make_shared<Graph>(*found->second);
  *handle = reinterpret_cast<CUgraphExec>(const_cast<Graph*>(copy.get()));
  state().executables[copy.get()] = copy;
  return CUDA_SUCCESS;
}

}  // namespace

CUresult check_unsafe_call() {
  CUresult result = CUDA_SUCCESS;
  for (const auto& capture : state().captures) {
    if (forbids_unsafe_calls(*capture)) result = invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  }
  return result;
}

CUresult check_not_captured(Stream& stream) {
  if (stream.capture != nullptr) return invalidate(*stream.capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  if (&stream != stream.device->null_stream.get()) return CUDA_SUCCESS;
  for (const auto& capture : state().captures) {
    for (const auto& captured : capture->streams) {
      if (captured->device == stream.device && captured->blocks_null_stream) {
        return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
      }
    }
  }
  return CUDA_SUCCESS;
}

CUresult invalidate(Capture& capture, CUresult result) {
  capture.invalid = true;
  return result;
}

}  // namespace standin

using namespace standin;

STANDIN_API CUresult cuStreamBeginCapture_v2(CUstream handle, unsigned mode) {
  STANDIN_CONTEXT(lock, device);
  const auto stream = find_stream(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (stream == stream->device->null_stream) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (mode > RELAXED || stream->capture != nullptr) return CUDA_ERROR_INVALID_VALUE;
  const auto capture = std::make_shared<Capture>();
  capture->origin = stream.get();
  capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  capture->streams.push_back(stream);
  stream->capture = capture;
  state().captures.push_back(capture);
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph_handle) {
  STANDIN_CONTEXT(lock, device);
  const auto stream = find_stream(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (graph_handle == nullptr || stream->capture == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *graph_handle = nullptr;
  const auto capture = stream->capture;
  if (capture->mode != RELAXED && capture->thread != std::this_thread::get_id()) {
    return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
  }
  if (capture->origin != stream.get()) return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
  end(capture);
  if (capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (!is_joined(*capture)) return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
  const auto graph = std::make_shared<Graph>();
  graph->operations = std::move(capture->operations);
  *graph_handle = reinterpret_cast<CUgraph>(graph.get());
  state().graphs[graph.get()] = graph;
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuStreamIsCapturing(CUstream handle, unsigned* status) {
  enum Status : unsigned { NONE = 0, ACTIVE = 1, INVALIDATED = 2 };
  STANDIN_CONTEXT(lock, device);
  const auto stream = find_stream(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  *status = stream->capture == nullptr ? NONE : stream->capture->invalid ? INVALIDATED : ACTIVE;
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuThreadExchangeStreamCaptureMode(unsigned* mode) {
  if (mode == nullptr || *mode > RELAXED) return CUDA_ERROR_INVALID_VALUE;
  std::swap(*mode, mode_of_thread);
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuGraphInstantiateWithFlags(CUgraphExec* handle, CUgraph graph, unsigned long long) {
  return instantiate(handle, graph);
}

STANDIN_API CUresult cuGraphGetNodes(CUgraph handle, CUgraphNode* nodes, size_t* count) {
  STANDIN_CONTEXT(lock, device);
  const auto found = state().graphs.find(handle);
  if (found == state().graphs.end() || count == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const auto& operations = found->second->operations;
  for (size_t i = 0; nodes != nullptr && i < *count; ++i) {
    nodes[i] = i < operations.size() ? reinterpret_cast<CUgraphNode>(const_cast<Operation*>(&operations[i])) : nullptr;
  }
  if (nodes == nullptr || *count > operations.size()) *count = operations.size();
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuGraphUpload(CUgraphExec handle, CUstream stream) {
  STANDIN_CONTEXT(lock, device);
  if (!state().executables.contains(handle) || find_stream(stream) == nullptr) return CUDA_ERROR_INVALID_VALUE;
  return CUDA_SUCCESS;
}

STANDIN_API CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream_handle) {
  STANDIN_CONTEXT(lock, device);
  const auto found = state().executables.find(handle);
  const auto stream = find_stream(stream_handle);
  if (found == state().executables.end() || stream == nullptr) return CUDA_ERROR_INVALID_VALUE;
  return enqueue_locked(lock, stream, [graph = found->second] {
    Runner runner;
    const std::vector<Operation>& operations = graph->operations;
    const Operation none;
    for (size_t i = 0; i < operations.size(); ++i) {
      const Operation& next = i + 1 < operations.size() ? operations[i + 1] : none;
      if (const CUresult result = runner.run(operations[i], next); result != CUDA_SUCCESS) return result;
    }
    return CUDA_SUCCESS;
  });
}

STANDIN_API CUresult cuGraphExecDestroy(CUgraphExec handle) {
  Lock lock(state().mutex);
  return state().executables.erase(handle) == 1 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

STANDIN_API CUresult cuGraphDestroy(CUgraph handle) {
  Lock lock(state().mutex);
  return state().graphs.erase(handle) == 1 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
