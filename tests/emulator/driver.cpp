// libcuda.so.1: modules, functions and launches of CUDA's driver API. A module's image is a shared object that g++ has
// made of a kernel's CUDA text, behind a header that says for which architectures it may be loaded.
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>

#include "emulator.h"

namespace emulator {
namespace {

// "GEMMIFYE", bytes of the image, number of architectures, each as 10 * major + minor; then the image. Little endian.
constexpr char MAGIC[] = "GEMMIFYE";
constexpr size_t MAGIC_BYTES = 8;
constexpr int MAX_DYNAMIC_SHARED = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

struct Function {
  std::string name;
  void (*entry)(void**);
  const size_t* sizes;  // of the arguments, ended by 0
  unsigned max_threads;
  bool watched;
  size_t shared_limit = 48 << 10;
};

struct Module {
  void* library;
  std::vector<std::unique_ptr<Function>> functions;
};

struct LaunchConfig {  // CUlaunchConfig
  Dim grid, block;
  unsigned shared_bytes;
  Stream* stream;
  void* attributes;
  unsigned attribute_count;
};

int environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr && *text ? std::atoi(text) : otherwise;
}

bool runs_here(int arch) {  // Machine code runs on its own major version, from its minor version on.
  return arch / 10 == board().major && arch % 10 <= board().minor;
}

// From a file that is gone as soon as it is mapped. Its name is a new one each time: dlopen returns what it has loaded
// by a name already, as it would for /proc/self/fd/N of two images.
void* open_image(const char* image, size_t bytes) {
  const char* folder = std::getenv("TMPDIR");
  std::string path = std::string(folder != nullptr && *folder ? folder : "/tmp") + "/gemmify-kernel-XXXXXX";
  int file = mkstemp(path.data());
  if (file < 0) return nullptr;
  for (size_t done = 0; done < bytes;) {
    ssize_t wrote = write(file, image + done, bytes - done);
    if (wrote <= 0) break;
    done += wrote;
  }
  close(file);
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  unlink(path.c_str());
  return library;
}

int check_launch(const LaunchConfig& config, const Function& function) {
  const Dim &g = config.grid, &b = config.block;
  size_t threads = size_t(b.x) * b.y * b.z;
  if (threads == 0 || threads > 1024 || b.z > 64 || size_t(g.x) * g.y * g.z == 0 || g.y > 65535 || g.z > 65535)
    return complain(INVALID_VALUE, "a grid or block of impossible size");
  if (threads > function.max_threads)
    return complain(INVALID_VALUE, std::to_string(threads) + " threads a block, __launch_bounds__ promised " +
                                       std::to_string(function.max_threads));
  if (config.shared_bytes > function.shared_limit)
    return complain(INVALID_VALUE, std::to_string(config.shared_bytes) + " bytes of shared memory, allowed are " +
                                       std::to_string(function.shared_limit));
  if (config.attribute_count > 0) return complain(NOT_SUPPORTED, "launch attributes are not emulated");
  return SUCCESS;
}

thread_local std::string last_complaint;

}  // namespace

const char* status_name(int status) {
  switch (status) {
    case SUCCESS: return "CUDA_SUCCESS";
    case INVALID_VALUE: return "CUDA_ERROR_INVALID_VALUE";
    case OUT_OF_MEMORY: return "CUDA_ERROR_OUT_OF_MEMORY";
    case NO_DEVICE: return "CUDA_ERROR_NO_DEVICE";
    case INVALID_DEVICE: return "CUDA_ERROR_INVALID_DEVICE";
    case INVALID_IMAGE: return "CUDA_ERROR_INVALID_IMAGE";
    case NO_BINARY_FOR_GPU: return "CUDA_ERROR_NO_BINARY_FOR_GPU";
    case NOT_FOUND: return "CUDA_ERROR_NOT_FOUND";
    case ILLEGAL_ADDRESS: return "CUDA_ERROR_ILLEGAL_ADDRESS";
    case LAUNCH_FAILED: return "CUDA_ERROR_LAUNCH_FAILED";
    case NOT_SUPPORTED: return "CUDA_ERROR_NOT_SUPPORTED";
    case CAPTURE_UNSUPPORTED: return "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED";
    case CAPTURE_INVALIDATED: return "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED";
    case CAPTURE_IMPLICIT: return "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT";
    default: return "CUDA_ERROR_UNKNOWN";
  }
}

const char* status_text(int status) {
  thread_local std::string text;
  text = status_name(status);
  if (status != SUCCESS && !last_complaint.empty()) text += ": " + last_complaint;
  return text.c_str();
}

int complain(int status, std::string why) {
  last_complaint = std::move(why);
  return status;
}

namespace {

// `capability` as 10 * major + minor.
Board board_of(int capability) {
  bool large = capability == 80 || capability == 87;
  size_t kib = capability == 75 ? 64 : large ? 163 : capability / 10 == 8 || capability / 10 == 12 ? 99 : 227;
  size_t memory = size_t(environment("GEMMIFY_EMULATOR_MEMORY_MIB", 32 << 10)) << 20;
  int devices = environment("GEMMIFY_EMULATOR_DEVICES", 1);
  return {devices, capability / 10, capability % 10, 132, 50 << 20, memory, kib << 10};
}

Board& mutable_board() {
  static Board instance = board_of(environment("GEMMIFY_EMULATOR_CAPABILITY", 90));
  return instance;
}

}  // namespace

const Board& board() { return mutable_board(); }

std::recursive_mutex& lock() {
  static std::recursive_mutex instance;
  return instance;
}

}  // namespace emulator

using namespace emulator;

extern "C" {

// For tests: why the last call failed that did.
const char* gemmify_emulator_last_error() { return last_complaint.c_str(); }
// For tests: from now on the device is another one.
void gemmify_emulator_set_capability(int capability) { mutable_board() = board_of(capability); }

int cuInit(unsigned) { return board().devices > 0 ? SUCCESS : NO_DEVICE; }
int cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
int cuDeviceGetCount(int* count) { return *count = board().devices, SUCCESS; }
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal >= 0 && ordinal < board().devices ? SUCCESS : INVALID_DEVICE;
}
int cuDeviceGetName(char* name, int bytes, int) {
  std::strncpy(name, "gemmify emulator", bytes - 1);
  name[bytes - 1] = 0;
  return SUCCESS;
}
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = board().memory, SUCCESS; }
int cuDeviceGetAttribute(int* value, int which, int device) {
  if (device < 0 || device >= board().devices) return INVALID_DEVICE;
  if (which == 75 || which == 76) return *value = which == 75 ? board().major : board().minor, SUCCESS;
  if (which == 16) return *value = board().multiprocessors, SUCCESS;
  return complain(INVALID_VALUE, "the emulator knows no device attribute " + std::to_string(which));
}
int cuGetErrorName(int status, const char** text) { return *text = status_text(status), SUCCESS; }
int cuGetErrorString(int status, const char** text) { return *text = status_text(status), SUCCESS; }
int cuTensorMapEncodeTiled() { return complain(NOT_SUPPORTED, "tensor maps are not emulated"); }

int cuModuleLoadData(Module** module, const char* image) {
  std::lock_guard guard(lock());
  if (int status = outside_capture("cuModuleLoadData")) return status;
  if (std::memcmp(image, MAGIC, MAGIC_BYTES) != 0)
    return complain(INVALID_IMAGE, "the module was not compiled for the emulator (by its tvm_callback_cuda_compile)");
  uint64_t bytes;
  uint32_t count;
  std::memcpy(&bytes, image + MAGIC_BYTES, sizeof bytes);
  std::memcpy(&count, image + MAGIC_BYTES + sizeof bytes, sizeof count);
  const char* place = image + MAGIC_BYTES + sizeof bytes + sizeof count;
  std::vector<int32_t> archs(count);
  std::memcpy(archs.data(), place, count * sizeof(int32_t));
  if (!std::any_of(archs.begin(), archs.end(), runs_here))
    return complain(NO_BINARY_FOR_GPU, "no kernel image for sm_" + std::to_string(board().major * 10 + board().minor));
  void* library = open_image(place + count * sizeof(int32_t), bytes);
  if (library == nullptr) {
    const char* why = dlerror();
    return complain(INVALID_IMAGE, why != nullptr ? why : "no temporary file can be made");
  }
  *module = new Module{library, {}};
  return SUCCESS;
}

int cuModuleUnload(Module* module) {
  std::lock_guard guard(lock());
  dlclose(module->library);
  delete module;
  return SUCCESS;
}

int cuModuleGetFunction(Function** function, Module* module, const char* name) {
  std::lock_guard guard(lock());
  std::string text = name;
  auto find = [&](const char* suffix) { return dlsym(module->library, (text + suffix).c_str()); };
  void* entry = find("__entry");
  if (entry == nullptr) return complain(NOT_FOUND, "the module has no kernel " + text);
  module->functions.push_back(std::unique_ptr<Function>(
      new Function{text, reinterpret_cast<void (*)(void**)>(entry), static_cast<const size_t*>(find("__sizes")),
                   *static_cast<const unsigned*>(find("__max_threads")), find("__watched") != nullptr}));
  *function = module->functions.back().get();
  return SUCCESS;
}

int cuFuncSetAttribute(Function* function, int which, int value) {
  if (which != MAX_DYNAMIC_SHARED)
    return complain(NOT_SUPPORTED, "function attribute " + std::to_string(which) + " is not emulated");
  if (value < 0 || size_t(value) > board().shared_optin)
    return complain(INVALID_VALUE, std::to_string(value) + " bytes of shared memory, a block may have " +
                                       std::to_string(board().shared_optin));
  function->shared_limit = std::max<size_t>(value, function->shared_limit);
  return SUCCESS;
}

int cuLaunchKernelEx(const LaunchConfig* config, Function* function, void** arguments, void**) {
  std::lock_guard guard(lock());
  if (int status = check_launch(*config, *function)) return status;
  // A graph replays the launch with the arguments' values of today.
  auto values = std::make_shared<std::vector<std::vector<char>>>();
  for (size_t i = 0; function->sizes[i] != 0; ++i) {
    auto from = static_cast<const char*>(arguments[i]);
    values->emplace_back(from, from + function->sizes[i]);
  }
  LaunchConfig copy = *config;
  return enqueue(config->stream, [=] {
    std::vector<void*> pointers;
    for (auto& value : *values) pointers.push_back(value.data());
    return run({function->entry, pointers.data(), copy.grid, copy.block, copy.shared_bytes, function->name.c_str(),
                function->watched});
  });
}

}  // extern "C"
