// The scheduler behind cuda_runtime.h, and what torch_cuda would provide to the boxed entries.
#include <ucontext.h>

#include <map>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace maefast::cuda {
constexpr size_t kSharedBytes = 227 << 10;  // of a block that asked for more than 48 KB
alignas(16) unsigned char shared_memory[kSharedBytes + 16];
}  // namespace maefast::cuda

namespace emulator {
namespace {

constexpr int kMostShown = 8;
constexpr size_t kStack = 64 << 10;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  unsigned shown[kMostShown];
  std::vector<std::function<void()>> copies;
  std::vector<std::vector<std::function<void()>>> groups;
};

std::vector<std::unique_ptr<Fiber>> fibers;
ucontext_t scheduler;
int current;
const std::function<void()>* body;
bool reversed = false;
unsigned seed = 0;
std::map<const void*, size_t> shared_limits;

// What a byte of shared memory holds when a block starts: parts of NaN, or whatever the seed gives.
unsigned char byte_before(size_t at) {
  return seed ? static_cast<unsigned char>(((at / 4 + seed) * 2654435761u) >> (at % 4 * 8)) : 0x7f;
}

void enter() {
  (*body)();
  fibers[current]->state = State::done;
}

void wait(State state) {
  Fiber& fiber = *fibers[current];
  fiber.state = state;
  swapcontext(&fiber.context, &scheduler);
}

// Resumes the fibers [begin, end) if all that are not done wait at this barrier. Returns whether
// any did.
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
    fiber.copies.clear();
    fiber.groups.clear();
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

int lane() { return current % kWarp; }

const unsigned* shown(int lane) {
  const int thread = current / kWarp * kWarp + lane, threads = blockDim.x * blockDim.y * blockDim.z;
  return thread < threads && fibers[thread]->state != State::done ? fibers[thread]->shown : nullptr;
}

void collective(const unsigned* words, int count, const std::function<void()>& read) {
  std::copy(words, words + count, fibers[current]->shown);
  wait(State::at_warp_barrier);
  read();
  wait(State::at_warp_barrier);
}

std::vector<std::function<void()>>& copies() { return fibers[current]->copies; }

void commit_copies() {
  Fiber& fiber = *fibers[current];
  fiber.groups.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}

void wait_for_copies(int pending) {
  auto& groups = fibers[current]->groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const auto& copy : groups.front()) copy();
    groups.erase(groups.begin());
  }
}

cudaError_t run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  const int threads = block.x * block.y * block.z;
  const size_t limit = shared_limits.count(kernel) ? shared_limits[kernel] : 48 << 10;
  if (threads < 1 || threads > 1024 || shared_bytes > limit || grid.x < 1 || grid.x > INT32_MAX || grid.y < 1 || grid.y > 65535) {
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
    for (size_t byte = 0; byte < shared_bytes + 16; ++byte) shared[byte] = byte_before(byte);
    if (!run_block(threads)) return cudaErrorLaunchFailure;
    for (size_t byte = shared_bytes; byte < shared_bytes + 16; ++byte) {
      if (shared[byte] != byte_before(byte)) return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

}  // namespace emulator

void __syncthreads() { emulator::wait(emulator::State::at_block_barrier); }
void __syncwarp() { emulator::wait(emulator::State::at_warp_barrier); }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<size_t>(value) > maefast::cuda::kSharedBytes) return cudaErrorInvalidValue;
  emulator::shared_limits[kernel] = value;
  return cudaSuccess;
}

// One processor and no capability, where no other file says what the GPU is.
__attribute__((weak)) cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 1 : 0;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration"
                                                : "threads wait for each other, or wrote past their shared memory";
}

extern "C" {

// Threads and blocks take turns from the last to the first.
void emulator_reverse(int reverse) { emulator::reversed = reverse != 0; }

// Other contents of shared memory when a block starts for each seed; 0 is parts of NaN.
void emulator_seed(unsigned seed) { emulator::seed = seed; }

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
