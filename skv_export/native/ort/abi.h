// ONNX Runtime's C ABI: the entries of the OrtApi table that the op needs, by position, and the OrtCustomOp struct. No
// package index ships the official headers; the table is append-only, so positions hold for every later version.
// ort/abi_check.cc asserts positions, signatures and offsets against the official headers where they are found.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <type_traits>

struct OrtAllocator;
struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtLogger;
struct OrtMemoryInfo;
struct OrtOp;
struct OrtOpAttr;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus;
struct OrtTensorTypeAndShapeInfo;
struct OrtTypeInfo;
struct OrtValue;

namespace skv::ort {

// The lowest API version that has every entry below: ONNX Runtime 1.24.
constexpr uint32_t kApiVersion = 24;

enum class ErrorCode : int32_t { kFail = 1, kInvalidArgument = 2, kRuntimeException = 6, kNotImplemented = 9 };
enum class ElementType : int32_t {
  kUndefined = 0,
  kFloat = 1,
  kUint8 = 2,
  kInt32 = 6,
  kInt64 = 7,
  kFloat16 = 10,
  kBfloat16 = 16,
};
enum class AttributeType : int32_t { kInt = 1, kInts = 2, kFloat = 3, kFloats = 4, kString = 5 };
enum class Severity : int32_t { kVerbose = 0, kInfo = 1, kWarning = 2, kError = 3 };
enum class Characteristic : int32_t { kRequired = 0, kOptional = 1 };
enum class MemoryType : int32_t { kCpuInput = -2, kDefault = 0 };
enum class AllocatorType : int32_t { kArena = 1 };
#if defined(_WIN32)
using PathChar = wchar_t;
#else
using PathChar = char;
#endif

// The struct by which a custom op is described; callbacks as of API version 18, unchanged since.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const void* api, const OrtKernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t index);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t index);
  MemoryType (*GetInputMemoryType)(const CustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  OrtStatus* (*CreateKernelV2)(const CustomOp*, const void* api, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const CustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int** input_index, int** output_index);
  void (*ReleaseMayInplace)(int* input_index, int* output_index);
  size_t (*GetAliasMap)(int** input_index, int** output_index);
  void (*ReleaseAliasMap)(int* input_index, int* output_index);
};

// X(position in OrtApi, name, function type): what is old enough for any header at hand, then what came with 1.24.
// clang-format off
#define SKV_ORT_API_1_21(X)                                                                                           \
  X(0, CreateStatus, OrtStatus*(ErrorCode, const char* message))                                                      \
  X(1, GetErrorCode, ErrorCode(const OrtStatus*))                                                                     \
  X(2, GetErrorMessage, const char*(const OrtStatus*))                                                                \
  X(26, CreateCustomOpDomain, OrtStatus*(const char* name, OrtCustomOpDomain**))                                      \
  X(27, CustomOpDomain_Add, OrtStatus*(OrtCustomOpDomain*, const CustomOp*))                                          \
  X(28, AddCustomOpDomain, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*))                                        \
  X(49, CreateTensorWithDataAsOrtValue,                                                                               \
    OrtStatus*(const OrtMemoryInfo*, void* data, size_t bytes, const int64_t* shape, size_t rank, ElementType,        \
      OrtValue**))                                                                                                    \
  X(51, GetTensorMutableData, OrtStatus*(OrtValue*, void** data))                                                     \
  X(55, CastTypeInfoToTensorInfo, OrtStatus*(const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**))                  \
  X(57, CreateTensorTypeAndShapeInfo, OrtStatus*(OrtTensorTypeAndShapeInfo**))                                        \
  X(58, SetTensorElementType, OrtStatus*(OrtTensorTypeAndShapeInfo*, ElementType))                                    \
  X(59, SetDimensions, OrtStatus*(OrtTensorTypeAndShapeInfo*, const int64_t* dims, size_t rank))                      \
  X(60, GetTensorElementType, OrtStatus*(const OrtTensorTypeAndShapeInfo*, ElementType*))                             \
  X(61, GetDimensionsCount, OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t* rank))                               \
  X(62, GetDimensions, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t* dims, size_t rank))                      \
  X(63, GetSymbolicDimensions, OrtStatus*(const OrtTensorTypeAndShapeInfo*, const char** names, size_t rank))         \
  X(69, CreateCpuMemoryInfo, OrtStatus*(AllocatorType, MemoryType, OrtMemoryInfo**))                                  \
  X(75, AllocatorAlloc, OrtStatus*(OrtAllocator*, size_t bytes, void**))                                              \
  X(76, AllocatorFree, OrtStatus*(OrtAllocator*, void*))                                                              \
  X(85, KernelInfoGetAttribute_float, OrtStatus*(const OrtKernelInfo*, const char* name, float*))                     \
  X(86, KernelInfoGetAttribute_int64, OrtStatus*(const OrtKernelInfo*, const char* name, int64_t*))                   \
  X(87, KernelInfoGetAttribute_string, OrtStatus*(const OrtKernelInfo*, const char* name, char*, size_t* bytes))      \
  X(88, KernelContext_GetInputCount, OrtStatus*(const OrtKernelContext*, size_t*))                                    \
  X(90, KernelContext_GetInput, OrtStatus*(const OrtKernelContext*, size_t index, const OrtValue**))                  \
  X(91, KernelContext_GetOutput,                                                                                      \
    OrtStatus*(OrtKernelContext*, size_t index, const int64_t* shape, size_t rank, OrtValue**))                       \
  X(93, ReleaseStatus, void(OrtStatus*))                                                                              \
  X(94, ReleaseMemoryInfo, void(OrtMemoryInfo*))                                                                      \
  X(96, ReleaseValue, void(OrtValue*))                                                                                \
  X(98, ReleaseTypeInfo, void(OrtTypeInfo*))                                                                          \
  X(99, ReleaseTensorTypeAndShapeInfo, void(OrtTensorTypeAndShapeInfo*))                                              \
  X(132, ReleaseAllocator, void(OrtAllocator*))                                                                       \
  X(162, KernelInfoGetAttributeArray_float, OrtStatus*(const OrtKernelInfo*, const char* name, float*, size_t*))      \
  X(163, KernelInfoGetAttributeArray_int64, OrtStatus*(const OrtKernelInfo*, const char* name, int64_t*, size_t*))    \
  X(193, KernelContext_GetGPUComputeStream, OrtStatus*(const OrtKernelContext*, void** stream))                       \
  X(194, GetTensorMemoryInfo, OrtStatus*(const OrtValue*, const OrtMemoryInfo**))                                    \
  X(211, CreateOpAttr, OrtStatus*(const char* name, const void* data, int count, AttributeType, OrtOpAttr**))         \
  X(212, ReleaseOpAttr, void(OrtOpAttr*))                                                                             \
  X(213, CreateOp,                                                                                                    \
    OrtStatus*(const OrtKernelInfo*, const char* name, const char* domain, int version, const char** type_names,      \
      const ElementType* types, int num_types, const OrtOpAttr* const* attributes, int num_attributes,                \
      int num_inputs, int num_outputs, OrtOp**))                                                                      \
  X(214, InvokeOp,                                                                                                    \
    OrtStatus*(const OrtKernelContext*, const OrtOp*, const OrtValue* const* inputs, int num_inputs,                  \
      OrtValue* const* outputs, int num_outputs))                                                                     \
  X(215, ReleaseOp, void(OrtOp*))                                                                                     \
  X(230, KernelInfo_GetInputCount, OrtStatus*(const OrtKernelInfo*, size_t*))                                         \
  X(234, KernelInfo_GetInputTypeInfo, OrtStatus*(const OrtKernelInfo*, size_t index, OrtTypeInfo**))                  \
  X(244, KernelInfo_GetNodeName, OrtStatus*(const OrtKernelInfo*, char*, size_t* bytes))                              \
  X(245, KernelInfo_GetLogger, OrtStatus*(const OrtKernelInfo*, const OrtLogger**))                                   \
  X(247, Logger_LogMessage,                                                                                           \
    OrtStatus*(const OrtLogger*, Severity, const char* message, const PathChar* file, int line,                       \
      const char* function))                                                                                          \
  X(248, Logger_GetLoggingSeverityLevel, OrtStatus*(const OrtLogger*, Severity*))                                     \
  X(253, KernelContext_GetAllocator, OrtStatus*(const OrtKernelContext*, const OrtMemoryInfo*, OrtAllocator**))       \
  X(267, ShapeInferContext_GetInputCount, OrtStatus*(const OrtShapeInferContext*, size_t*))                           \
  X(268, ShapeInferContext_GetInputTypeShape,                                                                         \
    OrtStatus*(const OrtShapeInferContext*, size_t index, OrtTensorTypeAndShapeInfo**))                               \
  X(269, ShapeInferContext_GetAttribute,                                                                              \
    OrtStatus*(const OrtShapeInferContext*, const char* name, const OrtOpAttr**))                                     \
  X(270, ShapeInferContext_SetOutputTypeShape,                                                                        \
    OrtStatus*(const OrtShapeInferContext*, size_t index, const OrtTensorTypeAndShapeInfo*))                          \
  X(271, SetSymbolicDimensions, OrtStatus*(OrtTensorTypeAndShapeInfo*, const char** names, size_t rank))              \
  X(272, ReadOpAttr, OrtStatus*(const OrtOpAttr*, AttributeType, void* data, size_t bytes, size_t* needed))           \
  X(274, KernelContext_ParallelFor,                                                                                   \
    OrtStatus*(const OrtKernelContext*, void (*body)(void*, size_t), size_t count, size_t num_batches, void*))         \
  X(277, KernelContext_GetScratchBuffer,                                                                              \
    OrtStatus*(const OrtKernelContext*, const OrtMemoryInfo*, size_t bytes, void**))
#define SKV_ORT_API_1_24(X)                                                                                           \
  X(414, GetTensorElementTypeAndShapeDataReference,                                                                   \
    OrtStatus*(const OrtValue*, ElementType*, const int64_t** shape, size_t* rank))
#define SKV_ORT_API(X) SKV_ORT_API_1_21(X) SKV_ORT_API_1_24(X)
// clang-format on

// The entries, typed: `api->InvokeOp(...)`.
struct Api {
#define SKV_ENTRY(position, name, ...) std::add_pointer_t<__VA_ARGS__> name;
  SKV_ORT_API(SKV_ENTRY)
#undef SKV_ENTRY

  // `table` is what OrtApiBase::GetApi(kApiVersion) returned, not null.
  explicit Api(const void* table) {
    const auto* entries = static_cast<void (*const*)()>(table);
#define SKV_ENTRY(position, name, ...) name = reinterpret_cast<decltype(name)>(entries[position]);
    SKV_ORT_API(SKV_ENTRY)
#undef SKV_ENTRY
  }
};

struct ApiBase {
  const void* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

}  // namespace skv::ort
