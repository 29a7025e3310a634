// The stand-in for libcublasLt.so: products of bf16 matrices, accumulated in f32.
#include "standin.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace {

enum cublasStatus_t : unsigned {
  CUBLAS_STATUS_SUCCESS = 0,
  CUBLAS_STATUS_NOT_INITIALIZED = 1,
  CUBLAS_STATUS_INVALID_VALUE = 7,
  CUBLAS_STATUS_EXECUTION_FAILED = 13,
  CUBLAS_STATUS_NOT_SUPPORTED = 15,
};

enum DataType : unsigned { R_32F = 0, R_16BF = 14 };
enum Epilogue : unsigned { DEFAULT = 1, BIAS = 4 };
enum Attribute : unsigned {
  POINTER_MODE = 2,
  TRANS_A = 3,
  TRANS_B = 4,
  EPILOGUE = 7,
  BIAS_POINTER = 8,
  SM_COUNT_TARGET = 15,
  FAST_ACCUM = 25,
  BIAS_DATA_TYPE = 26,
};
constexpr unsigned COMPUTE_32F = 68, COMPUTE_32F_FAST_16BF = 75;
// cuBLAS wants its operands and its workspace aligned to so many bytes.
constexpr size_t OPERAND_ALIGNMENT = 16, WORKSPACE_ALIGNMENT = 256;

struct Handle {};

struct MatmulDesc {
  unsigned compute_type = COMPUTE_32F;
  unsigned scale_type = R_32F;
  int32_t trans_a = 0;
  int32_t trans_b = 0;
  uint32_t epilogue = DEFAULT;
  const void* bias = nullptr;
  // -1: that of the result.
  int32_t bias_type = -1;
};

struct MatrixLayout {
  unsigned type = R_16BF;
  uint64_t rows = 0;
  uint64_t cols = 0;
  int64_t ld = 0;
};

struct Preference {
  uint64_t max_workspace_bytes = 0;
};

struct Algo {
  uint64_t data[8];
};

struct HeuristicResult {
  Algo algo;
  size_t workspace_bytes;
  cublasStatus_t state;
  float waves_count;
  int reserved[4];
};
static_assert(sizeof(HeuristicResult) == 96);

constexpr uint64_t ALGO_MAGIC = 0x4c4f434b4c54414c;

size_t width_of(unsigned type) { return type == R_16BF ? 2 : 4; }

size_t bytes_of(const MatrixLayout& layout) {
  if (layout.rows == 0 || layout.cols == 0) return 0;
  return ((layout.cols - 1) * static_cast<uint64_t>(layout.ld) + layout.rows) * width_of(layout.type);
}

float load(const void* data, unsigned type, size_t index) {
  return type == R_16BF ? to_float(static_cast<const uint16_t*>(data)[index]) : static_cast<const float*>(data)[index];
}

void store(void* data, unsigned type, size_t index, float x) {
  if (type == R_16BF) {
    static_cast<uint16_t*>(data)[index] = to_bf16(x);
  } else {
    static_cast<float*>(data)[index] = x;
  }
}

// All of a product: D = alpha op(A) op(B) + beta C + bias, of columns.
struct Matmul {
  MatmulDesc desc;
  float alpha, beta;
  const void *a, *b, *c;
  void* d;
  MatrixLayout layout_a, layout_b, layout_c, layout_d;

  uint64_t depth() const { return desc.trans_a ? layout_a.rows : layout_a.cols; }
  unsigned bias_type() const { return desc.bias_type < 0 ? layout_d.type : static_cast<unsigned>(desc.bias_type); }

  bool is_supported() const {
    if (desc.compute_type != COMPUTE_32F && desc.compute_type != COMPUTE_32F_FAST_16BF) return false;
    if (desc.scale_type != R_32F || layout_a.type != R_16BF || layout_b.type != R_16BF) return false;
    if (layout_d.type != layout_c.type || (layout_d.type != R_16BF && layout_d.type != R_32F)) return false;
    if (desc.epilogue != DEFAULT && desc.epilogue != BIAS) return false;
    return bias_type() == R_32F || bias_type() == R_16BF;
  }

  bool fits() const {
    for (const MatrixLayout* layout : {&layout_a, &layout_b, &layout_c, &layout_d}) {
      if (layout->rows == 0 || layout->cols == 0 || layout->ld < static_cast<int64_t>(layout->rows)) return false;
    }
    const uint64_t rows = desc.trans_a ? layout_a.cols : layout_a.rows;
    const uint64_t cols = desc.trans_b ? layout_b.rows : layout_b.cols;
    const uint64_t depth_of_b = desc.trans_b ? layout_b.cols : layout_b.rows;
    return depth() == depth_of_b && layout_d.rows == rows && layout_d.cols == cols && layout_c.rows == rows &&
           layout_c.cols == cols;
  }

  bool is_reachable(CUdevice device) const {
    const auto reaches = [&](const void* from, size_t bytes) {
      return reinterpret_cast<uintptr_t>(from) % OPERAND_ALIGNMENT == 0 && standin::reachable(device, from, bytes);
    };
    return reaches(a, bytes_of(layout_a)) && reaches(b, bytes_of(layout_b)) && reaches(d, bytes_of(layout_d)) &&
           (beta == 0.0f || reaches(c, bytes_of(layout_c))) &&
           (desc.epilogue != BIAS || standin::reachable(device, desc.bias, layout_d.rows * width_of(bias_type())));
  }

  // The rows of op(A), or the columns of op(B), one after the other.
  static std::vector<float> unpack(const void* data, const MatrixLayout& layout, bool by_columns) {
    std::vector<float> unpacked(layout.rows * layout.cols);
    for (uint64_t col = 0; col < layout.cols; ++col) {
      for (uint64_t row = 0; row < layout.rows; ++row) {
        const uint64_t place = by_columns ? col * layout.rows + row : row * layout.cols + col;
        unpacked[place] = load(data, layout.type, col * static_cast<uint64_t>(layout.ld) + row);
      }
    }
    return unpacked;
  }

  // Sixteen sums at a time, each over its own part of the inner dimension, so that the compiler can keep them in a register.
  static float dot(const float* x, const float* y, uint64_t length) {
    constexpr uint64_t LANES = 16;
    float sums[LANES] = {};
    uint64_t k = 0;
    for (; k + LANES <= length; k += LANES) {
      for (uint64_t lane = 0; lane < LANES; ++lane) sums[lane] += x[k + lane] * y[k + lane];
    }
    float sum = 0.0f;
    for (const float part : sums) sum += part;
    for (; k < length; ++k) sum += x[k] * y[k];
    return sum;
  }

  void run() const {
    const std::vector<float> left = unpack(a, layout_a, desc.trans_a), right = unpack(b, layout_b, !desc.trans_b);
    for (uint64_t col = 0; col < layout_d.cols; ++col) {
      for (uint64_t row = 0; row < layout_d.rows; ++row) {
        float x = alpha * dot(&left[row * depth()], &right[col * depth()], depth());
        if (beta != 0.0f) x += beta * load(c, layout_c.type, col * static_cast<uint64_t>(layout_c.ld) + row);
        if (desc.epilogue == BIAS) x += load(desc.bias, bias_type(), row);
        store(d, layout_d.type, col * static_cast<uint64_t>(layout_d.ld) + row, x);
      }
    }
  }
};

template <typename T>
cublasStatus_t set(T& to, const void* from, size_t bytes) {
  if (from == nullptr || bytes != sizeof to) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&to, from, sizeof to);
  return CUBLAS_STATUS_SUCCESS;
}

template <typename T>
cublasStatus_t create(T** out, T value) {
  if (out == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  *out = new T(value);
  return CUBLAS_STATUS_SUCCESS;
}

template <typename T>
cublasStatus_t destroy(T* object) {
  delete object;
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

STANDIN_API size_t cublasLtGetVersion() { return 130000; }

STANDIN_API cublasStatus_t cublasLtCreate(Handle** handle) {
  // The library works in the current context.
  if (standin::device_of(nullptr) < 0) return CUBLAS_STATUS_NOT_INITIALIZED;
  return create(handle, Handle{});
}

STANDIN_API cublasStatus_t cublasLtDestroy(Handle* handle) { return destroy(handle); }

STANDIN_API cublasStatus_t cublasLtMatmulDescCreate(MatmulDesc** desc, unsigned compute_type, unsigned scale_type) {
  return create(desc, MatmulDesc{.compute_type = compute_type, .scale_type = scale_type});
}

STANDIN_API cublasStatus_t cublasLtMatmulDescDestroy(MatmulDesc* desc) { return destroy(desc); }

STANDIN_API cublasStatus_t cublasLtMatmulDescSetAttribute(MatmulDesc* desc, unsigned attribute, const void* from,
                                                          size_t bytes) {
  if (desc == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  int32_t ignored = 0;
  int8_t ignored_byte = 0;
  switch (attribute) {
    case POINTER_MODE: {
      const cublasStatus_t status = set(ignored, from, bytes);
      return status == CUBLAS_STATUS_SUCCESS && ignored != 0 ? CUBLAS_STATUS_NOT_SUPPORTED : status;
    }
    case TRANS_A:
      return set(desc->trans_a, from, bytes);
    case TRANS_B:
      return set(desc->trans_b, from, bytes);
    case EPILOGUE:
      return set(desc->epilogue, from, bytes);
    case BIAS_POINTER:
      return set(desc->bias, from, bytes);
    case BIAS_DATA_TYPE:
      return set(desc->bias_type, from, bytes);
    case SM_COUNT_TARGET:
      return set(ignored, from, bytes);
    case FAST_ACCUM:
      return set(ignored_byte, from, bytes);
    default:
      return CUBLAS_STATUS_NOT_SUPPORTED;
  }
}

STANDIN_API cublasStatus_t cublasLtMatrixLayoutCreate(MatrixLayout** layout, unsigned type, uint64_t rows, uint64_t cols,
                                                      int64_t ld) {
  return create(layout, MatrixLayout{type, rows, cols, ld});
}

STANDIN_API cublasStatus_t cublasLtMatrixLayoutDestroy(MatrixLayout* layout) { return destroy(layout); }

STANDIN_API cublasStatus_t cublasLtMatrixLayoutSetAttribute(MatrixLayout* layout, unsigned attribute, const void* from,
                                                            size_t bytes) {
  enum LayoutAttribute : unsigned { TYPE = 0, ORDER = 1, ROWS = 2, COLS = 3, LD = 4, BATCH_COUNT = 5 };
  if (layout == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  int32_t number = 0;
  switch (attribute) {
    case TYPE:
      return set(layout->type, from, bytes);
    case ROWS:
      return set(layout->rows, from, bytes);
    case COLS:
      return set(layout->cols, from, bytes);
    case LD:
      return set(layout->ld, from, bytes);
    case ORDER:
    case BATCH_COUNT: {
      // Only columns, and one product.
      const cublasStatus_t status = set(number, from, bytes);
      const bool is_supported = number == (attribute == ORDER ? 0 : 1);
      return status == CUBLAS_STATUS_SUCCESS && !is_supported ? CUBLAS_STATUS_NOT_SUPPORTED : status;
    }
    default:
      return CUBLAS_STATUS_NOT_SUPPORTED;
  }
}

STANDIN_API cublasStatus_t cublasLtMatmulPreferenceCreate(Preference** preference) { return create(preference, Preference{}); }

STANDIN_API cublasStatus_t cublasLtMatmulPreferenceDestroy(Preference* preference) { return destroy(preference); }

STANDIN_API cublasStatus_t cublasLtMatmulPreferenceSetAttribute(Preference* preference, unsigned attribute, const void* from,
                                                                size_t bytes) {
  constexpr unsigned MAX_WORKSPACE_BYTES = 1;
  if (preference == nullptr || from == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  // The others only choose between algorithms, of which there is one.
  return attribute == MAX_WORKSPACE_BYTES ? set(preference->max_workspace_bytes, from, bytes) : CUBLAS_STATUS_SUCCESS;
}

STANDIN_API cublasStatus_t cublasLtMatmulAlgoGetHeuristic(Handle* handle, const MatmulDesc* desc, const MatrixLayout* a,
                                                          const MatrixLayout* b, const MatrixLayout* c, const MatrixLayout* d,
                                                          const Preference* preference, int requested, HeuristicResult* results,
                                                          int* count) {
  if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
  const bool is_complete = desc != nullptr && a != nullptr && b != nullptr && c != nullptr && d != nullptr &&
                           preference != nullptr;
  if (!is_complete || requested < 1 || results == nullptr || count == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  *count = 0;
  const Matmul matmul{*desc, 1.0f, 0.0f, nullptr, nullptr, nullptr, nullptr, *a, *b, *c, *d};
  if (!matmul.fits()) return CUBLAS_STATUS_INVALID_VALUE;
  if (!matmul.is_supported()) return CUBLAS_STATUS_NOT_SUPPORTED;
  results[0] = {};
  results[0].algo.data[0] = ALGO_MAGIC;
  results[0].waves_count = 1.0f;
  *count = 1;
  return CUBLAS_STATUS_SUCCESS;
}

STANDIN_API cublasStatus_t cublasLtMatmul(Handle* handle, const MatmulDesc* desc, const void* alpha, const void* a,
                                          const MatrixLayout* layout_a, const void* b, const MatrixLayout* layout_b,
                                          const void* beta, const void* c, const MatrixLayout* layout_c, void* d,
                                          const MatrixLayout* layout_d, const Algo* algo, void* workspace,
                                          size_t workspace_bytes, CUstream stream) {
  if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
  const bool is_complete = desc != nullptr && alpha != nullptr && beta != nullptr && layout_a != nullptr &&
                           layout_b != nullptr && layout_c != nullptr && layout_d != nullptr;
  if (!is_complete || (algo != nullptr && algo->data[0] != ALGO_MAGIC)) return CUBLAS_STATUS_INVALID_VALUE;
  const CUdevice device = standin::device_of(stream);
  if (device < 0) return CUBLAS_STATUS_INVALID_VALUE;
  if (workspace_bytes > 0) {
    const bool is_aligned = reinterpret_cast<uintptr_t>(workspace) % WORKSPACE_ALIGNMENT == 0;
    if (!is_aligned || !standin::reachable(device, workspace, workspace_bytes)) return CUBLAS_STATUS_INVALID_VALUE;
  }
  Matmul matmul{*desc, 0.0f, 0.0f, a, b, c, d, *layout_a, *layout_b, *layout_c, *layout_d};
  std::memcpy(&matmul.alpha, alpha, sizeof matmul.alpha);
  std::memcpy(&matmul.beta, beta, sizeof matmul.beta);
  if (!matmul.fits()) return CUBLAS_STATUS_INVALID_VALUE;
  if (!matmul.is_supported()) return CUBLAS_STATUS_NOT_SUPPORTED;
  const CUresult result = standin::enqueue(stream, [matmul, device] {
    if (!matmul.is_reachable(device)) {
      std::fprintf(stderr, "emulated cuBLAS: an operand is not aligned, or in no allocation\n");
      return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    matmul.run();
    return CUDA_SUCCESS;
  });
  return result == CUDA_SUCCESS ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

STANDIN_API const char* cublasLtGetStatusName(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED:
      return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_INVALID_VALUE:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_EXECUTION_FAILED:
      return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
  }
  return "CUBLAS_STATUS unknown";
}

STANDIN_API const char* cublasLtGetStatusString(cublasStatus_t status) { return cublasLtGetStatusName(status); }
