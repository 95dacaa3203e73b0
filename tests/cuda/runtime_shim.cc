// A CUDA runtime without a GPU, for ONNX Runtime's CUDA provider and the op's library: libcudart with memory, streams,
// events and graphs. Kernels of the op run through cuda_shim.h; ONNX Runtime's own do not.
//
// What it catches: reads and writes of device memory by the host (the pages are open only while the device works, so
// they are segmentation faults), work on a wrong stream or a forgotten wait (a stream runs nothing before it is waited
// for), and calls that a stream under capture does not allow. A graph replays what was captured with the addresses and
// numbers of then. There are two devices, each with memory and streams of its own: what runs on one segfaults at an
// address of the other, and nothing is launched on a stream of a device that is not the thread's.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "runtime_library.h"
#include "runtime_memory.h"

namespace {

using shim::kMemory;
using shim::kPage;
using shim::Memory;
using shim::Work;

constexpr int kMultiprocessors = 4, kDevices = 2;

thread_local int current_device = 0;

struct Graph {
  std::vector<Work> nodes;
};

struct Stream {
  int device = current_device;
  std::deque<Work> queue;
  std::shared_ptr<Graph> capture;

  void add(Work work) {
    if (capture) {
      capture->nodes.push_back(std::move(work));
    } else {
      queue.push_back(std::move(work));
    }
  }
  void finish() {
    while (!queue.empty()) {
      const Work work = std::move(queue.front());
      queue.pop_front();
      work();
    }
  }
};

struct Event {
  Stream* stream = nullptr;
  uint64_t recorded = 0, reached = 0;

  void wait(uint64_t until) {
    while (reached < until && !stream->queue.empty()) {
      const Work work = std::move(stream->queue.front());
      stream->queue.pop_front();
      work();
    }
  }
};

struct Runtime {
  std::recursive_mutex mutex;
  std::array<Memory, kDevices> memories;
  std::array<Stream, kDevices> null_streams;
  std::set<Stream*> streams;
  std::set<void*> pinned;
  std::map<const void*, std::string> kernels;
  int captures = 0;
  int64_t launches = 0, replays = 0;
  cudaError_t last = cudaSuccess;

  Runtime() {
    for (int i = 0; i < kDevices; ++i) null_streams[i].device = i;
  }
  Stream& null_stream() { return null_streams[current_device]; }
  Stream& stream(cudaStream_t handle) {
    auto* found = reinterpret_cast<Stream*>(handle);
    if (found == nullptr) return null_stream();
    if (streams.count(found) == 0) abort();
    return *found;
  }
  // What is done on a device, and not on another.
  Stream& stream_of_device(cudaStream_t handle) {
    Stream& found = stream(handle);
    if (found.device == current_device) return found;
    fprintf(stderr, "runtime_shim: work for a stream of device %d on device %d\n", found.device, current_device);
    abort();
  }
  // The device whose memory an address is in; -1 = none.
  int device_of(const void* address) const {
    for (int i = 0; i < kDevices; ++i) {
      if (memories[i].holds(address)) return i;
    }
    return -1;
  }
};

Runtime& runtime() {
  static auto* one = new Runtime;  // it outlives the provider's own statics
  return *one;
}

using Lock = std::lock_guard<std::recursive_mutex>;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) runtime().last = error;
  return error;
}

// With the memory open that both addresses are in.
void copy(void* to, const void* from, size_t bytes) {
  Runtime& r = runtime();
  Work work = [=] { memcpy(to, from, bytes); };
  for (const void* address : std::array<const void*, 2>{to, from}) {
    const int device = r.device_of(address);
    if (device >= 0) work = [&r, device, inner = std::move(work)] { r.memories[device].run(inner); };
  }
  work();
}

// What would wait for the device, or change its memory, is an error while a stream is captured.
cudaError_t unless_capturing(const std::function<cudaError_t()>& call) {
  const Lock lock(runtime().mutex);
  if (runtime().captures > 0) return result(cudaErrorStreamCaptureUnsupported);
  return result(call());
}

cudaError_t copy_async(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t handle) {
  Runtime& r = runtime();
  const Lock lock(r.mutex);
  Stream& stream = r.stream(handle);
  const auto is_pageable = [&](const void* p) {
    if (r.device_of(p) >= 0) return false;
    for (void* start : r.pinned) {
      if (p >= start && p < static_cast<char*>(start) + kPage) return false;
    }
    return true;
  };
  if (is_pageable(from)) {  // staged before the call returns
    auto staged =
        std::make_shared<std::vector<char>>(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
    stream.add([=] { copy(to, staged->data(), bytes); });
    return cudaSuccess;
  }
  stream.add([=] { copy(to, from, bytes); });
  if (is_pageable(to)) {
    if (stream.capture) return result(cudaErrorStreamCaptureUnsupported);
    stream.finish();
  }
  return cudaSuccess;
}

}  // namespace

extern "C" {

// How the shim's launches come here: cuda_shim.cc.
void skv_shim_enqueue(void* stream, std::function<void()>* kernel) {
  Runtime& r = runtime();
  const Lock lock(r.mutex);
  ++r.launches;
  Stream& of = r.stream_of_device(static_cast<cudaStream_t>(stream));
  of.add([device = of.device, body = std::move(*kernel)] { runtime().memories[device].run(body); });
}

// For tests: launches of the op's kernels, and of graphs; memory.
int64_t skv_shim_launches() { return runtime().launches; }
int64_t skv_shim_replays() { return runtime().replays; }
void skv_shim_memory(int device, int64_t* peak_and_held) {
  const auto both = runtime().memories[device].peak_and_held();
  std::copy(both.begin(), both.end(), peak_and_held);
}

// With SKV_SHIM_SKIP set, ONNX Runtime's own kernels and cublas do nothing, and calls go on.
static bool skips() { return getenv("SKV_SHIM_SKIP") != nullptr; }

void skv_shim_missing(const char* name) {
  if (skips()) return;
  fprintf(stderr, "runtime_shim: %s is not there\n", name);
  abort();
}

// Devices.

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return result(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
static int compute_capability() { return getenv("SKV_SHIM_MAJOR") ? atoi(getenv("SKV_SHIM_MAJOR")) : 8; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {};
  strcpy(p->name, "shim");
  p->major = compute_capability();
  p->multiProcessorCount = kMultiprocessors;
  p->totalGlobalMem = kMemory;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = 163 << 10;
  p->sharedMemPerMultiprocessor = 164 << 10;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? kMultiprocessors
           : attribute == cudaDevAttrComputeCapabilityMajor ? compute_capability()
                                                            : 0;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaGetLastError() {
  const cudaError_t error = runtime().last;
  runtime().last = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return runtime().last; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error of the shim"; }
const char* cudaGetErrorName(cudaError_t error) {
  static thread_local std::string name;
  name = "cudaError " + std::to_string(error);
  return name.c_str();
}

// Memory.

cudaError_t cudaMalloc(void** block, size_t bytes) {
  return unless_capturing([&] {
    *block = runtime().memories[current_device].take(bytes);
    return *block ? cudaSuccess : cudaErrorMemoryAllocation;
  });
}
cudaError_t cudaFree(void* block) {
  return unless_capturing([&] {
    for (Stream* stream : runtime().streams) stream->finish();
    if (block != nullptr) runtime().memories[runtime().device_of(block)].give_back(block);
    return cudaSuccess;
  });
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *free_bytes = runtime().memories[current_device].free_bytes();
  *total = kMemory;
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** block, size_t bytes, unsigned) {
  return unless_capturing([&] {
    *block = aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage);
    runtime().pinned.insert(*block);
    return cudaSuccess;
  });
}
cudaError_t cudaMallocHost(void** block, size_t bytes) { return cudaHostAlloc(block, bytes, 0); }
cudaError_t cudaFreeHost(void* block) {
  return unless_capturing([&] {
    runtime().pinned.erase(block);
    free(block);
    return cudaSuccess;
  });
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  const Lock lock(runtime().mutex);
  *attributes = {};
  const int device = runtime().device_of(address);
  attributes->type = device >= 0 ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  attributes->device = device;
  if (device >= 0) attributes->devicePointer = const_cast<void*>(address);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return copy_async(to, from, bytes, kind, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return unless_capturing([&] {
    copy_async(to, from, bytes, kind, nullptr);
    runtime().null_stream().finish();
    return cudaSuccess;
  });
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  runtime().stream(handle).add([=] {
    Runtime& r = runtime();
    r.memories[r.device_of(to)].run([&] { memset(to, value, bytes); });
  });
  return cudaSuccess;
}
cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height, cudaStream_t handle) {
  for (size_t row = 0; row < height; ++row) {
    cudaMemsetAsync(static_cast<char*>(to) + row * pitch, value, width, handle);
  }
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return unless_capturing([&] {
    cudaMemsetAsync(to, value, bytes, nullptr);
    runtime().null_stream().finish();
    return cudaSuccess;
  });
}

// Streams and events.

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned) {
  const Lock lock(runtime().mutex);
  auto* stream = new Stream;
  runtime().streams.insert(stream);
  *handle = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* handle) { return cudaStreamCreateWithFlags(handle, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  Stream& stream = runtime().stream(handle);
  stream.finish();
  runtime().streams.erase(&stream);
  delete &stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  return unless_capturing([&] {
    runtime().stream(handle).finish();
    return cudaSuccess;
  });
}
cudaError_t cudaDeviceSynchronize() {
  return unless_capturing([&] {
    runtime().null_stream().finish();
    for (Stream* stream : runtime().streams) stream->finish();
    return cudaSuccess;
  });
}
cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  const Lock lock(runtime().mutex);
  runtime().stream(handle).add([=] { function(data); });
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned) {
  *handle = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }  // streams may still name it
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  auto* event = reinterpret_cast<Event*>(handle);
  event->stream = &runtime().stream(stream);
  const uint64_t number = ++event->recorded;
  event->stream->add([=] { event->reached = number; });
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned) {
  const Lock lock(runtime().mutex);
  auto* event = reinterpret_cast<Event*>(handle);
  const uint64_t number = event->recorded;
  runtime().stream(stream).add([=] { event->wait(number); });
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  return unless_capturing([&] {
    auto* event = reinterpret_cast<Event*>(handle);
    event->wait(event->recorded);
    return cudaSuccess;
  });
}

// Graphs.

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode) {
  const Lock lock(runtime().mutex);
  Stream& stream = runtime().stream(handle);
  if (&stream == &runtime().null_stream() || stream.capture) return result(cudaErrorStreamCaptureUnsupported);
  stream.capture = std::make_shared<Graph>();
  ++runtime().captures;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  const Lock lock(runtime().mutex);
  Stream& stream = runtime().stream(handle);
  if (!stream.capture) return result(cudaErrorIllegalState);
  *graph = reinterpret_cast<cudaGraph_t>(new Graph(*stream.capture));
  stream.capture.reset();
  --runtime().captures;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const Lock lock(runtime().mutex);
  *status = runtime().stream(handle).capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  ++runtime().replays;
  runtime().stream_of_device(handle).add([graph = *reinterpret_cast<Graph*>(executable)] {
    for (const Work& work : graph.nodes) work();
  });
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<Graph*>(executable);
  return cudaSuccess;
}

// Kernels from cubins. None is loaded while a stream is captured.

cudaError_t cudaLibraryLoadData(cudaLibrary_t* library, const void* code, cudaJitOption*, void**, unsigned,
                                cudaLibraryOption*, void**, unsigned) {
  return unless_capturing([&] {
    *library = reinterpret_cast<cudaLibrary_t>(shim::read_cubin(code));
    return *library ? cudaSuccess : cudaErrorInvalidKernelImage;
  });
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t library, const char* name) {
  const void* found = shim::kernel_of(*reinterpret_cast<shim::CudaLibrary*>(library), name);
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(found));
  return found ? cudaSuccess : result(cudaErrorSymbolNotFound);
}
cudaError_t cudaLibraryUnload(cudaLibrary_t) { return cudaSuccess; }  // streams may still run its kernels

// ONNX Runtime's kernels: known by name, never run.

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  const Lock lock(runtime().mutex);
  runtime().kernels[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* entry) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(entry));
  return cudaSuccess;
}
struct CallConfiguration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
static thread_local CallConfiguration configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  const std::string name = runtime().kernels[reinterpret_cast<const void*>(kernel)];
  fprintf(stderr, "runtime_shim: kernel %s on %p\n", name.c_str(), static_cast<void*>(stream));
  return skips() ? cudaSuccess : result(cudaErrorInvalidDeviceFunction);
}

}  // extern "C"
