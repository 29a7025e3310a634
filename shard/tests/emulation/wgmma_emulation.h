// The products of warpgroups, with the semantics of PTX: wgmma.mma_async, and the fences and waits around it.
//
// A product is computed when a warp waits for the group that it is in, and not before: only then are its factors read, be they
// in shared memory or in registers. From when it is begun until then its sums are NaN. So what reads sums too early, changes a
// factor too early, or copies over a tile that is still multiplied, gives other numbers. Each warp computes its own 16 rows when
// it waits: the warps of a warpgroup do not meet, but at the end of a block they must have begun the same products.
//
// Matrix descriptors are decoded: address, leading and stride offset, and the order in which the vectors of rows lie, which follows
// from the bits of an address. Shared memory does not begin at a multiple of more than a vector, as nothing says that it does.
//
// Stricter than a GPU: after a wait a thread must fence its registers before it begins a product, even if it wrote to none; and
// what it copied to shared memory is NaN to the tensor cores until it fences that itself. Registers must be held by the compiler
// (`hold`) as they are when a product is begun with them, and once more as they come from the wait, before they change and before
// the thread ends. Not shown: registers that are read before they are held, and stores to shared memory (other than copies)
// without a fence.
#pragma once

#include "cuda_emulation.h"

namespace emulation {

// Where dynamic shared memory begins.
constexpr uint64_t SHARED_BASE = 0x450;
constexpr unsigned WARPGROUP_ROWS = 64, WARP_ROWS = 16, PRODUCT_DEPTH = 16;
constexpr unsigned MAX_COLUMNS = 256;

// A factor in shared memory.
class Factor {
 public:
  // `over_rows` says that the product adds over the rows that lie in memory, whose columns are those of the product.
  Factor(uint64_t descriptor, bool over_rows)
      : address_(field(descriptor, 0)),
        leading_(field(descriptor, 16)),
        stride_(field(descriptor, 32)),
        over_rows_(over_rows) {
    constexpr unsigned ROW_BYTES[4] = {16, 128, 64, 32};
    row_bytes_ = ROW_BYTES[descriptor >> 62];
    if (descriptor >> 49 & 7) fail("a matrix in shared memory with a base offset");
  }

  // Element `depth`, over which the product adds, of row (or column) `index` of the product.
  double at(unsigned index, unsigned depth) const {
    uint64_t at = address_;
    if (over_rows_) {
      // Columns lie side by side as far as a row goes; without an order a row is one vector, and the two offsets change places.
      const unsigned columns = row_bytes_ / 2;
      const bool is_plain = row_bytes_ == 16;
      at += index / columns * (is_plain ? stride_ : leading_) + index % columns * 2;
      at += depth / 8 * (is_plain ? leading_ : stride_) + depth % 8 * row_bytes_;
    } else {
      at += index / 8 * stride_ + index % 8 * row_bytes_;
      at += depth / 8 * (row_bytes_ == 16 ? leading_ : 16) + depth % 8 * 2;
    }
    return element(at ^ (at >> 7 & (row_bytes_ / 16 - 1)) << 4);
  }

 private:
  static uint64_t field(uint64_t descriptor, unsigned bit) { return (descriptor >> bit & 0x3fff) << 4; }

  static double element(uint64_t address) {
    const uint64_t offset = address - SHARED_BASE;
    if (address < SHARED_BASE || offset + 2 > state.launch.shared_bytes) fail("a product reads beyond shared memory");
    if (state.is_unfenced[offset / COPY_BYTES]) return NAN;
    uint16_t bits;
    std::memcpy(&bits, state.dynamic_shared + offset, sizeof bits);
    return bf16_to_float(bits);
  }

  uint64_t address_, leading_, stride_;
  bool over_rows_;
  unsigned row_bytes_;
};

inline void poison(Product& product) {
  product.is_first = true;
  product.initial.assign(product.sums, product.sums + product.num_sums);
  std::fill_n(product.sums, product.num_sums, NAN);
}

inline Registers registers_of(const void* at, size_t bytes) { return {at, std::string(static_cast<const char*>(at), bytes)}; }

inline std::vector<Registers>::iterator find_registers(std::vector<Registers>& registers, const void* at) {
  return std::find_if(registers.begin(), registers.end(), [at](const Registers& one) { return one.at == at; });
}

// Registers are kept by the compiler as they are now.
inline void hold_registers(const void* at, size_t bytes) {
  Fiber& fiber = *state.running;
  const Registers now = registers_of(at, bytes);
  if (const auto come = find_registers(fiber.come, at); come != fiber.come.end()) {
    if (come->bytes != now.bytes) fail("registers of a product change before they are held after its wait");
    fiber.come.erase(come);
  }
  if (const auto held = find_registers(fiber.held, at); held != fiber.held.end()) fiber.held.erase(held);
  fiber.held.push_back(now);
}

inline void check_held(Fiber& fiber, const void* at, size_t bytes) {
  const auto held = find_registers(fiber.held, at);
  if (held == fiber.held.end() || held->bytes != registers_of(at, bytes).bytes) {
    fail("a product of a warpgroup is begun with registers that are not held");
  }
}

// A product has come: its registers are to be held before the thread does anything with them.
inline void give_back(Fiber& fiber, const void* at, size_t bytes) {
  if (const auto held = find_registers(fiber.held, at); held != fiber.held.end()) fiber.held.erase(held);
  if (find_registers(fiber.come, at) == fiber.come.end()) fiber.come.push_back(registers_of(at, bytes));
}

constexpr size_t FACTOR_BYTES = 4 * sizeof(unsigned);

// Begins a product: all lanes of a warp together.
inline void begin_product(Product product) {
  Fiber& fiber = *state.running;
  Warp& warp = state.warps[fiber.index / LANES];
  if (!fiber.is_fenced) fail("a product of a warpgroup is begun and registers were not fenced since the last wait");
  if (state.num_threads % (4 * LANES) != 0) fail("a product of a warpgroup in a block that is not made of them");
  bool is_chained = false;
  const auto chains = [&](const Product& earlier) { is_chained |= earlier.sums == product.sums; };
  for (const auto& group : fiber.product_groups) std::for_each(group.begin(), group.end(), chains);
  std::for_each(fiber.begun_products.begin(), fiber.begun_products.end(), chains);
  if (!is_chained) check_held(fiber, product.sums, product.num_sums * sizeof(float));
  if (product.registers != nullptr) check_held(fiber, product.registers, FACTOR_BYTES);
  if (!is_chained) poison(product);
  if (fiber.index % LANES == 0) {
    ++warp.num_products;
    const uint64_t first = product.registers == nullptr ? product.first : 1;
    for (const uint64_t part : {first, product.second, uint64_t{product.num_sums}}) {
      warp.factors = (warp.factors ^ part) * 0x9e3779b97f4a7c15u;
    }
  }
  const uint64_t second = product.second;
  fiber.begun_products.push_back(std::move(product));
  const unsigned mine[2] = {static_cast<unsigned>(second), static_cast<unsigned>(second >> 32)};
  const Shown* const shown = exchange(Meeting::Wgmma, 0xffffffffu, mine);
  if (std::memcmp(shown[0].words, mine, sizeof mine) != 0) fail("lanes of a warp begin different products");
}

// Computes product `place` of the oldest group of a warp.
inline void compute_product(unsigned first_lane, size_t place) {
  const auto of_lane = [&](unsigned lane) -> Product& {
    std::vector<Product>& group = state.fibers[first_lane + lane].product_groups.front();
    if (place >= group.size()) fail("lanes of a warp begin different products");
    return group[place];
  };
  const Product& product = of_lane(0);
  const unsigned columns = 2 * product.num_sums;
  double a[WARP_ROWS][PRODUCT_DEPTH];
  static double b[PRODUCT_DEPTH][MAX_COLUMNS];
  const Factor first(product.first, false), second(product.second, product.is_transposed);
  const unsigned first_row = first_lane / LANES % 4 * WARP_ROWS;
  for (unsigned row = 0; row < WARP_ROWS; ++row) {
    for (unsigned k = 0; k < PRODUCT_DEPTH; ++k) {
      if (product.registers == nullptr) {
        a[row][k] = first.at(first_row + row, k);
      } else {
        const unsigned word = of_lane(row % 8 * 4 + k % 8 / 2).registers[row / 8 + k / 8 * 2];
        a[row][k] = bf16_to_float(word >> k % 2 * 16 & 0xffff);
      }
    }
  }
  for (unsigned k = 0; k < PRODUCT_DEPTH; ++k) {
    for (unsigned column = 0; column < columns; ++column) b[k][column] = second.at(column, k);
  }
  for (unsigned lane = 0; lane < LANES; ++lane) {
    Product& of_this = of_lane(lane);
    if (of_this.is_first) std::copy(of_this.initial.begin(), of_this.initial.end(), of_this.sums);
  }
  static double sums[MAX_COLUMNS];
  for (unsigned row = 0; row < WARP_ROWS; ++row) {
    std::fill_n(sums, columns, 0.0);
    for (unsigned k = 0; k < PRODUCT_DEPTH; ++k) {
      const double factor = a[row][k];
      for (unsigned column = 0; column < columns; ++column) sums[column] += factor * b[k][column];
    }
    for (unsigned column = 0; column < columns; ++column) {
      const Product& of_this = of_lane(row % 8 * 4 + column % 8 / 2);
      float& sum = of_this.sums[column / 8 * 4 + row / 8 * 2 + column % 2];
      sum = static_cast<float>((product.accumulates ? static_cast<double>(sum) : 0.0) + sums[column]);
    }
  }
}

// The last lane of a warp that waits has its products computed.
inline void wait_for_products(size_t pending) {
  Fiber& fiber = *state.running;
  Warp& warp = state.warps[fiber.index / LANES];
  fiber.is_fenced = false;
  if (++warp.num_awaiting == LANES) {
    warp.num_awaiting = 0;
    const unsigned first_lane = fiber.index / LANES * LANES;
    const size_t num_groups = state.fibers[first_lane].product_groups.size();
    for (unsigned lane = 1; lane < LANES; ++lane) {
      if (state.fibers[first_lane + lane].product_groups.size() != num_groups) fail("lanes of a warp have other products");
    }
    for (size_t group = num_groups; group > pending; --group) {
      const size_t count = state.fibers[first_lane].product_groups.front().size();
      for (size_t place = 0; place < count; ++place) compute_product(first_lane, place);
      for (unsigned lane = 0; lane < LANES; ++lane) {
        auto& groups = state.fibers[first_lane + lane].product_groups;
        const std::vector<Product> computed = std::move(groups.front());
        groups.erase(groups.begin());
        // Sums that a later product adds to are not there yet.
        std::vector<float*> again;
        const auto poison_again = [&](Product& later) {
          const auto is_it = [&](const Product& earlier) { return earlier.sums == later.sums; };
          if (later.is_first || std::none_of(computed.begin(), computed.end(), is_it)) return;
          if (std::find(again.begin(), again.end(), later.sums) != again.end()) return;
          again.push_back(later.sums);
          poison(later);
        };
        for (auto& later : groups) std::for_each(later.begin(), later.end(), poison_again);
        auto& begun = state.fibers[first_lane + lane].begun_products;
        std::for_each(begun.begin(), begun.end(), poison_again);
        for (const Product& product : computed) {
          Fiber& of_lane = state.fibers[first_lane + lane];
          const bool goes_on = std::find(again.begin(), again.end(), product.sums) != again.end();
          if (!goes_on) give_back(of_lane, product.sums, product.num_sums * sizeof(float));
          if (product.registers != nullptr) give_back(of_lane, product.registers, FACTOR_BYTES);
        }
      }
    }
  }
  wait_for_lanes(fiber, Meeting::WgmmaWait, 0xffffffffu);
}

}  // namespace emulation

inline unsigned shared_address(const void* at) {
  return static_cast<unsigned>(emulation::SHARED_BASE + (static_cast<const char*>(at) - emulation::state.dynamic_shared));
}

inline void wgmma_fence() { emulation::state.running->is_fenced = true; }

inline void wgmma_commit() {
  emulation::Fiber& fiber = *emulation::state.running;
  fiber.product_groups.push_back(std::move(fiber.begun_products));
  fiber.begun_products.clear();
}

template <int PENDING>
void wgmma_wait() {
  emulation::wait_for_products(PENDING);
}

template <int COUNT>
void hold(float (&sums)[COUNT]) {
  emulation::hold_registers(sums, sizeof sums);
}

template <int COUNT>
void hold(unsigned (&factors)[COUNT][4]) {
  for (const unsigned(&factor)[4] : factors) emulation::hold_registers(factor, sizeof factor);
}

inline void finish_before_wait(float) {}

inline void fence_shared_for_wgmma() {
  emulation::Fiber& fiber = *emulation::state.running;
  for (const size_t unit : fiber.unfenced) emulation::state.is_unfenced[unit] = false;
  fiber.unfenced.clear();
}

template <bool ACCUMULATES, int COUNT>
void wgmma(float (&sums)[COUNT], unsigned long long a, unsigned long long b) {
  emulation::begin_product({sums, COUNT, ACCUMULATES, nullptr, a, b, false, {}, false});
}

template <int COUNT>
void wgmma(float (&sums)[COUNT], const unsigned (&a)[4], unsigned long long b) {
  emulation::begin_product({sums, COUNT, true, a, 0, b, true, {}, false});
}
