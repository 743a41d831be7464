// Streams and graphs: work is done at once, or recorded while its stream is captured, and replayed in order.
#include "emulator.h"

namespace emulator {
namespace {

Stream* capturing = nullptr;  // Capture is global, as TVM asks for it: one at a time.

}  // namespace

int enqueue(Stream* stream, std::function<int()> work) {
  if (stream != nullptr && stream->capture != nullptr) {
    stream->capture->work.push_back(std::move(work));
    return SUCCESS;
  }
  if (capturing != nullptr) {
    capturing->broken = true;
    return complain(CAPTURE_IMPLICIT, "work went to another stream than the one that is being captured");
  }
  return work();
}

int begin_capture(Stream* stream) {
  if (stream == nullptr) return complain(CAPTURE_UNSUPPORTED, "the default stream cannot be captured");
  if (capturing != nullptr) return complain(CAPTURE_UNSUPPORTED, "another capture is under way");
  stream->capture = new Graph;
  stream->broken = false;
  capturing = stream;
  return SUCCESS;
}

int end_capture(Stream* stream, Graph** graph) {
  *graph = nullptr;
  if (stream == nullptr || stream->capture == nullptr)
    return complain(INVALID_VALUE, "the stream is not being captured");
  Graph* captured = stream->capture;
  stream->capture = nullptr;
  capturing = nullptr;
  if (stream->broken) {
    delete captured;
    return complain(CAPTURE_INVALIDATED, "something was called that a capture does not allow");
  }
  *graph = captured;
  return SUCCESS;
}

int outside_capture(const char* what) {
  if (capturing == nullptr) return SUCCESS;
  capturing->broken = true;
  return complain(CAPTURE_UNSUPPORTED, std::string(what) + " while a stream is being captured");
}

}  // namespace emulator
