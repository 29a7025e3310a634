// The kernels of one source file, compiled with -DEMULATE_<FILE>.
#include "../kernels.h"
#include "kernel.h"

#include <tuple>

namespace {

template <typename T>
T read(const void* value) {
  T copy;
  std::memcpy(static_cast<void*>(&copy), value, sizeof copy);
  return copy;
}

template <typename T>
void add_address(T value, std::vector<uintptr_t>& addresses) {
  if constexpr (std::is_pointer_v<T>) addresses.push_back(reinterpret_cast<uintptr_t>(value));
}

template <auto KERNEL>
struct Binder;

template <typename... Parameters, void (*KERNEL)(Parameters...)>
struct Binder<KERNEL> {
  static constexpr size_t NUM_PARAMETERS = sizeof...(Parameters);
  template <size_t... INDEX>
  static standin::Run bind(void* const* values, std::vector<uintptr_t>& addresses, std::index_sequence<INDEX...>) {
    const std::tuple<Parameters...> arguments(read<Parameters>(values[INDEX])...);
    (add_address(std::get<INDEX>(arguments), addresses), ...);
    return [arguments] { std::apply(KERNEL, arguments); };
  }
  static standin::Run bind(void* const* values, std::vector<uintptr_t>& addresses) {
    return bind(values, addresses, std::index_sequence_for<Parameters...>{});
  }
};

#define ENTRY(name) {#name, Binder<&name>::NUM_PARAMETERS, Binder<&name>::bind},

constexpr standin::Kernel ENTRIES[] = {KERNELS(ENTRY)};

[[gnu::constructor]] void add_kernels() {
  standin::kernels().insert(standin::kernels().end(), std::begin(ENTRIES), std::end(ENTRIES));
}

}  // namespace
