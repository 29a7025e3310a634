// Runs one kernel of one source file on the CPU: a request comes on standard input, the buffers go to standard output.
//
// Compiled with -DEMULATE_<FILE> and the kernels' folder in the include path; see cuda_emulation.h for what is emulated. All
// numbers are little-endian:
//
//   request   = name grid block shared early seed count argument*
//   name      = length:u32 bytes
//   grid      = x:u32 y:u32 z:u32, and so is block
//   shared    = bytes of dynamic shared memory:u32
//   early     = 1:u8 if the kernel may begin before the one before it has ended, else 0
//   seed      = u64, of the order of threads and blocks
//   count     = u32, of arguments
//   argument  = 0:u8 bits:u32            a scalar of 4 bytes
//             | 1:u8 bits:u64            a scalar of 8 bytes
//             | 2:u8 length:u64 bytes    a buffer that the kernel may not change
//             | 3:u8 length:u64 bytes    a buffer that is written back
//             | 4:u8                     a null pointer
//             | 5:u8 index:u32           the buffer of an earlier argument
//             | 6:u8 count:u32           a structure of the pointers that the next arguments are; those it lacks are null
//             | 7:u8 index:u32 offset:u64 length:u64 bytes
//                                        none: what somebody else writes to the buffer of an earlier argument while the kernel
//                                        runs, in the order of the request
//             | 8:u8 length:u64 bytes    a buffer that no kernel changes, so that it may be read early
//
//   answer    = the bytes of the buffers of kind 3, in their order
//
// A buffer is an allocation of its own and of exactly its length, so that AddressSanitizer sees an index beyond it. Status 3:
// the kernel or the request is at fault, and standard error says how.
#include "kernels.h"

#include <memory>
#include <string>
#include <string_view>

namespace {

enum class Kind : uint8_t { Scalar4, Scalar8, In, InOut, Null, Same, Pointers, Write, Weights };

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
  uint64_t offset = 0;
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
    case Kind::Pointers:
      argument.bits = read<uint32_t>();
      break;
    case Kind::Scalar8:
      argument.bits = read<uint64_t>();
      break;
    case Kind::In:
    case Kind::Weights:
      argument.buffer = read_buffer();
      argument.original.assign(argument.buffer.bytes.get(), argument.buffer.length);
      break;
    case Kind::InOut:
      argument.buffer = read_buffer();
      break;
    case Kind::Null:
      break;
    case Kind::Write:
      argument.bits = read<uint32_t>();
      argument.offset = read<uint64_t>();
      argument.buffer = read_buffer();
      break;
    default:
      emulation::fail("an argument of an unknown kind");
  }
  return argument;
}

template <typename T>
struct IsPerRank : std::false_type {};

template <typename T>
struct IsPerRank<PerRank<T>> : std::true_type {
  using Pointer = T*;
};

template <typename T>
T value_of(const Arguments& arguments, size_t index) {
  const Argument& argument = arguments[index];
  if constexpr (IsPerRank<T>::value) {
    if (argument.kind != Kind::Pointers) emulation::fail("the kernel takes a structure of pointers");
    T value = {};
    for (size_t i = 0; i < argument.bits; ++i) {
      value.at[i] = value_of<typename IsPerRank<T>::Pointer>(arguments, index + 1 + i);
    }
    return value;
  } else if constexpr (std::is_pointer_v<T>) {
    switch (argument.kind) {
      case Kind::In:
      case Kind::Weights:
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

// Where the arguments are that the kernel takes, without those that are inside of others or none.
std::vector<size_t> places_of(const Arguments& arguments) {
  std::vector<size_t> places;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].kind == Kind::Write) continue;
    places.push_back(i);
    if (arguments[i].kind != Kind::Pointers) continue;
    if (arguments[i].bits > MAX_RANKS || arguments[i].bits >= arguments.size() - i) emulation::fail("too many pointers");
    i += arguments[i].bits;
  }
  return places;
}

// What the kernel before may still read or write.
std::vector<emulation::Hidden> hidden_of(const Arguments& arguments) {
  std::vector<emulation::Hidden> hidden;
  for (const Argument& argument : arguments) {
    if (argument.kind != Kind::In && argument.kind != Kind::InOut) continue;
    hidden.push_back({argument.buffer.bytes.get(), argument.buffer.length});
  }
  return hidden;
}

// What others write while the kernel runs.
std::vector<emulation::Write> writes_of(const Arguments& arguments) {
  std::vector<emulation::Write> writes;
  for (const Argument& argument : arguments) {
    if (argument.kind != Kind::Write) continue;
    const Buffer& written = argument.buffer;
    if (argument.bits >= arguments.size()) emulation::fail("no such argument");
    const Buffer& to = arguments[argument.bits].buffer;
    if (argument.offset + written.length > to.length) emulation::fail("what is written is beyond its buffer");
    writes.push_back({to.bytes.get() + argument.offset, std::string(written.bytes.get(), written.length)});
  }
  return writes;
}

template <typename... Parameters, size_t... INDEX>
void launch(void (*kernel)(Parameters...), const emulation::Launch& launch, const Arguments& arguments,
            std::index_sequence<INDEX...>) {
  const std::vector<size_t> places = places_of(arguments);
  if (places.size() != sizeof...(Parameters)) emulation::fail("the kernel takes another number of arguments");
  const auto values = std::make_tuple(value_of<std::remove_const_t<Parameters>>(arguments, places[INDEX])...);
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

#define ENTRY(name) {#name, Launcher<&name>::run},

constexpr Entry ENTRIES[] = {KERNELS(ENTRY)};

}  // namespace

int main() {
  std::string name(read<uint32_t>(), '\0');
  read_exactly(name.data(), name.size());
  emulation::Launch how;
  how.grid = read_dim3();
  how.block = read_dim3();
  how.shared_bytes = read<uint32_t>();
  how.begins_early = read<uint8_t>() != 0;
  how.seed = read<uint64_t>();
  Arguments arguments(read<uint32_t>());
  for (Argument& argument : arguments) argument = read_argument();
  how.writes = writes_of(arguments);
  if (how.begins_early) how.hidden = hidden_of(arguments);

  const Entry* found = nullptr;
  for (const Entry& entry : ENTRIES) {
    if (entry.name == name) found = &entry;
  }
  if (found == nullptr) emulation::fail("no kernel of this name");
  found->run(how, arguments);

  for (const Argument& argument : arguments) {
    const Buffer& buffer = argument.buffer;
    const bool may_not_change = argument.kind == Kind::In || argument.kind == Kind::Weights;
    if (may_not_change && std::memcmp(argument.original.data(), buffer.bytes.get(), buffer.length) != 0) {
      emulation::fail("the kernel wrote to a buffer that it may not change");
    }
    if (argument.kind == Kind::InOut && std::fwrite(buffer.bytes.get(), 1, buffer.length, stdout) != buffer.length) {
      emulation::fail("the answer could not be written");
    }
  }
  return 0;
}
