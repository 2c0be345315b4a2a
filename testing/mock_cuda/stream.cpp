// Streams and events.
#include "driver.h"

#include <cstdio>

namespace mock {

// The handles of the default stream; the per-thread one is not told apart.
static bool is_default(void *handle) { return reinterpret_cast<uintptr_t>(handle) <= 2; }

Stream *find_stream(void *handle) {
  if (is_default(handle)) return &driver.default_stream;
  const auto found = driver.streams.find(handle);
  return found == driver.streams.end() ? nullptr : found->second.get();
}

Result drain(Stream &stream, uint64_t position) {
  Result first = SUCCESS;
  while (stream.done < position && !stream.pending.empty()) {
    const Operation operation = stream.pending.front();
    stream.pending.pop_front();
    stream.done++;
    const Result result = (*operation)();
    if (first == SUCCESS) first = result;
  }
  return first;
}

Result drain_all() {
  Result first = drain(driver.default_stream);
  for (auto &[handle, stream] : driver.streams) {
    const Result result = drain(*stream);
    if (first == SUCCESS) first = result;
  }
  return first;
}

static Operation operation_of(std::function<Result()> run) {
  return std::make_shared<std::function<Result()>>(std::move(run));
}

// What is enqueued on `later` from now on waits for what is on `earlier`.
static void order(Stream &earlier, Stream &later) {
  if (earlier.pending.empty()) return;
  later.pending.push_back(operation_of([&earlier, position = earlier.enqueued] { return drain(earlier, position); }));
  later.enqueued++;
}

Result enqueue(Stream &stream, Operation operation) {
  if (stream.capture != nullptr) {
    if (stream.capture->invalid) return STREAM_CAPTURE_INVALIDATED;
    stream.capture->graph.operations.push_back(std::move(operation));
    return SUCCESS;
  }
  // The default stream and the blocking ones wait for each other.
  if (&stream == &driver.default_stream) {
    for (auto &[handle, other] : driver.streams) {
      if (!other->blocking) continue;
      if (other->capture != nullptr) {
        other->capture->invalid = true;
        return STREAM_CAPTURE_IMPLICIT;
      }
      order(*other, stream);
    }
  } else if (stream.blocking) {
    order(driver.default_stream, stream);
  }
  stream.pending.push_back(std::move(operation));
  stream.enqueued++;
  return driver.eager ? drain(stream) : SUCCESS;
}

Result enqueue(Stream &stream, std::function<Result()> run) { return enqueue(stream, operation_of(std::move(run))); }

Result forbid_in_capture(Stream &stream, const char *what) {
  if (stream.capture == nullptr) return SUCCESS;
  fprintf(stderr, "mock driver: %s in a stream capture\n", what);
  stream.capture->invalid = true;
  return STREAM_CAPTURE_UNSUPPORTED;
}

} // namespace mock

using namespace mock;

// ---- streams

DRIVER_API cuStreamCreate(void **handle, unsigned flags) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  constexpr unsigned kNonBlocking = 1;
  if (flags > kNonBlocking) return INVALID_VALUE;
  auto stream = std::make_unique<Stream>();
  stream->blocking = flags != kNonBlocking;
  *handle = stream.get();
  driver.streams[*handle] = std::move(stream);
  return SUCCESS;
}

DRIVER_API cuStreamCreateWithPriority(void **handle, unsigned flags, int) { return cuStreamCreate(handle, flags); }

DRIVER_API cuStreamDestroy_v2(void *handle) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  const auto found = driver.streams.find(handle);
  if (found == driver.streams.end()) return INVALID_HANDLE;
  // Work that is under way goes on; nobody is told of its errors.
  drain_all();
  for (auto &[other, event] : driver.events) {
    if (event->stream == found->second.get()) *event = Event{};
  }
  driver.streams.erase(found);
  return SUCCESS;
}

DRIVER_API cuStreamSynchronize(void *handle) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  Stream *stream = find_stream(handle);
  if (stream == nullptr) return INVALID_HANDLE;
  if (const Result result = forbid_in_capture(*stream, "synchronisation")) return result;
  if (is_default(handle)) {
    enqueue(*stream, [] { return SUCCESS; }); // for its order with the blocking streams
  }
  return drain(*stream);
}

// Each question lets the stream do one more thing, so that whoever polls gets there.
DRIVER_API cuStreamQuery(void *handle) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  Stream *stream = find_stream(handle);
  if (stream == nullptr) return INVALID_HANDLE;
  if (const Result result = forbid_in_capture(*stream, "a query")) return result;
  const Result result = drain(*stream, stream->done + 1);
  return result != SUCCESS ? result : stream->pending.empty() ? SUCCESS : NOT_READY;
}

DRIVER_API cuStreamWaitEvent(void *handle, void *event_handle, unsigned) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  Stream *stream = find_stream(handle);
  const auto found = driver.events.find(event_handle);
  if (stream == nullptr || found == driver.events.end()) return INVALID_HANDLE;
  const Event &event = *found->second;
  if (event.capture != nullptr) { // joins that capture; a graph's order is the order of capture
    if (driver.captures.count(event.capture.get()) == 0) return CAPTURED_EVENT;
    if (stream->capture != nullptr && stream->capture != event.capture) return STREAM_CAPTURE_ISOLATION;
    stream->capture = event.capture;
    return SUCCESS;
  }
  if (event.stream == nullptr) return SUCCESS;
  if (stream->capture != nullptr) {
    stream->capture->invalid = true;
    return STREAM_CAPTURE_ISOLATION;
  }
  return enqueue(*stream, [source = event.stream, position = event.position] { return drain(*source, position); });
}

DRIVER_API cuLaunchHostFunc(void *handle, void (*function)(void *), void *argument) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  Stream *stream = find_stream(handle);
  if (stream == nullptr) return INVALID_HANDLE;
  return enqueue(*stream, [=] { return function(argument), SUCCESS; });
}

// A launch of the shim (testing/simt/device.cpp): the operation is run once or, from a graph, many times, and dropped
// when nothing can run it any more. `run` answers a CUresult.
DRIVER_API quantkv_mock_enqueue(void *handle, int (*run)(void *), void (*drop)(void *), void *work) {
  const std::shared_ptr<void> owned(work, drop);
  Call call(Call::NOTHING); // the runtime binds the primary context by itself
  Stream *stream = find_stream(handle);
  if (stream == nullptr) return INVALID_HANDLE;
  return enqueue(*stream, [run, owned] { return static_cast<Result>(run(owned.get())); });
}

// ---- events

DRIVER_API cuEventCreate(void **handle, unsigned) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  auto event = std::make_shared<Event>();
  *handle = event.get();
  driver.events[*handle] = std::move(event);
  return SUCCESS;
}

DRIVER_API cuEventDestroy_v2(void *handle) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  return driver.events.erase(handle) == 1 ? SUCCESS : INVALID_HANDLE;
}

DRIVER_API cuEventRecord(void *handle, void *stream_handle) {
  Call call;
  if (call.result != SUCCESS) return call.result;
  Stream *stream = find_stream(stream_handle);
  const auto found = driver.events.find(handle);
  if (stream == nullptr || found == driver.events.end()) return INVALID_HANDLE;
  const std::shared_ptr<Event> event = found->second;
  *event = Event{};
  event->capture = stream->capture;
  if (event->capture != nullptr) return event->capture->invalid ? STREAM_CAPTURE_INVALIDATED : SUCCESS;
  const Result result = enqueue(*stream, [event] {
    event->time = std::chrono::steady_clock::now();
    return SUCCESS;
  });
  event->stream = stream;
  event->position = stream->enqueued;
  return result;
}

// The event behind a handle, for calls that look at its time.
static Result timed_event(Call &call, void *handle, Event *&event) {
  if (call.result != SUCCESS) return call.result;
  const auto found = driver.events.find(handle);
  if (found == driver.events.end()) return INVALID_HANDLE;
  event = found->second.get();
  return event->capture != nullptr ? CAPTURED_EVENT : SUCCESS;
}

DRIVER_API cuEventSynchronize(void *handle) {
  Call call;
  Event *event = nullptr;
  if (const Result result = timed_event(call, handle, event)) return result;
  if (call.unsafe_in_capture() != SUCCESS) return call.result;
  return event->stream == nullptr ? SUCCESS : drain(*event->stream, event->position);
}

DRIVER_API cuEventQuery(void *handle) {
  Call call;
  Event *event = nullptr;
  if (const Result result = timed_event(call, handle, event)) return result;
  if (call.unsafe_in_capture() != SUCCESS) return call.result;
  if (event->stream == nullptr || event->stream->done >= event->position) return SUCCESS;
  const Result result = drain(*event->stream, event->stream->done + 1);
  return result != SUCCESS ? result : event->stream->done >= event->position ? SUCCESS : NOT_READY;
}

DRIVER_API cuEventElapsedTime_v2(float *milliseconds, void *start, void *end) {
  Call call;
  Event *from = nullptr, *to = nullptr;
  if (const Result result = timed_event(call, start, from)) return result;
  if (const Result result = timed_event(call, end, to)) return result;
  if (from->stream == nullptr || to->stream == nullptr) return INVALID_HANDLE;
  if (from->stream->done < from->position || to->stream->done < to->position) return NOT_READY;
  *milliseconds = std::chrono::duration<float, std::milli>(to->time - from->time).count();
  return SUCCESS;
}
DRIVER_API cuEventElapsedTime(float *milliseconds, void *start, void *end) {
  return cuEventElapsedTime_v2(milliseconds, start, end);
}
