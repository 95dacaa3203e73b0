// The shim's fibers: one per CUDA thread, switched at barriers; see cuda_shim.h.
//
// For ThreadSanitizer this file is compiled without it and with SHIM_TSAN: what the scheduler does itself is no race of
// the kernels. It tells the sanitizer of the fibers and of the barriers; cp.async's memcpy is seen through its
// interceptor.
#include "cuda_shim.h"

#include <sys/mman.h>

#include <cstdio>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SHIM_TSAN)
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// Of runtime_shim.cc, where it is loaded: does the work when the stream's turn comes.
extern "C" void skv_shim_enqueue(void* stream, std::function<void()>* work) __attribute__((weak));

// For tests: launches are shown to the function, and not run; null = they are run.
extern "C" void skv_shim_on_launch(shim::OnLaunch function) { shim::on_launch = function; }

namespace shim {
namespace {

constexpr size_t kStack = 128 * 1024;
enum class State { kRunning, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;
  dim3 index;
  unsigned linear = 0, exchanges = 0;
  State state = State::kRunning;
  uint32_t mask = 0;
  int line = 0;
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first; the last is still open
};

struct Scheduler {
  Fiber main;
  std::vector<Fiber> fibers;
  unsigned threads = 0;
  Fiber* current = nullptr;
  Block block;
  std::function<void()> body;
  alignas(32) unsigned char slots[32][2][32 * 32];           // per warp, double buffered: one barrier per exchange
  char warp_sync[32], block_sync, launch_begin, launch_end;  // addresses for ThreadSanitizer's happens-before edges
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
};
Scheduler s;

#if defined(SHIM_TSAN)
void release(void* address) { __tsan_release(address); }
void acquire(void* address) { __tsan_acquire(address); }
#else
void release(void*) {}
void acquire(void*) {}
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers on the stack, stores the stack pointer, and returns on the other stack.
extern "C" void skv_shim_switch(void** from, void* to);
asm(R"(
.text
.globl skv_shim_switch
.hidden skv_shim_switch
.type skv_shim_switch, @function
skv_shim_switch:
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
.size skv_shim_switch, .-skv_shim_switch
.section .note.GNU-stack,"",@progbits
.text
)");
#endif

void switch_stacks(Fiber& from, Fiber& to) {
#if defined(__x86_64__)
  skv_shim_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
}

void to_main(bool done) {
  Fiber& me = *s.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(done ? nullptr : &me.fake_stack, s.main_stack, s.main_stack_bytes);
#endif
#if defined(SHIM_TSAN)
  __tsan_switch_to_fiber(s.main.tsan, 1);  // 1: a switch orders nothing; only barriers do
#endif
  switch_stacks(me, s.main);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me.fake_stack, nullptr, nullptr);
#endif
  (void)done;
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &s.main_stack, &s.main_stack_bytes);
#endif
  acquire(&s.launch_begin);
  s.body();
  release(&s.launch_end);
  s.current->state = State::kDone;
  to_main(true);
}

void resume(Fiber& fiber) {
  s.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&s.main.fake_stack, fiber.stack, kStack);
#endif
#if defined(SHIM_TSAN)
  __tsan_switch_to_fiber(fiber.tsan, 1);
#endif
  switch_stacks(s.main, fiber);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(s.main.fake_stack, nullptr, nullptr);
#endif
}

void wait(State state, uint32_t mask, int line, void* sync) {
  Fiber& me = *s.current;
  me.state = state;
  me.mask = mask;
  me.line = line;
  release(sync);
  to_main(false);
  acquire(sync);
}

void prepare(Fiber& fiber, unsigned i) {
  fiber.state = State::kRunning;
  fiber.exchanges = 0;
  fiber.linear = i;
  fiber.groups.assign(1, {});
  const dim3 size = s.block.size;
  fiber.index = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
#if defined(SHIM_TSAN)
  if (fiber.stack) munmap(fiber.stack, kStack);  // so that no block meets another's accesses to its stack
  fiber.stack = nullptr;
#endif
  if (!fiber.stack) {
    fiber.stack = static_cast<char*>(
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (fiber.stack == MAP_FAILED) die("no memory for a thread's stack");
  }
#if defined(__x86_64__)
  // As if fiber_main had been called: six saved registers, its address, and a null return address; 16-byte aligned.
  void** top = reinterpret_cast<void**>(fiber.stack + kStack) - 10;
  std::fill(top, top + 10, nullptr);
  top[6] = reinterpret_cast<void*>(&fiber_main);
  if (reinterpret_cast<uintptr_t>(top + 8) % 16 != 0) die("stack not aligned");
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#endif
#if defined(SHIM_TSAN)
  if (fiber.tsan) __tsan_destroy_fiber(fiber.tsan);
  fiber.tsan = __tsan_create_fiber(0);
#endif
}

// Lets go of the warps whose lanes have all reached the same barrier. Returns whether there was one.
bool release_warps() {
  bool any = false;
  for (unsigned first = 0; first < s.threads; first += 32) {
    const unsigned end = std::min(s.threads, first + 32);
    for (unsigned i = first; i < end; i++) {
      if (s.fibers[i].state != State::kAtWarpBarrier) continue;
      const uint32_t mask = s.fibers[i].mask;
      bool all = true;
      for (unsigned lane = 0; lane < 32 && all; lane++) {
        if (!(mask >> lane & 1)) continue;
        if (first + lane >= end || s.fibers[first + lane].state == State::kDone)
          die("a barrier waits for a lane that has left");
        const Fiber& other = s.fibers[first + lane];
        all = other.state == State::kAtWarpBarrier && other.mask == mask;
        if (all && other.line != s.fibers[i].line) die("lanes meet at different barriers");
      }
      if (!all) continue;
      for (unsigned lane = 0; lane < 32; lane++) {
        if (mask >> lane & 1) s.fibers[first + lane].state = State::kRunning;
      }
      any = true;
    }
  }
  return any;
}

void run_block() {
  for (unsigned i = 0; i < s.threads; i++) prepare(s.fibers[i], i);
  release(&s.launch_begin);
  for (;;) {
    bool progress = false;
    for (unsigned i = 0; i < s.threads; i++) {
      if (s.fibers[i].state != State::kRunning) continue;
      resume(s.fibers[i]);
      progress = true;
    }
    progress |= release_warps();
    unsigned done = 0, waiting = 0;
    for (unsigned i = 0; i < s.threads; i++) {
      done += s.fibers[i].state == State::kDone;
      waiting += s.fibers[i].state == State::kAtBlockBarrier;
    }
    if (done == s.threads) break;
    if (waiting && done) die("a block barrier waits for a thread that has left");
    if (waiting == s.threads) {
      for (unsigned i = 0; i < s.threads; i++) s.fibers[i].state = State::kRunning;
      progress = true;
    }
    if (!progress) die("deadlock");
  }
  s.current = nullptr;
}

}  // namespace

const Block& block() { return s.block; }
dim3 thread_index() { return s.current->index; }
unsigned lane() { return s.current->linear % 32; }

void die(const char* what) {
  const dim3 b = s.block.index;
  fprintf(stderr, "cuda_shim: %s (block %u,%u,%u)\n", what, b.x, b.y, b.z);
  for (unsigned i = 0; i < s.threads; i++) {
    const Fiber& f = s.fibers[i];
    if (f.state == State::kAtBlockBarrier || f.state == State::kAtWarpBarrier) {
      fprintf(stderr, "  thread %u waits at line %d (%s, mask %08x)\n", i, f.line,
              f.state == State::kAtBlockBarrier ? "block" : "warp", f.mask);
    }
  }
  abort();
}

namespace {

void run_grid(dim3 grid, dim3 size, size_t shared_bytes, std::function<void()> body) {
  s.threads = size.x * size.y * size.z;
  s.block.size = size;
  s.block.grid = grid;
  s.body = std::move(body);
  if (s.threads == 0 || s.threads > 1024 || s.threads % 32 != 0) die("block size");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) die("grid size");
  if (s.fibers.size() < s.threads) s.fibers.resize(s.threads);
#if defined(SHIM_TSAN)
  s.main.tsan = __tsan_get_current_fiber();
#endif
  std::vector<char*>
      shared;  // kept to the end: a new allocation for each block, so that no block meets another's accesses
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        s.block.index = dim3(x, y, z);
        s.block.shared = nullptr;
        if (shared_bytes) {
          void* memory = nullptr;
          if (posix_memalign(&memory, 128, shared_bytes) != 0) die("no memory for shared memory");
          memset(memory, 0xFF, shared_bytes);
          s.block.shared = static_cast<char*>(memory);
          shared.push_back(s.block.shared);
        }
        run_block();
#if !defined(SHIM_TSAN)
        for (char* memory : shared) free(memory);
        shared.clear();
#endif
      }
  acquire(&s.launch_end);
  for (char* memory : shared) free(memory);
}

}  // namespace

void launch(void* stream, dim3 grid, dim3 size, size_t shared_bytes, std::function<void()> body) {
  std::function<void()> kernel = [=] { run_grid(grid, size, shared_bytes, body); };
  if (skv_shim_enqueue != nullptr) {
    skv_shim_enqueue(stream, &kernel);
  } else {
    kernel();
  }
}

OnLaunch on_launch = nullptr;

void block_barrier(int line) { wait(State::kAtBlockBarrier, 0, line, &s.block_sync); }

void warp_barrier(uint32_t mask, int line) {
  wait(State::kAtWarpBarrier, mask, line, &s.warp_sync[s.current->linear / 32]);
}

const unsigned char* exchange(uint32_t mask, const void* value, size_t bytes, int line) {
  Fiber& me = *s.current;
  const unsigned warp = me.linear / 32, lane = me.linear % 32;
  if (!(mask >> lane & 1)) die("the calling lane is not in its mask");
  unsigned char* slots = s.slots[warp][me.exchanges++ & 1];
  // Word by word: an intercepted memcpy would make the scheduler's slots a race of the kernels.
  auto* to = reinterpret_cast<volatile uint32_t*>(slots + 32 * lane);
  for (size_t i = 0; i < bytes / 4; i++) to[i] = static_cast<const volatile uint32_t*>(value)[i];
  warp_barrier(mask, line);
  return slots;
}

void async_copy(void* shared, const void* global, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
    die("cp.async not aligned");
  s.current->groups.back().push_back({shared, global, bytes});
}

void async_commit() { s.current->groups.emplace_back(); }

void async_wait(size_t pending) {
  auto& groups = s.current->groups;
  while (groups.size() > pending + 1) {
    for (const Copy& copy : groups.front()) memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

}  // namespace shim
