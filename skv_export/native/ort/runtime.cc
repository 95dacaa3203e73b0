// Implementation of ort/runtime.h.
#include "ort/runtime.h"

#include <atomic>
#include <mutex>

namespace skv::ort {
namespace {

std::atomic<const Api*> g_api{nullptr};
std::atomic<const void*> g_table{nullptr};

#if defined(_WIN32)
constexpr const PathChar* kFile = L"skv_ops";
#else
constexpr const PathChar* kFile = "skv_ops";
#endif

}  // namespace

const Api& api() { return *g_api.load(std::memory_order_acquire); }

OrtStatus* load_api(const ApiBase* base) {
  const void* table = base->GetApi(kApiVersion);
  if (table == nullptr) {
    const std::string text = std::string("skv: ONNX Runtime's version; got ") + base->GetVersionString() +
                             "; expected at least 1.24. Upgrade onnxruntime.";
    const auto* entries = static_cast<void (*const*)()>(base->GetApi(1));
    return reinterpret_cast<decltype(Api::CreateStatus)>(entries[0])(ErrorCode::kNotImplemented, text.c_str());
  }
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (g_table.load() == table) return nullptr;
  // The table lives as long as the process, and so does its copy: sessions may outlive any static destructor's turn.
  const Api* loaded = new Api(table);
  if (g_api.load() != nullptr) {
    const Api refused(*loaded);
    delete loaded;
    return refused.CreateStatus(ErrorCode::kFail,
                                "skv: this library is already registered with another ONNX Runtime of this process. "
                                "Load a second copy of it for the second runtime.");
  }
  g_api.store(loaded, std::memory_order_release);
  g_table.store(table);
  return nullptr;
}

void fail(const std::string& what, const std::string& got, const std::string& expected, const std::string& fix) {
  std::string text = what;
  if (!got.empty()) text += "; got " + got;
  if (!expected.empty()) text += "; expected " + expected;
  if (!fix.empty()) text += ". " + fix;
  throw Error(ErrorCode::kInvalidArgument, text);
}

void check(OrtStatus* status) {
  if (status == nullptr) return;
  const Error error(api().GetErrorCode(status), api().GetErrorMessage(status));
  api().ReleaseStatus(status);
  throw error;
}

OrtStatus* status_of(const std::exception& error) noexcept {
  const auto* ours = dynamic_cast<const Error*>(&error);
  return api().CreateStatus(ours != nullptr ? ours->code : ErrorCode::kRuntimeException, error.what());
}

const char* type_name(ElementType type) {
  switch (type) {
    case ElementType::kFloat:
      return "float";
    case ElementType::kFloat16:
      return "float16";
    case ElementType::kBfloat16:
      return "bfloat16";
    case ElementType::kUint8:
      return "uint8";
    case ElementType::kInt32:
      return "int32";
    case ElementType::kInt64:
      return "int64";
    case ElementType::kUndefined:
      break;
  }
  return "another type";
}

int64_t Tensor::count() const {
  int64_t count = 1;
  for (size_t i = 0; i < rank; ++i) count *= shape[i];
  return count;
}

std::string Tensor::shape_text() const {
  std::string text = "[";
  for (size_t i = 0; i < rank; ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

Tensor tensor(const OrtValue* value) {
  Tensor result;
  if (value == nullptr) return result;
  check(api().GetTensorElementTypeAndShapeDataReference(value, &result.type, &result.shape, &result.rank));
  // The C API has one accessor; inputs are only read through it.
  check(api().GetTensorMutableData(const_cast<OrtValue*>(value), &result.data));
  return result;
}

Tensor optional_output(OrtKernelContext* context, size_t index, const int64_t* shape, size_t rank) {
  OrtValue* value = nullptr;
  check(api().KernelContext_GetOutput(context, index, shape, rank, &value));
  return value == nullptr ? Tensor{} : tensor(value);
}

Tensor output_tensor(OrtKernelContext* context, size_t index, const int64_t* shape, size_t rank) {
  const Tensor result = optional_output(context, index, shape, rank);
  if (!result) fail("output " + std::to_string(index), "none", "a tensor");
  return result;
}

const OrtMemoryInfo* cpu_memory() {
  static const OrtMemoryInfo* const info = [] {
    OrtMemoryInfo* made = nullptr;
    check(api().CreateCpuMemoryInfo(AllocatorType::kArena, MemoryType::kDefault, &made));
    return made;
  }();
  return info;
}

Handle<OrtValue> cpu_tensor(ElementType type, void* data, const std::vector<int64_t>& shape) {
  size_t bytes = type == ElementType::kInt64 ? 8 : 4;
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  OrtValue* value = nullptr;
  check(api().CreateTensorWithDataAsOrtValue(cpu_memory(), data, bytes, shape.data(), shape.size(), type, &value));
  return Handle<OrtValue>(value);
}

Scratch::~Scratch() {
  for (void* block : blocks_) {
    // A block that can't be given back is no reason to fail a call that has its result.
    if (OrtStatus* status = api().AllocatorFree(allocator_.get(), block)) api().ReleaseStatus(status);
  }
}

void* Scratch::take_bytes(size_t bytes) {
  if (!allocator_) {
    OrtAllocator* allocator = nullptr;
    check(api().KernelContext_GetAllocator(context_, cpu_memory(), &allocator));
    allocator_.reset(allocator);
  }
  void* block = nullptr;
  check(api().AllocatorAlloc(allocator_.get(), bytes > 0 ? bytes : 1, &block));
  if (block == nullptr) throw Error(ErrorCode::kFail, "out of memory: " + std::to_string(bytes) + " bytes of scratch");
  blocks_.push_back(block);
  return block;
}

void parallel_for(OrtKernelContext* context, void (*body)(void*, size_t), size_t count, void* state) {
  if (count == 0) return;
  check(api().KernelContext_ParallelFor(context, body, count, 0, state));
}

Log::Log(const OrtKernelInfo* info) : node_(node_name(info)) {
  check(api().KernelInfo_GetLogger(info, &logger_));
  check(api().Logger_GetLoggingSeverityLevel(logger_, &least_));
}

void Log::write(Severity severity, const std::string& message) const {
  if (!has(severity)) return;
  const std::string text = "skv::QuantizedKVAttention '" + node_ + "': " + message;
  check(api().Logger_LogMessage(logger_, severity, text.c_str(), kFile, 0, "QuantizedKVAttention"));
}

std::string node_name(const OrtKernelInfo* info) {
  size_t bytes = 0;
  check(api().KernelInfo_GetNodeName(info, nullptr, &bytes));
  std::string name(bytes, '\0');
  check(api().KernelInfo_GetNodeName(info, name.data(), &bytes));
  name.resize(bytes > 0 ? bytes - 1 : 0);
  return name;
}

}  // namespace skv::ort
