// What a fiber is left with and gone on with: the registers and the stack that a processor works on.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

#if defined(__x86_64__)

// Pushes the registers that a call preserves, keeps the stack pointer in `*save`, and goes on where `load` was kept. Weak, since
// all parts of a program have it.
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.weak emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");

class Context {
 public:
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    constexpr int SAVED_REGISTERS = 6;
    // A function is entered with the stack pointer eight bytes off a multiple of 16; the word above the entry is the address to
    // which it never returns.
    void** top = reinterpret_cast<void**>(stack + bytes) - 2;
    *top = reinterpret_cast<void*>(entry);
    pointer_ = top - SAVED_REGISTERS;
  }
  static void change(Context& from, Context& to) { emulation_switch(&from.pointer_, to.pointer_); }

 private:
  void* pointer_ = nullptr;
};

#else

class Context {
 public:
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

 private:
  ucontext_t context_;
};

#endif

}  // namespace emulation
