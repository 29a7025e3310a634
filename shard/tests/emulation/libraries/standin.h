// The types of CUDA's interface that the stand-ins for its libraries share, and what libcuda.so offers the others.
//
// Declared here, since no toolkit is needed to build or test. Numbers and layouts are those of CUDA 13.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define STANDIN_EXPORT __attribute__((visibility("default")))
// A function of the C interface.
#define STANDIN_API extern "C" STANDIN_EXPORT

enum CUresult : unsigned {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_INVALID_VALUE = 1,
  CUDA_ERROR_OUT_OF_MEMORY = 2,
  CUDA_ERROR_NOT_INITIALIZED = 3,
  CUDA_ERROR_INVALID_DEVICE = 101,
  CUDA_ERROR_INVALID_IMAGE = 200,
  CUDA_ERROR_INVALID_CONTEXT = 201,
  CUDA_ERROR_OPERATING_SYSTEM = 304,
  CUDA_ERROR_INVALID_HANDLE = 400,
  CUDA_ERROR_NOT_FOUND = 500,
  CUDA_ERROR_NOT_READY = 600,
  CUDA_ERROR_ILLEGAL_ADDRESS = 700,
  CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED = 704,
  CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712,
  CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713,
  CUDA_ERROR_LAUNCH_FAILED = 719,
  CUDA_ERROR_NOT_SUPPORTED = 801,
  CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
  CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901,
  CUDA_ERROR_STREAM_CAPTURE_MERGE = 902,
  CUDA_ERROR_STREAM_CAPTURE_UNMATCHED = 903,
  CUDA_ERROR_STREAM_CAPTURE_UNJOINED = 904,
  CUDA_ERROR_STREAM_CAPTURE_ISOLATION = 905,
  CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906,
  CUDA_ERROR_CAPTURED_EVENT = 907,
  CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD = 908,
};

// Handles: their addresses are names, and nothing is read behind them.
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUgraph = struct CUgraph_st*;
using CUgraphExec = struct CUgraphExec_st*;
using CUgraphNode = struct CUgraphNode_st*;
using CUdevice = int;
using CUdeviceptr = unsigned long long;

// What the stand-in for NVRTC gives as a binary: this, then the names of the kernels, each with a zero at its end, then an
// empty name.
constexpr char STANDIN_IMAGE[] = "LOCKSTEP STAND-IN IMAGE\n";

// Numbers of bfloat16, as bits: rounded to nearest even.
inline float to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

namespace standin {

// What a stream does at its turn. What it returns other than success is the context's error from then on.
using Operation = std::function<CUresult()>;

// Puts an operation into the stream's queue, which is waited for while it is full, or into the graph that is captured from it.
STANDIN_EXPORT CUresult enqueue(CUstream stream, Operation operation);

// The device of a stream, or of the current context for the null stream; -1 if there is none.
STANDIN_EXPORT CUdevice device_of(CUstream stream);

// Whether the stream is captured, so that what it is given now is done with a graph, any number of times.
STANDIN_EXPORT bool is_captured(CUstream stream);

// Whether these bytes lie in a live allocation of this device, or in one that it can reach.
STANDIN_EXPORT bool reachable(CUdevice device, const void* from, size_t bytes);

}  // namespace standin
