// A C++ wrapper of ONNX Runtime's C API: exceptions instead of statuses, owning handles, tensors, scratch memory, the
// log. Independent of attention; shared by the kernels of all providers.
#pragma once
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort/abi.h"

namespace skv::ort {

// The process's API table; load_api comes first (RegisterCustomOps calls it).
const Api& api();
OrtStatus* load_api(const ApiBase* base);

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& text) : std::runtime_error(text), code(code) {}
  const ErrorCode code;
};

// Throws the error "what; got ...; expected .... fix", the form of every message of this project.
[[noreturn]] void fail(const std::string& what, const std::string& got, const std::string& expected,
                       const std::string& fix = "");

// Throws what a call to ONNX Runtime returned, if it failed.
void check(OrtStatus* status);

// Runs `body` and returns what it throws as a status: nothing is thrown into ONNX Runtime.
OrtStatus* status_of(const std::exception& error) noexcept;
template <class Body>
OrtStatus* guarded(Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    return status_of(error);
  }
}

struct Release {
  void operator()(OrtAllocator* p) const { api().ReleaseAllocator(p); }
  void operator()(OrtMemoryInfo* p) const { api().ReleaseMemoryInfo(p); }
  void operator()(OrtOp* p) const { api().ReleaseOp(p); }
  void operator()(OrtOpAttr* p) const { api().ReleaseOpAttr(p); }
  void operator()(OrtTensorTypeAndShapeInfo* p) const { api().ReleaseTensorTypeAndShapeInfo(p); }
  void operator()(OrtTypeInfo* p) const { api().ReleaseTypeInfo(p); }
  void operator()(OrtValue* p) const { api().ReleaseValue(p); }
};
template <class T>
using Handle = std::unique_ptr<T, Release>;

const char* type_name(ElementType type);

// A tensor of the running call; the shape is ONNX Runtime's memory. Absent optional inputs are null.
struct Tensor {
  void* data = nullptr;
  const int64_t* shape = nullptr;
  size_t rank = 0;
  ElementType type = ElementType::kUndefined;

  explicit operator bool() const { return type != ElementType::kUndefined; }
  int64_t count() const;
  std::string shape_text() const;
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};
Tensor tensor(const OrtValue* value);
Tensor output_tensor(OrtKernelContext* context, size_t index, const int64_t* shape, size_t rank);
// The same; absent where the node leaves it out.
Tensor optional_output(OrtKernelContext* context, size_t index, const int64_t* shape, size_t rank);

// CPU memory from the session's arena, given back when the call ends.
class Scratch {
 public:
  explicit Scratch(const OrtKernelContext* context) : context_(context) {}
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  void* take_bytes(size_t bytes);

  const OrtKernelContext* context_;
  Handle<OrtAllocator> allocator_;
  std::vector<void*> blocks_;
};
const OrtMemoryInfo* cpu_memory();
Handle<OrtValue> cpu_tensor(ElementType type, void* data, const std::vector<int64_t>& shape);

// Runs body(i) for i in [0, count) on the session's threads.
void parallel_for(OrtKernelContext* context, void (*body)(void*, size_t), size_t count, void* state);
template <class Body>
void parallel_for(OrtKernelContext* context, size_t count, const Body& body) {
  if (count == 1) return body(size_t{0});
  const auto call = [](void* state, size_t i) { (*static_cast<const Body*>(state))(i); };
  parallel_for(context, call, count, const_cast<Body*>(&body));
}

// A node's way into its session's log.
class Log {
 public:
  explicit Log(const OrtKernelInfo* info);
  const OrtLogger* session() const { return logger_; }
  bool has(Severity severity) const { return severity >= least_; }
  void write(Severity severity, const std::string& message) const;

 private:
  const OrtLogger* logger_ = nullptr;
  Severity least_ = Severity::kError;
  std::string node_;
};
std::string node_name(const OrtKernelInfo* info);

}  // namespace skv::ort
