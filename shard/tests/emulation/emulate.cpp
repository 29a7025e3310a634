// Runs one kernel of one source file on the CPU: a request comes on standard input, the buffers go to standard output.
//
// Compiled with -DEMULATE_<FILE> and the kernels' folder in the include path; see cuda_emulation.h for what is emulated. All
// numbers are little-endian:
//
//   request   = name grid block shared seed count argument*
//   name      = length:u32 bytes
//   grid      = x:u32 y:u32 z:u32, and so is block
//   shared    = bytes of dynamic shared memory:u32
//   seed      = u64, of the order of threads and blocks
//   count     = u32, of arguments
//   argument  = 0:u8 bits:u32            a scalar of 4 bytes
//             | 1:u8 bits:u64            a scalar of 8 bytes
//             | 2:u8 length:u64 bytes    a buffer that the kernel may not change
//             | 3:u8 length:u64 bytes    a buffer that is written back
//             | 4:u8                     a null pointer
//             | 5:u8 index:u32           the buffer of an earlier argument
//
//   answer    = the bytes of the buffers of kind 3, in their order
//
// A buffer is an allocation of its own and of exactly its length, so that AddressSanitizer sees an index beyond it. Status 3:
// the kernel or the request is at fault, and standard error says how.
#include "cuda_emulation.h"

#include <string>
#include <string_view>

#if defined(EMULATE_ROWWISE)
#include "rowwise.cu"
#elif defined(EMULATE_ROTARY)
#include "rotary.cu"
#elif defined(EMULATE_GEMV)
#include "gemv.cu"
#elif defined(EMULATE_ATTENTION)
#include "attention.cu"
#elif defined(EMULATE_PATCHES)
#include "patches.cu"
#elif defined(EMULATE_PROBES)
#include "probes.cu"
#else
#error "which source file is to be emulated?"
#endif

namespace {

enum class Kind : uint8_t { Scalar4, Scalar8, In, InOut, Null, Same };

struct Free {
  void operator()(char* bytes) const { std::free(bytes); }
};

struct Buffer {
  std::unique_ptr<char, Free> bytes;
  size_t length = 0;
};

struct Argument {
  Kind kind = Kind::Null;
  uint64_t bits = 0;
  Buffer buffer;
  // What a buffer that may not change was.
  std::string original;
};

using Arguments = std::vector<Argument>;

void read_exactly(void* to, size_t length) {
  if (length > 0 && std::fread(to, 1, length, stdin) != length) emulation::fail("the request is cut short");
}

template <typename T>
T read() {
  T value;
  read_exactly(&value, sizeof value);
  return value;
}

dim3 read_dim3() {
  const unsigned x = read<uint32_t>(), y = read<uint32_t>(), z = read<uint32_t>();
  return {x, y, z};
}

Buffer read_buffer() {
  Buffer buffer;
  buffer.length = read<uint64_t>();
  buffer.bytes.reset(static_cast<char*>(std::malloc(buffer.length)));
  read_exactly(buffer.bytes.get(), buffer.length);
  return buffer;
}

Argument read_argument() {
  Argument argument;
  argument.kind = static_cast<Kind>(read<uint8_t>());
  switch (argument.kind) {
    case Kind::Scalar4:
    case Kind::Same:
      argument.bits = read<uint32_t>();
      break;
    case Kind::Scalar8:
      argument.bits = read<uint64_t>();
      break;
    case Kind::In:
      argument.buffer = read_buffer();
      argument.original.assign(argument.buffer.bytes.get(), argument.buffer.length);
      break;
    case Kind::InOut:
      argument.buffer = read_buffer();
      break;
    case Kind::Null:
      break;
    default:
      emulation::fail("an argument of an unknown kind");
  }
  return argument;
}

template <typename T>
T value_of(const Arguments& arguments, size_t index) {
  const Argument& argument = arguments[index];
  if constexpr (std::is_pointer_v<T>) {
    switch (argument.kind) {
      case Kind::In:
        if (!std::is_const_v<std::remove_pointer_t<T>>) emulation::fail("a kernel's result has no buffer to be written to");
        [[fallthrough]];
      case Kind::InOut:
        return reinterpret_cast<T>(argument.buffer.bytes.get());
      case Kind::Null:
        return nullptr;
      case Kind::Same:
        if (argument.bits >= index) emulation::fail("the buffer of an argument that comes later");
        return value_of<T>(arguments, argument.bits);
      default:
        emulation::fail("a scalar where the kernel takes a pointer");
    }
  } else {
    const Kind expected = sizeof(T) == 4 ? Kind::Scalar4 : Kind::Scalar8;
    if (argument.kind != expected) emulation::fail("an argument of another kind than the kernel takes");
    T value;
    std::memcpy(&value, &argument.bits, sizeof value);
    return value;
  }
}

template <typename... Parameters, size_t... INDEX>
void launch(void (*kernel)(Parameters...), const emulation::Launch& launch, const Arguments& arguments,
            std::index_sequence<INDEX...>) {
  if (arguments.size() != sizeof...(Parameters)) emulation::fail("the kernel takes another number of arguments");
  const auto values = std::make_tuple(value_of<Parameters>(arguments, INDEX)...);
  emulation::run(launch, [&] { std::apply(kernel, values); });
}

template <auto KERNEL>
struct Launcher;

template <typename... Parameters, void (*KERNEL)(Parameters...)>
struct Launcher<KERNEL> {
  static void run(const emulation::Launch& how, const Arguments& arguments) {
    launch(KERNEL, how, arguments, std::index_sequence_for<Parameters...>{});
  }
};

struct Entry {
  std::string_view name;
  void (*run)(const emulation::Launch&, const Arguments&);
};

#define KERNEL(name) {#name, Launcher<&name>::run}

constexpr Entry KERNELS[] = {
#if defined(EMULATE_ROWWISE)
    KERNEL(residual_norm), KERNEL(norm_rows),       KERNEL(gated_silu),  KERNEL(gelu),
    KERNEL(embedding),     KERNEL(insert_features), KERNEL(gather_rows), KERNEL(scatter_rows),
#elif defined(EMULATE_ROTARY)
    KERNEL(rotary_append), KERNEL(vision_rotary), KERNEL(copy_blocks),
#elif defined(EMULATE_GEMV)
    KERNEL(gemv_1), KERNEL(gemv_2), KERNEL(gemv_3), KERNEL(gemv_4),
    KERNEL(gemv_5), KERNEL(gemv_6), KERNEL(gemv_7), KERNEL(gemv_8),
#elif defined(EMULATE_ATTENTION)
    KERNEL(paged_attention_split_32),  KERNEL(paged_attention_combine_32),  KERNEL(paged_attention_32),
    KERNEL(paged_attention_split_64),  KERNEL(paged_attention_combine_64),  KERNEL(paged_attention_64),
    KERNEL(paged_attention_split_80),  KERNEL(paged_attention_combine_80),  KERNEL(paged_attention_80),
    KERNEL(paged_attention_split_128), KERNEL(paged_attention_combine_128), KERNEL(paged_attention_128),
    KERNEL(vision_attention_32),       KERNEL(vision_attention_64),         KERNEL(vision_attention_80),
    KERNEL(vision_attention_128),
#elif defined(EMULATE_PATCHES)
    KERNEL(patches),
#elif defined(EMULATE_PROBES)
    KERNEL(reverse),           KERNEL(read_shared), KERNEL(read_dynamic_shared), KERNEL(read_global),
    KERNEL(barrier_in_branch), KERNEL(early_end),   KERNEL(shuffle_in_branch),   KERNEL(read_vector),
    KERNEL(write_input),       KERNEL(votes),       KERNEL(meet_in_halves),      KERNEL(product),
    KERNEL(count_threads),
#endif
};

}  // namespace

int main() {
  std::string name(read<uint32_t>(), '\0');
  read_exactly(name.data(), name.size());
  emulation::Launch how;
  how.grid = read_dim3();
  how.block = read_dim3();
  how.shared_bytes = read<uint32_t>();
  how.seed = read<uint64_t>();
  Arguments arguments(read<uint32_t>());
  for (Argument& argument : arguments) argument = read_argument();

  const Entry* found = nullptr;
  for (const Entry& entry : KERNELS) {
    if (entry.name == name) found = &entry;
  }
  if (found == nullptr) emulation::fail("no kernel of this name");
  found->run(how, arguments);

  for (const Argument& argument : arguments) {
    const Buffer& buffer = argument.buffer;
    if (argument.kind == Kind::In && std::memcmp(argument.original.data(), buffer.bytes.get(), buffer.length) != 0) {
      emulation::fail("the kernel wrote to a buffer that it may not change");
    }
    if (argument.kind == Kind::InOut && std::fwrite(buffer.bytes.get(), 1, buffer.length, stdout) != buffer.length) {
      emulation::fail("the answer could not be written");
    }
  }
  return 0;
}
