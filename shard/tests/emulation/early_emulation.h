// A kernel that begins before the one before it has ended: one block, of those that there are any, runs until it waits for that
// kernel, and is set aside with all its threads until that one has ended. What it read too early is then old.
#pragma once

#include "cuda_emulation.h"

#include <memory>

namespace emulation {

// A launch that has begun. One emulation runs at a time: its caller sees to that.
class Begun {
 public:
  // Throws a failure of the block.
  Begun(const Launch& launch, std::function<void()> kernel) : aside_(take_spare()) {
    const Exchanged exchanged(*aside_);
    state.survives = true;
    prepare_launch(launch, std::move(kernel));
    state.has_previous_ended = false;
    begin_block();
    if (state.num_waited != state.num_threads) fail("a thread ends and has not waited for the kernel before it");
  }

  Begun(const Begun&) = delete;
  Begun& operator=(const Begun&) = delete;
  ~Begun() { spares().push_back(std::move(aside_)); }

  // Goes on when the kernel before has ended.
  void finish() {
    const Exchanged exchanged(*aside_);
    state.has_previous_ended = true;
    release_waited();
    run_ready();
    end_block();
    run_blocks();
  }

 private:
  // While this lives, the emulation's state is the other one.
  class Exchanged {
   public:
    explicit Exchanged(State& other) : other_(other) { std::swap(state, other_); }
    ~Exchanged() { std::swap(state, other_); }

   private:
    State& other_;
  };

  // Fibers keep their stacks: states are used again.
  static std::vector<std::unique_ptr<State>>& spares() {
    static auto* const spares = new std::vector<std::unique_ptr<State>>;
    return *spares;
  }

  static std::unique_ptr<State> take_spare() {
    if (spares().empty()) return std::make_unique<State>();
    std::unique_ptr<State> spare = std::move(spares().back());
    spares().pop_back();
    return spare;
  }

  std::unique_ptr<State> aside_;
};

}  // namespace emulation
