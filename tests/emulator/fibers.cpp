#include "fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {
namespace {

constexpr size_t BYTES = 256 << 10;

size_t page() {
  static const size_t size = sysconf(_SC_PAGESIZE);
  return size;
}

unsigned char* reserve() {
  constexpr int FLAGS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, BYTES + page(), PROT_READ | PROT_WRITE, FLAGS, -1, 0);
  mprotect(memory, page(), PROT_NONE);
  return static_cast<unsigned char*>(memory);
}

}  // namespace

bool Stack::overflowed_at(const void* address) const {
  auto offset = static_cast<const unsigned char*>(address) - memory_;
  return memory_ != nullptr && offset >= 0 && static_cast<size_t>(offset) < page();
}

#ifdef __x86_64__

// The registers that a called function must keep are pushed, the stack pointers exchanged, the others' popped.
asm(R"(
.text
.p2align 4
.local gemmify_switch_stacks
.type gemmify_switch_stacks, @function
gemmify_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gemmify_switch_stacks, .-gemmify_switch_stacks
)");
extern "C" void gemmify_switch_stacks(void** from, void** to);

void switch_to(Context* from, Context* to) { gemmify_switch_stacks(&from->stack_pointer, &to->stack_pointer); }

void Stack::start(Context* context, void (*body)()) {
  if (memory_ == nullptr) memory_ = reserve();
  auto top = reinterpret_cast<uintptr_t*>(memory_ + page() + BYTES);
  // From the top: where `body` would return to (never), its address, six registers. The stack is 16-byte aligned
  // before a call, so it is 8 off at `body`'s first instruction.
  top[-1] = 0;
  top[-2] = reinterpret_cast<uintptr_t>(body);
  for (int i = 3; i <= 8; ++i) top[-i] = 0;
  context->stack_pointer = top - 8;
}

#else  // Slower (a system call a switch), for other machines.

void switch_to(Context* from, Context* to) {
  if (from->stack_pointer == nullptr) from->stack_pointer = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from->stack_pointer), static_cast<ucontext_t*>(to->stack_pointer));
}

void Stack::start(Context* context, void (*body)()) {
  if (memory_ == nullptr) memory_ = reserve();
  if (context->stack_pointer == nullptr) context->stack_pointer = new ucontext_t;
  auto place = static_cast<ucontext_t*>(context->stack_pointer);
  getcontext(place);
  place->uc_stack.ss_sp = memory_ + page();
  place->uc_stack.ss_size = BYTES;
  place->uc_link = nullptr;
  makecontext(place, body, 0);
}

#endif

}  // namespace emulator
