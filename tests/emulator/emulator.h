// What the parts of the emulated CUDA driver share. All of it lives in libcuda.so.1; libcudart.so.13 calls into it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

namespace emulator {

// Status codes of the driver API; those of the runtime API have the same numbers.
enum Status : int {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  NO_BINARY_FOR_GPU = 209,
  NOT_FOUND = 500,
  ILLEGAL_ADDRESS = 700,
  LAUNCH_FAILED = 719,
  NOT_SUPPORTED = 801,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_INVALIDATED = 901,
  CAPTURE_IMPLICIT = 906,
};

const char* status_name(int status);
const char* status_text(int status);
// What went wrong last, in a sentence; status_text appends it. `complain` returns `status`.
int complain(int status, std::string why);

// The emulated board, from the environment (README.md): read once.
struct Board {
  int devices, major, minor, multiprocessors, l2_bytes;
  size_t memory, shared_optin;
};
const Board& board();

// One lock around every entry: a device does one thing at a time here.
std::recursive_mutex& lock();

// Device memory (memory.cpp): between pages that nothing may touch, full of 0xFF, and reachable only inside `Access`.
int allocate(void** pointer, size_t bytes);
int release(void* pointer);
size_t allocated();
// Status of an access of `bytes` at `pointer`; the reason is left for status_text.
int check_range(const void* pointer, size_t bytes, const char* what);
bool is_device(const void* pointer);
// INVALID_VALUE and a reason where poison beside an allocation has changed.
int check_guards();
std::string describe(const void* pointer);
// The allocation that an access of `pointer` means, its gaps included; false where it is none.
struct Region {
  const void* data;
  size_t bytes;
  const void* origin;  // of the memory, `span` bytes, that it is a part of for as long as the process lives
  size_t span;
};
bool find_device(const void* pointer, Region* region);

struct Access {
  Access();
  ~Access();
  Access(const Access&) = delete;
};

// Launches (block.cpp).
struct Dim {
  unsigned x, y, z;
};
struct Launch {
  void (*entry)(void**);
  void** arguments;
  Dim grid, block;
  size_t shared_bytes;
  const char* name;
  bool watched;  // Compiled so that it tells of every access (races.cpp).
};
int run(const Launch& launch);
void set_order(unsigned seed);

// Streams and graphs (streams.cpp). A null stream is the default one.
struct Graph {
  std::vector<std::function<int()>> work;
};
struct Stream {
  Graph* capture = nullptr;
  bool broken = false;
};
// Do `work` now, or record it where `stream` is being captured.
int enqueue(Stream* stream, std::function<int()> work);
int begin_capture(Stream* stream);
int end_capture(Stream* stream, Graph** graph);
// CAPTURE_UNSUPPORTED, and the capture broken, where some stream is being captured.
int outside_capture(const char* what);

}  // namespace emulator
