// Threads of a block: fibers on stacks of their own, switched by hand.
#pragma once

#include <cstddef>

namespace emulator {

// A place where one flow of control waits.
struct Context {
  void* stack_pointer = nullptr;
};

// Go on at `to`; returns when somebody switches to `from`.
void switch_to(Context* from, Context* to);

// A stack with a page below that nothing may touch; `start` makes `context` begin `body`, which must not return.
class Stack {
 public:
  void start(Context* context, void (*body)());
  bool overflowed_at(const void* address) const;

 private:
  unsigned char* memory_ = nullptr;
};

}  // namespace emulator
