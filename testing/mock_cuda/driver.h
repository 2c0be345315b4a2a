// A CUDA driver without a GPU: a libcuda.so.1 whose device memory is the process's own, enough for cudarc and for the
// kernels of testing/simt. Written from the documentation of the driver API; no vendor header.
//
//   device memory   malloc of the exact size, filled with 0xFF: AddressSanitizer sees the first byte past it
//   a stream        a queue of operations, run as late as the API allows: when something waits for them
//   an event        a place in a stream
//   a capture       operations go to a graph instead of the queue; a launch of the graph enqueues them again
//
// Late streams show what a fast GPU hides: a result read before its stream was waited for, a host buffer that was
// freed too early, a missing event between streams. QUANTKV_MOCK_STREAMS=eager is the other extreme: every operation
// runs at once, whatever it should have waited for.
//
// What the API forbids is an error here too: calls without a context, copies outside an allocation, allocation and
// synchronisation during a capture, pageable memory in a capture.
#pragma once
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

namespace mock {

// CUresult, by the driver's numbers.
enum Result : int {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_CONTEXT = 201,
  INVALID_HANDLE = 400,
  NOT_READY = 600,
  LAUNCH_TIMEOUT = 702,
  HOST_MEMORY_ALREADY_REGISTERED = 712,
  HOST_MEMORY_NOT_REGISTERED = 713,
  MISALIGNED_ADDRESS = 716,
  LAUNCH_FAILED = 719,
  NOT_SUPPORTED = 801,
  STREAM_CAPTURE_UNSUPPORTED = 900,
  STREAM_CAPTURE_INVALIDATED = 901,
  STREAM_CAPTURE_UNMATCHED = 903,
  STREAM_CAPTURE_UNJOINED = 904,
  STREAM_CAPTURE_ISOLATION = 905,
  STREAM_CAPTURE_IMPLICIT = 906,
  CAPTURED_EVENT = 907,
};

using DevicePointer = uint64_t;

// Something a stream does. Shared: a graph keeps it and runs it many times.
using Operation = std::shared_ptr<std::function<Result()>>;

struct Graph {
  std::vector<Operation> operations; // in the order they were captured, which respects every dependency
};

enum CaptureMode : int { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };

struct Stream;

struct Capture {
  Stream *origin;
  CaptureMode mode;
  std::thread::id thread;
  bool invalid = false;
  Graph graph;
};

struct Stream {
  bool blocking = true; // orders itself with the default stream
  std::deque<Operation> pending;
  uint64_t enqueued = 0, done = 0;
  std::shared_ptr<Capture> capture;
};

struct Event {
  Stream *stream = nullptr; // null: never recorded
  uint64_t position = 0;    // happened once `position` operations of the stream are done
  std::chrono::steady_clock::time_point time;
  std::shared_ptr<Capture> capture; // recorded in a capture, not in time
};

// All of it, behind one lock: kernels, too, run while it is held.
struct Driver {
  std::recursive_mutex lock;
  bool initialized = false;
  bool eager = false;
  int primary_context_uses = 0;
  std::map<uintptr_t, size_t> device, pinned; // start -> bytes
  size_t device_bytes = 0, device_limit = 0;
  Stream default_stream;
  std::map<void *, std::unique_ptr<Stream>> streams;
  std::map<void *, std::shared_ptr<Event>> events;
  std::set<Capture *> captures;
  std::map<void *, std::unique_ptr<Graph>> graphs, executables;
};
extern Driver driver;

// Opens every call: takes the lock and checks what the call needs.
class Call {
public:
  enum Needs { NOTHING, DRIVER, CONTEXT };
  explicit Call(Needs needs = CONTEXT);
  // The call allocates or waits: forbidden while captures are under way that see this thread.
  Result unsafe_in_capture();
  Result result = SUCCESS;

private:
  std::lock_guard<std::recursive_mutex> guard_;
};

// ---- streams

Stream *find_stream(void *handle); // null: no such stream
Result enqueue(Stream &stream, std::function<Result()> run);
Result enqueue(Stream &stream, Operation operation);
// Runs the operations of a stream, all or up to a position, and what they wait for. The first error.
Result drain(Stream &stream, uint64_t position = UINT64_MAX);
Result drain_all();
// What cannot be captured was tried: the capture is lost.
Result forbid_in_capture(Stream &stream, const char *what);

// ---- memory

bool is_device(const void *address, size_t bytes);
bool is_pinned(const void *address, size_t bytes);
void free_all_device_memory();

} // namespace mock

#define DRIVER_API extern "C" __attribute__((visibility("default"))) int
