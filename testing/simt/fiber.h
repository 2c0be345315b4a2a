// Fibers: flows of control that take turns on one OS thread, each on a stack of its own.
//
// The scheduler resumes a fiber; the fiber runs until it yields or its function returns, and the scheduler goes on
// behind resume(). x86-64 switches stacks with a dozen instructions, other machines with ucontext. AddressSanitizer is
// told of every switch, so that its reports hold inside fibers.
#pragma once
#include <stddef.h>

#if !defined(__x86_64__) || defined(QUANTKV_SIMT_UCONTEXT)
#include <ucontext.h>
#define QUANTKV_SIMT_USES_UCONTEXT 1
#endif

#if defined(__SANITIZE_ADDRESS__)
#define QUANTKV_SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define QUANTKV_SIMT_ASAN 1
#endif
#endif

namespace quantkv::simt {

// Where a flow of control stopped.
struct Context {
#if defined(QUANTKV_SIMT_USES_UCONTEXT)
  ucontext_t machine;
#else
  void *stack_pointer = nullptr; // callee-saved registers lie there, the return address above them
#endif
  void *fake_stack = nullptr; // AddressSanitizer's
};

class Fiber {
public:
  Fiber() = default;
  Fiber(Fiber &&other) noexcept : context_(other.context_), stack_(other.stack_) { other.stack_ = nullptr; }
  Fiber(const Fiber &) = delete;
  ~Fiber();

  // Prepares a run of `function` from its beginning. Whatever the fiber did before is dropped where it stood, with no
  // destructor run: kernels own nothing. False if there is no memory for the stack.
  bool restart(void (*function)());
  // Runs the fiber until it yields or ends. Called by the scheduler, never from within a fiber.
  void resume();
  // Goes back to whoever called resume(). Called from within this fiber.
  void yield();

private:
  static void entry();
  Context context_;
  char *stack_ = nullptr;
  bool is_clean_ = false; // the last function came to its end
};

} // namespace quantkv::simt
