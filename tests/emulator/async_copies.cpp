// cp.async: a copy is done when its thread waits for it, or at once, whichever order of things is emulated.
//
// Both are allowed on a GPU. Late copies show a missing wait, early ones a stage that is overwritten while it is read.
#include <cstring>

#include "block.h"
#include "races.h"

namespace emulator {
namespace {

void perform(Thread& thread, const AsyncCopy& copy) {
  if (copy.valid) {
    std::memcpy(copy.shared, copy.global, copy.bytes);
  } else {
    std::memset(copy.shared, 0, copy.bytes);
  }
  watch(copy.shared, copy.bytes, true);
  auto chunk = reinterpret_cast<uintptr_t>(copy.shared) / 16 * 16;
  set_unfenced(chunk, true);
  thread.unfenced.push_back(chunk);
}

}  // namespace
}  // namespace emulator

using namespace emulator;

extern "C" {

void gemmify_emulator_copy(void* shared, const void* global, unsigned bytes, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes || (valid && reinterpret_cast<uintptr_t>(global) % bytes))
    fail("cp.async of " + std::to_string(bytes) + " bytes from or to an address that is no multiple of it");
  if (!in_shared(shared, bytes)) fail("cp.async to an address that is not in shared memory");
  watch(shared, bytes, true);
  if (valid) watch(global, bytes, false);
  Thread& thread = current();
  auto to = static_cast<unsigned char*>(shared);
  thread.copies.push_back({to, static_cast<const unsigned char*>(global), bytes, valid});
  if (block.copies_at_once) perform(thread, thread.copies.back());
}

void gemmify_emulator_commit() {
  Thread& thread = current();
  size_t grouped = 0;
  for (size_t group : thread.groups) grouped += group;
  thread.groups.push_back(thread.copies.size() - grouped);
}

void gemmify_emulator_wait(unsigned left) {
  Thread& thread = current();
  if (thread.groups.size() <= left) return;
  size_t groups = thread.groups.size() - left, count = 0;
  for (size_t i = 0; i < groups; ++i) count += thread.groups[i];
  for (size_t i = 0; i < count; ++i) {
    if (block.copies_at_once) {
      watch(thread.copies[i].shared, thread.copies[i].bytes, true);  // It may have been written until now.
    } else {
      perform(thread, thread.copies[i]);
    }
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + count);
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + groups);
}

void gemmify_emulator_fence_proxy() {
  Thread& thread = current();
  for (uintptr_t chunk : thread.unfenced) set_unfenced(chunk, false);
  thread.unfenced.clear();
}

}  // extern "C"
