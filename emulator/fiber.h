// Switching between the stacks of one thread. A switch costs a few nanoseconds on x86-64, where this file spells it
// out; elsewhere ucontext does it, which asks the kernel for the signal mask every time.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(FASTCONV_EMULATOR_UCONTEXT)
#define FASTCONV_EMULATOR_UCONTEXT 1
#include <ucontext.h>
#endif

namespace fastconv::emulator {

#ifdef FASTCONV_EMULATOR_UCONTEXT

class Context {
 public:
  // `entry` never returns.
  void start_at(void (*entry)(), std::byte* stack, size_t bytes) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  static void jump(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

 private:
  ucontext_t context_;
};

#else

extern "C" void fastconv_emulator_switch(void** from, void* to);

class Context {
 public:
  void start_at(void (*entry)(), std::byte* stack, size_t bytes) {
    // As a function finds it: the stack is 16-byte aligned before the return address, here none, is pushed.
    void** top = reinterpret_cast<void**>(stack + bytes / 16 * 16) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    stack_pointer_ = top - 6;  // the six callee-saved registers, whatever they hold
  }
  static void jump(Context& from, Context& to) { fastconv_emulator_switch(&from.stack_pointer_, to.stack_pointer_); }

 private:
  void* stack_pointer_ = nullptr;
};

#endif

}  // namespace fastconv::emulator
