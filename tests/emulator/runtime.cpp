// libcudart.so.13: the functions of CUDA's runtime API that TVM's runtime calls, on the emulated driver.
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "emulator.h"

using namespace emulator;

namespace {

thread_local int last_error = SUCCESS;
thread_local int current_device = 0;

int report(int status) {
  if (status != SUCCESS) last_error = status;
  return status;
}

struct Event {
  std::chrono::steady_clock::time_point time;
};

// Layout of cudaDeviceProp in CUDA 13, as far as it is filled.
constexpr size_t PROPERTIES_BYTES = 1008, TOTAL_MEMORY = 288, SHARED_MEMORY = 296;
constexpr size_t MAJOR = 360, MINOR = 364, L2_BYTES = 596;

int copy(void* to, const void* from, size_t bytes, int kind) {
  constexpr int HOST_TO_HOST = 0, HOST_TO_DEVICE = 1, DEVICE_TO_HOST = 2, DEVICE_TO_DEVICE = 3, BY_ADDRESS = 4;
  if (bytes == 0) return SUCCESS;
  bool to_device = kind == HOST_TO_DEVICE || kind == DEVICE_TO_DEVICE || (kind == BY_ADDRESS && is_device(to));
  bool from_device = kind == DEVICE_TO_HOST || kind == DEVICE_TO_DEVICE || (kind == BY_ADDRESS && is_device(from));
  if (kind < HOST_TO_HOST || kind > BY_ADDRESS) return complain(INVALID_VALUE, "a copy of an unknown kind");
  if (to_device != is_device(to) || from_device != is_device(from))
    return complain(INVALID_VALUE, "a copy between host and device was given the pointer of the other");
  if (to_device)
    if (int status = check_range(to, bytes, "copy to the device")) return status;
  if (from_device)
    if (int status = check_range(from, bytes, "copy from the device")) return status;
  Access access;
  std::memmove(to, from, bytes);
  return SUCCESS;
}

int attribute(int which) {
  switch (which) {
    case 1: case 2: case 3: return 1024;               // threads of a block, and its first two dimensions
    case 4: return 64;
    case 5: return 2147483647;
    case 6: case 7: return 65535;
    case 8: return 48 << 10;                           // shared memory of a block without opting in
    case 10: return 32;                                // warp
    case 12: case 82: return 65536;                    // registers of a block, of a multiprocessor
    case 13: return 1980000;                           // kHz
    case 16: return board().multiprocessors;
    case 38: return board().l2_bytes;
    case 39: return board().major == 7 ? 1024 : board().major == 8 && board().minor ? 1536 : 2048;
    case 75: return board().major;
    case 76: return board().minor;
    case 97: return static_cast<int>(board().shared_optin);
    default: return -1;
  }
}

}  // namespace

#define ENTRY std::lock_guard guard(lock())
#define NOT_IN_CAPTURE(name) \
  if (int status = outside_capture(name)) return report(status)

extern "C" {

const char* cudaGetErrorName(int status) { return status_name(status); }
const char* cudaGetErrorString(int status) { return status_text(status); }
int cudaPeekAtLastError() { return last_error; }
int cudaGetLastError() {
  int error = last_error;
  last_error = SUCCESS;
  return error;
}

int cudaRuntimeGetVersion(int* version) { return *version = 13000, SUCCESS; }
int cudaDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
int cudaGetDeviceCount(int* count) {
  *count = board().devices;
  return report(*count > 0 ? SUCCESS : NO_DEVICE);
}
int cudaGetDevice(int* device) { return *device = current_device, report(board().devices > 0 ? SUCCESS : NO_DEVICE); }
int cudaSetDevice(int device) {
  if (board().devices == 0) return report(NO_DEVICE);
  if (device < 0 || device >= board().devices) return report(INVALID_DEVICE);
  current_device = device;
  return SUCCESS;
}
int cudaDeviceGetAttribute(int* value, int which, int device) {
  if (device < 0 || device >= board().devices) return report(INVALID_DEVICE);
  *value = attribute(which);
  if (*value >= 0) return SUCCESS;
  return report(complain(INVALID_VALUE, "the emulator knows no device attribute " + std::to_string(which)));
}
int cudaGetDeviceProperties(void* properties, int device) {
  if (device < 0 || device >= board().devices) return report(INVALID_DEVICE);
  auto bytes = static_cast<char*>(properties);
  std::memset(bytes, 0, PROPERTIES_BYTES);
  std::strcpy(bytes, "gemmify emulator");
  std::memcpy(bytes + TOTAL_MEMORY, &board().memory, sizeof(size_t));
  size_t shared = 48 << 10;
  std::memcpy(bytes + SHARED_MEMORY, &shared, sizeof shared);
  std::memcpy(bytes + MAJOR, &board().major, sizeof(int));
  std::memcpy(bytes + MINOR, &board().minor, sizeof(int));
  std::memcpy(bytes + L2_BYTES, &board().l2_bytes, sizeof(int));
  return SUCCESS;
}
int cudaDeviceSynchronize() {
  ENTRY;
  NOT_IN_CAPTURE("cudaDeviceSynchronize");
  return SUCCESS;
}

int cudaMalloc(void** pointer, size_t bytes) {
  ENTRY;
  if (board().devices == 0) return report(NO_DEVICE);
  NOT_IN_CAPTURE("cudaMalloc");
  return report(allocate(pointer, bytes));
}
int cudaFree(void* pointer) {
  ENTRY;
  NOT_IN_CAPTURE("cudaFree");
  return report(release(pointer));
}
int cudaMallocHost(void** pointer, size_t bytes) {
  if (posix_memalign(pointer, 4096, bytes ? bytes : 1)) return report(OUT_OF_MEMORY);
  std::memset(*pointer, 0xFF, bytes);
  return SUCCESS;
}
int cudaFreeHost(void* pointer) { return std::free(pointer), SUCCESS; }
int cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  ENTRY;
  if (board().devices == 0) return report(NO_DEVICE);
  *total = board().memory;
  *free_bytes = *total - allocated();
  return SUCCESS;
}
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, Stream* stream) {
  ENTRY;
  return report(enqueue(stream, [=] { return copy(to, from, bytes, kind); }));
}
int cudaMemcpy(void* to, const void* from, size_t bytes, int kind) {
  ENTRY;
  NOT_IN_CAPTURE("cudaMemcpy");
  return report(copy(to, from, bytes, kind));
}
int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, Stream* stream) {
  return cudaMemcpyAsync(to, from, bytes, 3, stream);
}
int cudaMemsetAsync(void* to, int value, size_t bytes, Stream* stream) {
  ENTRY;
  return report(enqueue(stream, [=] {
    if (int status = check_range(to, bytes, "memset")) return status;
    Access access;
    std::memset(to, value, bytes);
    return static_cast<int>(SUCCESS);
  }));
}

int cudaStreamCreate(Stream** stream) { return *stream = new Stream, SUCCESS; }
int cudaStreamCreateWithFlags(Stream** stream, unsigned) { return cudaStreamCreate(stream); }
int cudaStreamDestroy(Stream* stream) { return delete stream, SUCCESS; }
int cudaStreamSynchronize(Stream*) {
  ENTRY;
  NOT_IN_CAPTURE("cudaStreamSynchronize");
  return SUCCESS;
}
int cudaStreamWaitEvent(Stream*, Event*, unsigned) { return SUCCESS; }
int cudaStreamBeginCapture(Stream* stream, int) {
  ENTRY;
  return report(begin_capture(stream));
}
int cudaStreamEndCapture(Stream* stream, Graph** graph) {
  ENTRY;
  return report(end_capture(stream, graph));
}
int cudaGraphInstantiate(Graph** executable, Graph* graph, unsigned long long) {
  return *executable = new Graph(*graph), SUCCESS;
}
int cudaGraphLaunch(Graph* executable, Stream* stream) {
  ENTRY;
  for (const auto& work : executable->work)
    if (int status = enqueue(stream, work)) return report(status);
  return SUCCESS;
}
int cudaGraphDestroy(Graph* graph) { return delete graph, SUCCESS; }
int cudaGraphExecDestroy(Graph* executable) { return delete executable, SUCCESS; }

int cudaEventCreate(Event** event) { return *event = new Event, SUCCESS; }
int cudaEventDestroy(Event* event) { return delete event, SUCCESS; }
int cudaEventRecord(Event* event, Stream* stream) {
  ENTRY;
  return report(enqueue(stream, [=] {
    event->time = std::chrono::steady_clock::now();
    return static_cast<int>(SUCCESS);
  }));
}
int cudaEventSynchronize(Event*) {
  ENTRY;
  NOT_IN_CAPTURE("cudaEventSynchronize");
  return SUCCESS;
}
int cudaEventElapsedTime(float* milliseconds, Event* start, Event* stop) {
  *milliseconds = std::chrono::duration<float, std::milli>(stop->time - start->time).count();
  return SUCCESS;
}

}  // extern "C"
