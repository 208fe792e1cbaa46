// The scheduler behind cuda_runtime.h, and what torch_cuda would provide to the boxed entries.
#include <ucontext.h>

#include <memory>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace maefast::cuda {
constexpr size_t kSharedBytes = 48 << 10;
alignas(16) unsigned char shared_memory[kSharedBytes + 16];
}  // namespace maefast::cuda

namespace emulator {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  unsigned slot;
};

std::vector<std::unique_ptr<Fiber>> fibers;
ucontext_t scheduler;
int current;
const std::function<void()>* body;
bool reversed = false;

void enter() {
  (*body)();
  fibers[current]->state = State::done;
}

void wait(State state) {
  Fiber& fiber = *fibers[current];
  fiber.state = state;
  swapcontext(&fiber.context, &scheduler);
}

// Lets the fibers [begin, end) go on if all that are not done wait at this barrier; returns whether any did.
bool release(int begin, int end, State barrier) {
  bool any = false;
  for (int i = begin; i < end; ++i) {
    if (fibers[i]->state != State::done && fibers[i]->state != barrier) return false;
    any = any || fibers[i]->state == barrier;
  }
  for (int i = begin; i < end; ++i) {
    if (fibers[i]->state == barrier) fibers[i]->state = State::ready;
  }
  return any;
}

bool run_block(int threads) {
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
    fiber.state = State::ready;
  }
  while (true) {
    bool progress = false;
    for (int turn = 0; turn < threads; ++turn) {
      current = reversed ? threads - 1 - turn : turn;
      if (fibers[current]->state != State::ready) continue;
      threadIdx = dim3(current % blockDim.x, current / blockDim.x % blockDim.y, current / blockDim.x / blockDim.y);
      swapcontext(&scheduler, &fibers[current]->context);
      progress = true;
    }
    for (int i = 0; i < threads; i += kWarp) progress |= release(i, std::min(i + kWarp, threads), State::at_warp_barrier);
    progress |= release(0, threads, State::at_block_barrier);
    int done = 0;
    for (int i = 0; i < threads; ++i) done += fibers[i]->state == State::done;
    if (done == threads) return true;
    if (!progress) return false;
  }
}

}  // namespace

unsigned exchange(unsigned value, int lane_mask) {
  fibers[current]->slot = value;
  wait(State::at_warp_barrier);
  const int other = current ^ lane_mask, threads = blockDim.x * blockDim.y * blockDim.z;
  const bool there = other < threads && fibers[other]->state != State::done;
  const unsigned got = there ? fibers[other]->slot : 0x7fffffff;  // NaN
  wait(State::at_warp_barrier);
  return got;
}

cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  const int threads = block.x * block.y * block.z;
  if (threads < 1 || threads > 1024 || shared_bytes > maefast::cuda::kSharedBytes || grid.x < 1 || grid.x > INT32_MAX ||
      grid.y < 1 || grid.y > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  body = &thread;
  blockDim = block;
  gridDim = grid;
  for (unsigned i = 0; i < grid.x * grid.y; ++i) {
    const unsigned turn = reversed ? grid.x * grid.y - 1 - i : i;
    blockIdx = dim3(turn % grid.x, turn / grid.x);
    unsigned char* shared = maefast::cuda::shared_memory;
    std::fill(shared, shared + sizeof(maefast::cuda::shared_memory), 0x7f);
    if (!run_block(threads)) return cudaErrorLaunchFailure;
    for (size_t byte = shared_bytes; byte < shared_bytes + 16; ++byte) {
      if (shared[byte] != 0x7f) return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

}  // namespace emulator

void __syncthreads() { emulator::wait(emulator::State::at_block_barrier); }
void __syncwarp() { emulator::wait(emulator::State::at_warp_barrier); }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration"
                                                : "threads wait for each other, or wrote past their shared memory";
}

extern "C" {

// Threads and blocks take turns from the last to the first.
void emulator_reverse(int reverse) { emulator::reversed = reverse != 0; }

int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int aoti_torch_delete_device_guard(void*) { return 0; }
int aoti_torch_get_device_type(void*, int32_t* type) {
  constexpr int32_t kCuda = 1;  // c10::DeviceType::CUDA
  *type = kCuda;
  return 0;
}
}
