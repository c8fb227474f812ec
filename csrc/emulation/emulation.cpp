// The scheduler behind emulation.h. Compiled without sanitizers in every build: what it does to
// the kernels' memory is no access of theirs.
#include "emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(DF_ASAN)
extern "C" void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom,
                                                size_t* size);
extern "C" void __asan_unpoison_memory_region(const void* p, size_t size);
#elif defined(DF_TSAN)
extern "C" void* __tsan_get_current_fiber();
extern "C" void* __tsan_create_fiber(unsigned flags);
extern "C" void __tsan_destroy_fiber(void* fiber);
extern "C" void __tsan_switch_to_fiber(void* fiber, unsigned flags);
extern "C" void __tsan_acquire(void* p);
extern "C" void __tsan_release(void* p);
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

const Context* current = nullptr;
Order order = Order::forward;

namespace {

constexpr size_t STACK = 256 * 1024;
constexpr int WARP = 32;

// ---- sanitizers ---------------------------------------------------------------------------------
// While one of these lives, what is allocated is new to ThreadSanitizer, whoever had it before, and
// what is freed is forgotten: shared memory is a block's own, a stack a thread's.
struct Unseen {
#if defined(DF_TSAN)
  Unseen() { AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Unseen() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__); }
#else
  ~Unseen() {}
#endif
};
void* fresh(size_t bytes) {
  const Unseen unseen;
  void* p = nullptr;
  if (posix_memalign(&p, 128, std::max<size_t>(bytes, 1))) throw std::bad_alloc();
  return p;
}
// Unseen by the sanitizers, which watch memcpy. From null: 0xff.
void copy(void* to, const void* from, size_t bytes) {
  volatile char* const out = static_cast<char*>(to);
  const volatile char* const in = static_cast<const char*>(from);
  for (size_t i = 0; i < bytes; ++i) out[i] = in ? in[i] : char(0xff);
}

#if defined(DF_TSAN)
void acquire(void* token) { __tsan_acquire(token); }
void release(void* token) { __tsan_release(token); }
#else
void acquire(void*) {}
void release(void*) {}
#endif

// ---- fibers -------------------------------------------------------------------------------------
#if defined(__x86_64__)
using Machine = void*;  // a stack pointer, the registers below it
extern "C" void df_switch(Machine* from, Machine* to);
asm(R"(
.text
.hidden df_switch
.globl df_switch
.type df_switch, @function
df_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size df_switch, .-df_switch
)");
void prepare(Machine* machine, char* stack, void (*entry)()) {
  // At entry the stack pointer is 8 off a multiple of 16, as after a call.
  void** top = reinterpret_cast<void**>(stack + STACK) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  *machine = top;
}
#else
using Machine = ucontext_t;
void df_switch(Machine* from, Machine* to) { swapcontext(from, to); }
void prepare(Machine* machine, char* stack, void (*entry)()) {
  getcontext(machine);
  machine->uc_stack.ss_sp = stack;
  machine->uc_stack.ss_size = STACK;
  machine->uc_link = nullptr;
  makecontext(machine, entry, 0);
}
#endif

// A stack with the registers saved on it. It runs one CUDA thread after another, until one waits:
// a kernel without barriers costs one switch a block. For ThreadSanitizer it is a thread, and runs
// one CUDA thread of a launch only, for it would see no race between two.
struct Fiber {
  char* stack;
  Machine machine;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;        // ThreadSanitizer's thread
};

enum class State { fresh, running, waiting, done };

struct Thread {
  Context context;
  int number = 0;
  State state = State::fresh;
  Fiber* fiber = nullptr;
  bool at_barrier = false;  // else at a warp collective
  unsigned mask = 0;
  Site site{};
  const void* value = nullptr;  // what it brings to a collective
  size_t bytes = 0;
  void* all = nullptr;
  char tokens[2];  // of its warp synchronisations, in turn
  unsigned warp_syncs = 0;
};

struct Warp {
  unsigned arrived = 0;
};

// One block of one launch. Everything here belongs to the one thread that holds `mutex`.
// Bytes of shared memory that a block may have: whoever it is; who has asked for more (sm_90).
constexpr size_t UNASKED = 48 * 1024, GRANTED = 227 * 1024;

struct Block {
  const std::function<void()>* body;
  std::vector<Thread> threads;
  std::vector<int> sequence;
  std::vector<Warp> warps;
  size_t next = 0;  // position in sequence of the first thread that has not started
  int running = 0, at_barrier = 0;
  Thread* thread = nullptr;
  unsigned generation = 0;
  char tokens[2];  // of the barriers, in turn
  std::map<const void*, void*> arrays;
  size_t dynamic_bytes, shared_bytes;  // the latter: static arrays', so far, too
  bool asked;
  std::string error;
};

std::mutex mutex;
Block* block = nullptr;
std::vector<Fiber*>& idle = *new std::vector<Fiber*>;  // at the start of their loop; never freed
std::vector<Fiber*> retired;                           // idle when the launch is over
Machine scheduler;
[[maybe_unused]] const void* scheduler_stack = nullptr;
[[maybe_unused]] size_t scheduler_stack_size = 0;
[[maybe_unused]] void* scheduler_fake_stack = nullptr;
[[maybe_unused]] void* scheduler_tsan = nullptr;
char start_token, end_token;  // two: blocks are not ordered, only the launch and its end
std::mt19937 shuffler;

void fiber_main();

Fiber* take_fiber() {
  if (!idle.empty()) {
    Fiber* f = idle.back();
    idle.pop_back();
    return f;
  }
  Fiber* f = new Fiber;
#if defined(DF_TSAN)
  f->tsan = __tsan_create_fiber(0);
  f->stack = static_cast<char*>(fresh(STACK));
#else
  f->stack = static_cast<char*>(mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (f->stack == MAP_FAILED) throw std::bad_alloc();
#endif
  prepare(&f->machine, f->stack, fiber_main);
  return f;
}
void drop_fiber(Fiber* f) {
#if defined(DF_TSAN)
  __tsan_destroy_fiber(f->tsan);
  std::free(f->stack);
#else
#if defined(DF_ASAN)
  __asan_unpoison_memory_region(f->stack, STACK);
#endif
  munmap(f->stack, STACK);
#endif
  delete f;
}

// From the scheduler into a thread's fiber, until it waits or no thread is left to start.
void enter(Thread* t) {
  block->thread = t;
  current = &t->context;
#if defined(DF_TSAN)
  __tsan_switch_to_fiber(t->fiber->tsan, 1);  // 1: no ordering by the switch
#elif defined(DF_ASAN)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, t->fiber->stack, STACK);
#endif
  df_switch(&scheduler, &t->fiber->machine);
#if defined(DF_ASAN)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}
// From a fiber back to the scheduler.
void leave(Fiber* f) {
#if defined(DF_TSAN)
  __tsan_switch_to_fiber(scheduler_tsan, 1);
#elif defined(DF_ASAN)
  __sanitizer_start_switch_fiber(&f->fake_stack, scheduler_stack, scheduler_stack_size);
#endif
  df_switch(&f->machine, &scheduler);
#if defined(DF_ASAN)
  __sanitizer_finish_switch_fiber(f->fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

[[maybe_unused]] Thread* next_fresh() {
  return block->next < block->sequence.size() ? &block->threads[block->sequence[block->next]]
                                              : nullptr;
}

void run_thread(Thread* t) {
  acquire(&start_token);
  (*block->body)();
  release(&end_token);
  t->state = State::done;
  --block->running;
}

void fiber_main() {
#if defined(DF_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  for (;;) {
    Thread* t = block->thread;
    Fiber* const f = t->fiber;
    run_thread(t);
#if !defined(DF_TSAN)
    for (Thread* n = next_fresh(); n && block->error.empty(); n = next_fresh()) {
      ++block->next;
      n->state = State::running;
      n->fiber = f;
      block->thread = n;
      current = &n->context;
      run_thread(n);
    }
#endif
    leave(f);
  }
}

// Waits until someone sets the thread running again; never returns if the block has failed.
void wait() {
  Thread* const t = block->thread;
  t->state = State::waiting;
  leave(t->fiber);
}

std::string where(Site s) {
  const char* slash = std::strrchr(s.file, '/');
  return std::string(slash ? slash + 1 : s.file) + ":" + std::to_string(s.line);
}

// Lets all waiting threads of the block go if every thread that still runs has come.
bool try_release_barrier() {
  if (block->at_barrier == 0 || block->at_barrier < block->running) return false;
  const Thread* first = nullptr;
  for (const Thread& t : block->threads) {
    if (t.state == State::done)
      block->error = "a thread has ended while others wait at the barrier";
    else if (!first)
      first = &t;
    else if (t.site.line != first->site.line || std::strcmp(t.site.file, first->site.file))
      block->error = "threads of a block wait at different barriers, " + where(first->site) +
                     " and " + where(t.site);
  }
  if (!block->error.empty()) {
    if (first) block->error += " (" + where(first->site) + ")";
    return true;
  }
  for (Thread& t : block->threads) t.state = State::running, t.at_barrier = false;
  block->at_barrier = 0;
  ++block->generation;
  return true;
}

void report_deadlock() {
  for (const Thread& t : block->threads)
    if (t.state == State::waiting) {
      block->error = t.at_barrier
          ? "a barrier that other threads never reach, " + where(t.site)
          : "a warp collective whose mask names lanes that never come, " + where(t.site);
      return;
    }
}

void run_block(Block& b) {
  block = &b;
  b.running = int(b.threads.size());
  while (b.running > 0 && b.error.empty()) {
    bool progress = false;
    for (int i : b.sequence) {
      Thread& t = b.threads[i];
      if (t.state == State::fresh) {
        ++b.next;
        t.fiber = take_fiber();
        t.state = State::running;
      }
      if (t.state != State::running) continue;
      progress = true;
      enter(&t);
      if (!b.error.empty()) break;
    }
    if (b.error.empty() && !try_release_barrier() && !progress) report_deadlock();
  }
  // A fiber is reusable if its last thread came to an end; those that still wait are dropped.
  std::map<Fiber*, bool> fibers;
  for (const Thread& t : b.threads)
    if (t.fiber) {
      auto [it, added] = fibers.emplace(t.fiber, true);
      it->second = it->second && t.state == State::done;
    }
  for (const auto& [fiber, reusable] : fibers) {
#if defined(DF_TSAN)
    if (reusable) retired.push_back(fiber);
#else
    if (reusable) idle.push_back(fiber);
#endif
    else drop_fiber(fiber);
  }
  for (const auto& [key, p] : b.arrays) std::free(p);
  block = nullptr;
  current = nullptr;
}

}  // namespace

void run(const char* kernel, dim3 grid, dim3 size, size_t shared_bytes, bool asked,
         const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(mutex);
  const int n_blocks = int(grid.x * grid.y * grid.z), n = int(size.x * size.y * size.z);
  if (n < 1 || n > 1024 || shared_bytes > GRANTED)
    throw std::runtime_error("kernel `" + std::string(kernel) + "`: invalid configuration: " +
                             std::to_string(n) + " threads, " + std::to_string(shared_bytes) +
                             " bytes of shared memory");
#if defined(DF_TSAN)
  scheduler_tsan = __tsan_get_current_fiber();
#endif
  const Unseen unseen;
  release(&start_token);
  std::vector<int> blocks(n_blocks), sequence(n);
  std::string error;
  std::iota(blocks.begin(), blocks.end(), 0);
  std::iota(sequence.begin(), sequence.end(), 0);
  if (order == Order::reverse) {
    std::reverse(blocks.begin(), blocks.end());
    std::reverse(sequence.begin(), sequence.end());
  }
  if (order == Order::shuffled) std::shuffle(blocks.begin(), blocks.end(), shuffler);
  for (int k : blocks) {
    if (order == Order::shuffled) std::shuffle(sequence.begin(), sequence.end(), shuffler);
    const auto heap = std::make_unique<Block>();  // where tokens are new, too
    Block& b = *heap;
    b.body = &body;
    b.sequence = sequence;
    b.dynamic_bytes = b.shared_bytes = shared_bytes;
    b.asked = asked;
    b.warps.resize((n + WARP - 1) / WARP);
    b.threads.resize(n);
    const unsigned u = unsigned(k);
    for (int i = 0; i < n; ++i) {
      const unsigned v = unsigned(i);
      Thread& t = b.threads[i];
      t.number = i;
      t.context = {{v % size.x, v / size.x % size.y, v / size.x / size.y},
                   {u % grid.x, u / grid.x % grid.y, u / grid.x / grid.y}, size, grid};
    }
    run_block(b);
    error = b.error;
    if (!error.empty()) break;
  }
  acquire(&end_token);
  idle.insert(idle.end(), retired.begin(), retired.end());
  retired.clear();
  if (!error.empty()) throw std::runtime_error("kernel `" + std::string(kernel) + "`: " + error);
}

void fail(const char* what, Site site) {
  block->error = std::string(what) + ", " + where(site);
  wait();
}

void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    fail("a pointer is not aligned for a vector access", {__FILE__, __LINE__});
}

void barrier(Site site) {
  Thread* const t = block->thread;
  char* const token = &block->tokens[block->generation & 1];
  t->at_barrier = true;
  t->site = site;
  ++block->at_barrier;
  release(token);
  wait();
  acquire(token);
}

void exchange(unsigned mask, Site site, const void* value, size_t bytes, void* all) {
  Thread* const t = block->thread;
  const int lane = t->number % WARP, first = t->number - lane;
  Warp& warp = block->warps[t->number / WARP];
  if (!(mask >> lane & 1)) fail("a warp collective is called by a lane not in its mask", site);
  t->mask = mask, t->site = site, t->value = value, t->bytes = bytes, t->all = all;
  warp.arrived |= 1u << lane;
  // Complete once every lane of the mask waits at the same collective.
  bool complete = (warp.arrived & mask) == mask;
  for (int i = 0; i < WARP && complete; ++i)
    if (mask >> i & 1) {
      const Thread& other = block->threads[first + i];
      if (other.mask != mask || other.bytes != bytes || other.site.line != site.line)
        fail("lanes of a warp meet in different collectives or with different masks", site);
    }
  if (!complete) {
    t->at_barrier = false;
    wait();
    return;
  }
  warp.arrived &= ~mask;
  for (int i = 0; i < WARP; ++i)
    if (mask >> i & 1) {
      Thread& to = block->threads[first + i];
      for (int j = 0; j < WARP; ++j) {
        char* const slot = static_cast<char*>(to.all) + bytes * j;
        copy(slot, mask >> j & 1 ? block->threads[first + j].value : nullptr, bytes);
      }
      to.state = State::running;
    }
}

void sync_warp(unsigned mask, Site site) {
  Thread* const t = block->thread;
  const char turn = char(t->warp_syncs++ % 2);
  char all[WARP];
  release(&t->tokens[int(turn)]);
  exchange(mask, site, &turn, 1, all);
  // From each lane as it was then: it may have gone on.
  for (int i = 0; i < WARP; ++i)
    if (mask >> i & 1) acquire(&block->threads[t->number / WARP * WARP + i].tokens[int(all[i])]);
}

void* shared(const void* key, size_t bytes) {
  void*& p = block->arrays[key];
  if (!p) {
    const size_t size = key ? bytes : block->dynamic_bytes;
    if (key) block->shared_bytes += size;
    if (block->shared_bytes > (block->asked ? GRANTED : UNASKED)) {
      block->error = std::to_string(block->shared_bytes) + " bytes of shared memory, static and "
                     "dynamic, of " + std::to_string(block->asked ? GRANTED : UNASKED) +
                     (block->asked ? " that a card has" : " without asking for more");
      wait();
    }
    p = fresh(size);
    copy(p, nullptr, size);
  }
  return p;
}

void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments { uint32_t a[4], b[2]; } mine, all[WARP];
  copy(mine.a, a, sizeof mine.a);
  copy(mine.b, b, sizeof mine.b);
  exchange(0xffffffffu, {__FILE__, __LINE__}, &mine, sizeof mine, all);
  const auto halves = [](uint32_t word, int i) {
    half h;
    h.bits = uint16_t(word >> (16 * i));
    return float(h);
  };
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int low = k % 8, owner = low / 2;  // of the quad that holds column k of a, row k of b
      const float x = halves(all[4 * (row % 8) + owner].a[row / 8 + 2 * (k / 8)], low % 2);
      const float y = halves(all[4 * column + owner].b[k / 8], low % 2);
      d[i] += x * y;
    }
  }
}

}  // namespace emulation

half::half(float x) {
  uint32_t f;
  std::memcpy(&f, &x, 4);
  const uint32_t sign = f >> 16 & 0x8000u;
  f &= 0x7fffffffu;
  if (f > 0x7f800000u) {
    bits = uint16_t(sign | 0x7e00u);  // NaN
  } else if (f >= 0x477ff000u) {
    bits = uint16_t(sign | 0x7c00u);  // 65520 and more: infinity
  } else if (f < 0x38800000u) {       // below 2^-14: multiples of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &f, 4);
    bits = uint16_t(sign | uint32_t(std::nearbyint(magnitude * 0x1p24f)));
  } else {
    f += 0xfffu + (f >> 13 & 1);
    bits = uint16_t(sign | ((f - 0x38000000u) >> 13));
  }
}
half::operator float() const {
  const uint32_t exponent = bits >> 10 & 31, fraction = bits & 0x3ffu;
  const float sign = bits & 0x8000u ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(float(fraction), -24);
  return sign * std::ldexp(float(1024 + fraction), int(exponent) - 25);
}
