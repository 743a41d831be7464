// Device memory: every allocation ends at a page that nothing may touch and begins behind one.
//
// All lies in one large part of the address space, far apart and no address used twice, so that a wild access meets
// nothing of the host's and an access after cudaFree meets nothing at all. An allocation is filled with 0xFF (NaN in
// every floating-point type), so is what its size leaves of 256 bytes, the alignment of cudaMalloc; what is written there
// shows on release. Outside of launches and copies the pages cannot be touched at all: host code that follows a device
// pointer dies of SIGSEGV instead of working by luck.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "emulator.h"
#include "races.h"

namespace emulator {
namespace {

constexpr size_t ALIGNMENT = 256;
constexpr size_t GAP = 16 << 20, LARGEST_SPACE = size_t(16) << 40, SMALLEST_SPACE = size_t(64) << 30;
constexpr unsigned char POISON = 0xFF;

struct Allocation {
  unsigned char* pages;  // The first page that may be touched.
  size_t page_bytes, bytes;
  unsigned char* data;
  unsigned char* end() const { return pages + page_bytes; }
};

std::map<uintptr_t, Allocation> allocations;  // by the address of the page behind them
size_t total = 0;
int depth = 0;

size_t page() {
  static const size_t size = sysconf(_SC_PAGESIZE);
  return size;
}

// Address space that nobody may touch yet; as much as the system gives.
struct Space {
  unsigned char *next = nullptr, *end = nullptr;
  Space() {
    for (size_t bytes = LARGEST_SPACE; bytes >= SMALLEST_SPACE && next == nullptr; bytes /= 4) {
      void* place = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (place == MAP_FAILED) continue;
      next = static_cast<unsigned char*>(place) + GAP;
      end = static_cast<unsigned char*>(place) + bytes;
    }
  }
};

// `bytes` of it, a whole number of pages, with a gap behind; nullptr where it is used up.
unsigned char* take(size_t bytes) {
  static Space space;
  if (space.next == nullptr || bytes + GAP > static_cast<size_t>(space.end - space.next)) return nullptr;
  unsigned char* place = space.next;
  if (mprotect(place, bytes, PROT_READ | PROT_WRITE)) return nullptr;
  space.next += bytes + GAP;
  return place;
}

bool host_may_touch() {
  static const bool may = std::getenv("GEMMIFY_EMULATOR_HOST_ACCESS") != nullptr;
  return may;
}

void protect(const Allocation& a, bool open) {
  if (!host_may_touch()) mprotect(a.pages, a.page_bytes, open ? PROT_READ | PROT_WRITE : PROT_NONE);
}

// The allocation whose pages, or half of the gaps beside them, hold `pointer`; nullptr for none.
const Allocation* around(const void* pointer) {
  auto address = reinterpret_cast<uintptr_t>(pointer);
  auto found = allocations.lower_bound(address >= GAP / 2 ? address - GAP / 2 + 1 : 0);
  if (found == allocations.end()) return nullptr;
  const Allocation& a = found->second;
  return address + GAP / 2 >= reinterpret_cast<uintptr_t>(a.pages) ? &a : nullptr;
}

bool intact(const unsigned char* from, const unsigned char* to) {
  while (from < to && *from == POISON) ++from;
  return from == to;
}

int check(const Allocation& a) {
  bool before = intact(a.pages, a.data), behind = intact(a.data + a.bytes, a.end());
  if (before && behind) return SUCCESS;
  return complain(INVALID_VALUE, std::string("something was written ") + (before ? "behind" : "before") +
                                     " an allocation of " + std::to_string(a.bytes) + " bytes");
}

}  // namespace

int allocate(void** pointer, size_t bytes) {
  *pointer = nullptr;
  if (bytes == 0) return SUCCESS;
  if (total + bytes > board().memory)
    return complain(OUT_OF_MEMORY, std::to_string(bytes) + " bytes asked for, " +
                                       std::to_string(board().memory - total) + " left");
  size_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  size_t page_bytes = (rounded + page() - 1) / page() * page();
  unsigned char* pages = take(page_bytes);
  if (pages == nullptr)
    return complain(OUT_OF_MEMORY, "the host has no memory for " + std::to_string(bytes) + " bytes");
  Allocation a{pages, page_bytes, bytes, pages + page_bytes - rounded};
  std::memset(a.pages, POISON, page_bytes);
  protect(a, depth > 0);
  total += bytes;
  allocations[reinterpret_cast<uintptr_t>(a.end())] = a;
  *pointer = a.data;
  return SUCCESS;
}

int release(void* pointer) {
  if (pointer == nullptr) return SUCCESS;
  const Allocation* found = around(pointer);
  if (found == nullptr || found->data != pointer)
    return complain(INVALID_VALUE, "cudaFree of something that cudaMalloc has not returned");
  Allocation a = *found;
  int status;
  {
    Access access;
    status = check(a);
  }
  total -= a.bytes;
  forget(a.data);
  allocations.erase(reinterpret_cast<uintptr_t>(a.end()));
  // The pages go back to the system, their addresses are untouchable again.
  mmap(a.pages, a.page_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  if (status != SUCCESS) std::fprintf(stderr, "emulated GPU: %s\n", status_text(status));
  return status;
}

size_t allocated() { return total; }

bool is_device(const void* pointer) { return around(pointer) != nullptr; }

bool find_device(const void* pointer, Region* region) {
  const Allocation* a = around(pointer);
  if (a != nullptr) *region = {a->data, a->bytes, a->data, a->bytes};
  return a != nullptr;
}

int check_range(const void* pointer, size_t bytes, const char* what) {
  const Allocation* a = around(pointer);
  auto first = static_cast<const unsigned char*>(pointer);
  if (a != nullptr && first >= a->data && first + bytes <= a->data + a->bytes) return SUCCESS;
  return complain(INVALID_VALUE, std::string(what) + " of " + std::to_string(bytes) + " bytes at " + describe(pointer));
}

int check_guards() {
  Access access;
  for (const auto& [end, a] : allocations)
    if (int status = check(a)) return status;
  return SUCCESS;
}

std::string describe(const void* pointer) {
  char text[160];
  const Allocation* a = around(pointer);
  if (a == nullptr) {
    std::snprintf(text, sizeof text, "%p, which is not device memory", pointer);
  } else {
    auto offset = static_cast<const unsigned char*>(pointer) - a->data;
    std::snprintf(text, sizeof text, "byte %td of an allocation of %zu bytes", offset, a->bytes);
  }
  return text;
}

Access::Access() {
  if (depth++ == 0)
    for (const auto& [end, a] : allocations) protect(a, true);
}

Access::~Access() {
  if (--depth == 0)
    for (const auto& [end, a] : allocations) protect(a, false);
}

}  // namespace emulator

// For tests: 0 where no byte beside an allocation was written.
extern "C" int gemmify_emulator_check_guards() {
  std::lock_guard guard(emulator::lock());
  return emulator::check_guards();
}
