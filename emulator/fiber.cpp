#include "fiber.h"

#ifndef FASTCONV_EMULATOR_UCONTEXT
asm(R"(
.text
.globl fastconv_emulator_switch
.hidden fastconv_emulator_switch
.type fastconv_emulator_switch, @function
fastconv_emulator_switch:
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
.size fastconv_emulator_switch, . - fastconv_emulator_switch
)");
#endif
