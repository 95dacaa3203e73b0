// Holds ort/abi.h against ONNX Runtime's official headers; compiled by a test where they are found, never linked.
#include <onnxruntime_c_api.h>

#include <cstddef>

#include "ort/abi.h"

namespace {

using skv::ort::AllocatorType;
using skv::ort::AttributeType;
using skv::ort::Characteristic;
using skv::ort::CustomOp;
using skv::ort::ElementType;
using skv::ort::ErrorCode;
using skv::ort::MemoryType;
using skv::ort::PathChar;
using skv::ort::Severity;

// Two function types are alike when each parameter and the result have one size and are pointers, or not, alike: the
// official enums and structs have other names than ours.
template <class A, class B>
constexpr bool alike() {
  if constexpr (std::is_void_v<A> || std::is_void_v<B>) {
    return std::is_void_v<A> && std::is_void_v<B>;
  } else {
    return sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>;
  }
}
template <class A, class B>
struct AlikeFunctions : std::false_type {};
template <class R, class... P, class S, class... Q>
struct AlikeFunctions<R (*)(P...), S (*)(Q...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(P) != sizeof...(Q))
      return false;
    else
      return alike<R, S>() && (alike<P, Q>() && ...);
  }();
};
template <class F>
struct WithoutNoexcept {
  using type = F;
};
template <class R, class... P>
struct WithoutNoexcept<R (*)(P...) noexcept> {
  using type = R (*)(P...);
};

#define SKV_CHECK(position, name, ...)                                                                                 \
  static_assert(offsetof(OrtApi, name) == (position) * sizeof(void*), #name ": position");                             \
  static_assert(AlikeFunctions<WithoutNoexcept<decltype(OrtApi::name)>::type, std::add_pointer_t<__VA_ARGS__>>::value, \
                #name ": parameters");
SKV_ORT_API_1_21(SKV_CHECK)
#if ORT_API_VERSION >= 24
SKV_ORT_API_1_24(SKV_CHECK)
#endif

#define SKV_CHECK_MEMBER(name) \
  static_assert(offsetof(::OrtCustomOp, name) == offsetof(CustomOp, name), "OrtCustomOp::" #name)
SKV_CHECK_MEMBER(version);
SKV_CHECK_MEMBER(CreateKernel);
SKV_CHECK_MEMBER(GetName);
SKV_CHECK_MEMBER(GetExecutionProviderType);
SKV_CHECK_MEMBER(GetInputType);
SKV_CHECK_MEMBER(GetInputTypeCount);
SKV_CHECK_MEMBER(GetOutputType);
SKV_CHECK_MEMBER(GetOutputTypeCount);
SKV_CHECK_MEMBER(KernelCompute);
SKV_CHECK_MEMBER(KernelDestroy);
SKV_CHECK_MEMBER(GetInputCharacteristic);
SKV_CHECK_MEMBER(GetOutputCharacteristic);
SKV_CHECK_MEMBER(GetInputMemoryType);
SKV_CHECK_MEMBER(GetVariadicInputMinArity);
SKV_CHECK_MEMBER(GetVariadicInputHomogeneity);
SKV_CHECK_MEMBER(GetVariadicOutputMinArity);
SKV_CHECK_MEMBER(GetVariadicOutputHomogeneity);
SKV_CHECK_MEMBER(CreateKernelV2);
SKV_CHECK_MEMBER(KernelComputeV2);
SKV_CHECK_MEMBER(InferOutputShapeFn);
SKV_CHECK_MEMBER(GetStartVersion);
SKV_CHECK_MEMBER(GetEndVersion);
SKV_CHECK_MEMBER(GetMayInplace);
SKV_CHECK_MEMBER(ReleaseMayInplace);
SKV_CHECK_MEMBER(GetAliasMap);
SKV_CHECK_MEMBER(ReleaseAliasMap);

#define SKV_CHECK_VALUE(ours, official) static_assert(static_cast<int>(ours) == static_cast<int>(official), #official)
SKV_CHECK_VALUE(ErrorCode::kFail, ORT_FAIL);
SKV_CHECK_VALUE(ErrorCode::kInvalidArgument, ORT_INVALID_ARGUMENT);
SKV_CHECK_VALUE(ErrorCode::kRuntimeException, ORT_RUNTIME_EXCEPTION);
SKV_CHECK_VALUE(ErrorCode::kNotImplemented, ORT_NOT_IMPLEMENTED);
SKV_CHECK_VALUE(ElementType::kUndefined, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED);
SKV_CHECK_VALUE(ElementType::kFloat, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
SKV_CHECK_VALUE(ElementType::kUint8, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
SKV_CHECK_VALUE(ElementType::kInt32, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
SKV_CHECK_VALUE(ElementType::kInt64, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
SKV_CHECK_VALUE(ElementType::kFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
SKV_CHECK_VALUE(ElementType::kBfloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
SKV_CHECK_VALUE(AttributeType::kInt, ORT_OP_ATTR_INT);
SKV_CHECK_VALUE(AttributeType::kInts, ORT_OP_ATTR_INTS);
SKV_CHECK_VALUE(AttributeType::kFloat, ORT_OP_ATTR_FLOAT);
SKV_CHECK_VALUE(AttributeType::kFloats, ORT_OP_ATTR_FLOATS);
SKV_CHECK_VALUE(AttributeType::kString, ORT_OP_ATTR_STRING);
SKV_CHECK_VALUE(Severity::kVerbose, ORT_LOGGING_LEVEL_VERBOSE);
SKV_CHECK_VALUE(Severity::kInfo, ORT_LOGGING_LEVEL_INFO);
SKV_CHECK_VALUE(Severity::kWarning, ORT_LOGGING_LEVEL_WARNING);
SKV_CHECK_VALUE(Severity::kError, ORT_LOGGING_LEVEL_ERROR);
SKV_CHECK_VALUE(Characteristic::kRequired, INPUT_OUTPUT_REQUIRED);
SKV_CHECK_VALUE(Characteristic::kOptional, INPUT_OUTPUT_OPTIONAL);
SKV_CHECK_VALUE(MemoryType::kCpuInput, OrtMemTypeCPUInput);
SKV_CHECK_VALUE(MemoryType::kDefault, OrtMemTypeDefault);
SKV_CHECK_VALUE(AllocatorType::kArena, OrtArenaAllocator);
static_assert(sizeof(PathChar) == sizeof(ORTCHAR_T), "PathChar");
static_assert(sizeof(::OrtCustomOp) == sizeof(CustomOp), "OrtCustomOp: size");

}  // namespace
