#include "fiber.h"

#include <stdint.h>
#include <sys/mman.h>

#if defined(QUANTKV_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace quantkv::simt {

namespace {

// The sanitizers' red zones make frames larger.
#if defined(QUANTKV_SIMT_ASAN)
constexpr size_t kStackBytes = 512 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif
constexpr size_t kGuardBytes = 4096; // below the stack: an overflow is a fault, not a corruption

Context scheduler;
Fiber *running = nullptr;
void (*start)() = nullptr; // of the fiber being resumed for the first time

// The scheduler's own stack, as AddressSanitizer sees it.
const void *scheduler_bottom = nullptr;
size_t scheduler_bytes = 0;

void before_switch(Context &from, const void *to_bottom, size_t to_bytes, bool last) {
#if defined(QUANTKV_SIMT_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to_bottom, to_bytes);
#else
  (void)from, (void)to_bottom, (void)to_bytes, (void)last;
#endif
}

void after_switch(Context &self, const void **from_bottom, size_t *from_bytes) {
#if defined(QUANTKV_SIMT_ASAN)
  __sanitizer_finish_switch_fiber(self.fake_stack, from_bottom, from_bytes);
#else
  (void)self, (void)from_bottom, (void)from_bytes;
#endif
}

} // namespace

#if !defined(QUANTKV_SIMT_USES_UCONTEXT)
extern "C" void quantkv_simt_switch(void **save_stack_pointer, void *stack_pointer);
// The System V ABI: rbx, rbp, r12-r15 belong to the caller; all else is dead across a call.
asm(R"(
.text
.globl quantkv_simt_switch
.hidden quantkv_simt_switch
.type quantkv_simt_switch, @function
quantkv_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size quantkv_simt_switch, . - quantkv_simt_switch
)");
#endif

static void switch_machine(Context &from, Context &to) {
#if defined(QUANTKV_SIMT_USES_UCONTEXT)
  swapcontext(&from.machine, &to.machine);
#else
  quantkv_simt_switch(&from.stack_pointer, to.stack_pointer);
#endif
}

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes);
}

void Fiber::entry() {
  after_switch(running->context_, &scheduler_bottom, &scheduler_bytes);
  start();
  running->is_clean_ = true;
  before_switch(running->context_, scheduler_bottom, scheduler_bytes, true);
  switch_machine(running->context_, scheduler);
  __builtin_trap(); // a fiber that ended is restarted, not resumed
}

bool Fiber::restart(void (*function)()) {
  if (stack_ == nullptr) {
    void *memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
    mprotect(memory, kGuardBytes, PROT_NONE);
    stack_ = static_cast<char *>(memory) + kGuardBytes;
  }
#if defined(QUANTKV_SIMT_ASAN)
  // Red zones of frames that were dropped; frames that were left took theirs with them.
  if (!is_clean_) __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
  is_clean_ = false;
  start = function;
  context_.fake_stack = nullptr;
#if defined(QUANTKV_SIMT_USES_UCONTEXT)
  getcontext(&context_.machine);
  context_.machine.uc_stack.ss_sp = stack_;
  context_.machine.uc_stack.ss_size = kStackBytes;
  context_.machine.uc_link = nullptr;
  makecontext(&context_.machine, entry, 0);
#else
  // What the switch pops: six registers and an address to go to. The word above stands for the return address of
  // entry(), which the ABI wants 8 below a multiple of 16.
  void **top = reinterpret_cast<void **>(stack_ + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void *>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  context_.stack_pointer = top;
#endif
  return true;
}

void Fiber::resume() {
  running = this;
  before_switch(scheduler, stack_, kStackBytes, false);
  switch_machine(scheduler, context_);
  after_switch(scheduler, nullptr, nullptr);
}

void Fiber::yield() {
  before_switch(context_, scheduler_bottom, scheduler_bytes, false);
  switch_machine(context_, scheduler);
  after_switch(context_, &scheduler_bottom, &scheduler_bytes);
}

} // namespace quantkv::simt
