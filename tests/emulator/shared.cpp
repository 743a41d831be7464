// Shared memory of the block that runs: full of 0xFF at its start, with memory behind it that nothing may touch.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "block.h"

namespace emulator {
namespace {

constexpr size_t CAPACITY = 256 << 10, STATIC_LIMIT = 48 << 10, STATIC_CAPACITY = 64 << 10;
constexpr size_t GUARD = 64 << 20, GAP = 64, BASE_ALIGNMENT = 1024;
constexpr unsigned char POISON = 0xFF;

// [untouchable][static arrays][untouchable][dynamic buffer, ending at][untouchable]
struct Arena {
  unsigned char *fixed, *dynamic_begin, *dynamic_end;
  Arena() {
    size_t bytes = 3 * GUARD + STATIC_CAPACITY + CAPACITY;
    constexpr int FLAGS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    auto place = static_cast<unsigned char*>(mmap(nullptr, bytes, PROT_NONE, FLAGS, -1, 0));
    fixed = place + GUARD;
    dynamic_begin = fixed + STATIC_CAPACITY + GUARD;
    dynamic_end = dynamic_begin + CAPACITY;
    mprotect(fixed, STATIC_CAPACITY, PROT_READ | PROT_WRITE);
    mprotect(dynamic_begin, CAPACITY, PROT_READ | PROT_WRITE);
  }
};

Arena& arena() {
  static Arena instance;
  return instance;
}

struct Array {
  unsigned char* data;
  size_t bytes;
};

size_t dynamic_bytes, static_bytes, static_end;  // static_end counts the gaps between the arrays.
unsigned char* dynamic_data;
std::vector<Array> arrays;  // The static ones, by their number in the text.
std::vector<bool> unfenced(CAPACITY / 16);

bool poisoned(const unsigned char* from, const unsigned char* to) {
  return std::all_of(from, to, [](unsigned char byte) { return byte == POISON; });
}

}  // namespace

void reset_shared(size_t bytes) {
  Arena& a = arena();
  dynamic_bytes = bytes;
  // Real hardware starts it at a multiple of 1024 where there is no static shared memory.
  size_t offset = (CAPACITY - bytes) / BASE_ALIGNMENT * BASE_ALIGNMENT;
  dynamic_data = a.dynamic_begin + offset;
  size_t from = offset >= BASE_ALIGNMENT ? offset - BASE_ALIGNMENT : 0;
  std::memset(a.dynamic_begin + from, POISON, CAPACITY - from);
  std::memset(a.fixed, POISON, static_end);
  static_bytes = static_end = 0;
  arrays.clear();
  std::fill(unfenced.begin(), unfenced.end(), false);
}

std::string check_shared() {
  Arena& a = arena();
  const unsigned char* before = std::max(a.dynamic_begin, dynamic_data - BASE_ALIGNMENT);
  if (!poisoned(before, dynamic_data) || !poisoned(dynamic_data + dynamic_bytes, a.dynamic_end))
    return "something was written beside the " + std::to_string(dynamic_bytes) + " bytes of dynamic shared memory";
  for (const Array& array : arrays)
    if (array.data != nullptr && !poisoned(array.data + array.bytes, array.data + array.bytes + GAP))
      return "something was written behind a shared array of " + std::to_string(array.bytes) + " bytes";
  return "";
}

bool in_shared(const void* pointer, size_t bytes) {
  auto p = static_cast<const unsigned char*>(pointer);
  if (p >= dynamic_data && p + bytes <= dynamic_data + dynamic_bytes) return true;
  return std::any_of(arrays.begin(), arrays.end(),
                     [=](const Array& a) { return a.data != nullptr && p >= a.data && p + bytes <= a.data + a.bytes; });
}

std::string describe_shared(const void* pointer) {
  Arena& a = arena();
  auto p = static_cast<const unsigned char*>(pointer);
  if (p >= a.dynamic_begin - GUARD / 2 && p < a.dynamic_end + GUARD)
    return "byte " + std::to_string(p - dynamic_data) + " of " + std::to_string(dynamic_bytes) +
           " of dynamic shared memory";
  if (p >= a.fixed - GUARD && p < a.fixed + STATIC_CAPACITY + GUARD / 2) return "beside the static shared memory";
  return "";
}

bool find_shared(const void* pointer, Region* region) {
  Arena& a = arena();
  auto p = static_cast<const unsigned char*>(pointer);
  if (p >= a.dynamic_begin - GUARD / 2 && p < a.dynamic_end + GUARD) 
    return *region = {dynamic_data, dynamic_bytes, a.dynamic_begin, CAPACITY}, true;
  if (p < a.fixed || p >= a.fixed + STATIC_CAPACITY) return false;
  const Array* found = nullptr;  // the last that begins before it
  for (const Array& array : arrays)
    if (array.data != nullptr && array.data <= p && (found == nullptr || array.data > found->data)) found = &array;
  if (found != nullptr) *region = {found->data, found->bytes, a.fixed, STATIC_CAPACITY};
  return found != nullptr;
}

void set_unfenced(uintptr_t chunk, bool value) {
  auto offset = chunk - reinterpret_cast<uintptr_t>(arena().dynamic_begin);
  if (offset < CAPACITY) unfenced[offset / 16] = value;
}

bool is_unfenced(const void* pointer) {
  auto offset = static_cast<const unsigned char*>(pointer) - arena().dynamic_begin;
  return offset >= 0 && static_cast<size_t>(offset) < CAPACITY && unfenced[offset / 16];
}

}  // namespace emulator

using namespace emulator;

extern "C" void* gemmify_emulator_dynamic_shared(unsigned alignment) {
  if (reinterpret_cast<uintptr_t>(dynamic_data) % std::max(alignment, 1u))
    fail("the dynamic shared memory is not aligned as declared");
  return dynamic_data;
}

extern "C" void* gemmify_emulator_static_shared(unsigned index, size_t bytes, unsigned alignment) {
  if (arrays.size() <= index) arrays.resize(index + 1);
  Array& array = arrays[index];
  if (array.data == nullptr) {
    size_t start = (static_end + alignment - 1) / alignment * alignment;
    static_bytes += bytes;
    if (static_bytes > STATIC_LIMIT || start + bytes + GAP > STATIC_CAPACITY)
      fail("more than 48 KiB of static shared memory");
    array = {arena().fixed + start, bytes};
    static_end = start + bytes + GAP;
    std::memset(array.data, POISON, bytes + GAP);
  }
  return array.data;
}
