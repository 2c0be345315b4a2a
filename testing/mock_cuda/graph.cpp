// Stream capture and graphs. A stream joins a capture by waiting for an event that was recorded in it.
#include "driver.h"

using namespace mock;

DRIVER_API cuStreamBeginCapture_v2(void *handle, int mode) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  Stream *stream = find_stream(handle);
  if (stream == nullptr) return INVALID_HANDLE;
  // The default stream cannot be captured; nor can a stream twice.
  if (stream == &driver.default_stream || stream->capture != nullptr) return STREAM_CAPTURE_UNSUPPORTED;
  if (mode < GLOBAL || mode > RELAXED) return INVALID_VALUE;
  auto capture = std::make_shared<Capture>();
  capture->origin = stream;
  capture->mode = static_cast<CaptureMode>(mode);
  capture->thread = std::this_thread::get_id();
  driver.captures.insert(capture.get());
  stream->capture = std::move(capture);
  return SUCCESS;
}

DRIVER_API cuStreamEndCapture(void *handle, void **graph_handle) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  *graph_handle = nullptr;
  Stream *stream = find_stream(handle);
  if (stream == nullptr) return INVALID_HANDLE;
  const std::shared_ptr<Capture> capture = stream->capture;
  if (capture == nullptr || capture->origin != stream) return STREAM_CAPTURE_UNMATCHED;
  driver.captures.erase(capture.get());
  for (auto &[other_handle, other] : driver.streams) {
    if (other->capture == capture) other->capture = nullptr;
  }
  if (capture->invalid) return STREAM_CAPTURE_INVALIDATED;
  auto graph = std::make_unique<Graph>(std::move(capture->graph));
  *graph_handle = graph.get();
  driver.graphs[*graph_handle] = std::move(graph);
  return SUCCESS;
}

DRIVER_API cuStreamIsCapturing(void *handle, int *status) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  const Stream *stream = find_stream(handle);
  if (stream == nullptr) return INVALID_HANDLE;
  *status = stream->capture == nullptr ? 0 : stream->capture->invalid ? 2 : 1;
  return SUCCESS;
}

// How many operations a graph has; their handles are not given out.
DRIVER_API cuGraphGetNodes(void *handle, void **nodes, size_t *count) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  const auto found = driver.graphs.find(handle);
  if (found == driver.graphs.end()) return INVALID_HANDLE;
  if (nodes != nullptr) return NOT_SUPPORTED;
  *count = found->second->operations.size();
  return SUCCESS;
}

DRIVER_API cuGraphInstantiateWithFlags(void **executable, void *handle, unsigned long long flags) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  const auto found = driver.graphs.find(handle);
  if (found == driver.graphs.end()) return INVALID_HANDLE;
  constexpr unsigned long long kFreeOnLaunch = 1, kDeviceLaunch = 4;
  if ((flags & kFreeOnLaunch) && (flags & kDeviceLaunch)) return INVALID_VALUE;
  auto copy = std::make_unique<Graph>(*found->second);
  *executable = copy.get();
  driver.executables[*executable] = std::move(copy);
  return SUCCESS;
}

DRIVER_API cuGraphLaunch(void *executable, void *stream_handle) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  const auto found = driver.executables.find(executable);
  Stream *stream = find_stream(stream_handle);
  if (found == driver.executables.end() || stream == nullptr) return INVALID_HANDLE;
  for (const Operation &operation : found->second->operations) {
    if (const Result result = enqueue(*stream, operation)) return result;
  }
  return SUCCESS;
}

DRIVER_API cuGraphUpload(void *executable, void *) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  return driver.executables.count(executable) ? SUCCESS : INVALID_HANDLE;
}

DRIVER_API cuGraphDestroy(void *graph) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  return driver.graphs.erase(graph) == 1 ? SUCCESS : INVALID_HANDLE;
}

DRIVER_API cuGraphExecDestroy(void *executable) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  return driver.executables.erase(executable) == 1 ? SUCCESS : INVALID_HANDLE;
}
