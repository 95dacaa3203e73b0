// Checks of a call's inputs, and the callbacks that describe the op to ONNX Runtime.
#include "ort/op.h"

#include <climits>

#include "layout_check.h"

namespace skv::ort {
namespace {

constexpr const char* kInputNames[kNumInputs] = {
    "query",
    "key",
    "value",
    "past_key",
    "past_value",
    "seqlens_k",
    "total_sequence_length",
    "cos_cache",
    "sin_cache",
    "position_ids",
    "attention_bias",
    "head_sink",
    "input 12",
    "input 13",
    "q_norm_weight",
    "k_norm_weight",
    "query_seqlens",
    "key_basis",
    "query_basis",
    "key_feedback",
};
constexpr int64_t kAny = -1;

std::string shape_text(std::initializer_list<int64_t> shape) {
  std::string text = "[";
  for (const int64_t size : shape)
    text += (text.size() > 1 ? ", " : "") + (size == kAny ? "any" : std::to_string(size));
  return text + "]";
}

void expect_shape(const Tensor& tensor, Input input, std::initializer_list<int64_t> shape) {
  bool equal = tensor.rank == shape.size();
  for (size_t i = 0; equal && i < tensor.rank; ++i) {
    const int64_t size = shape.begin()[i];
    equal = size == kAny || size == tensor.shape[i];
  }
  if (!equal) fail(std::string(kInputNames[input]) + ": shape", tensor.shape_text(), shape_text(shape));
  if (tensor.data == nullptr && tensor.count() > 0)
    fail(std::string(kInputNames[input]) + ": data", "null", "a buffer");
}

void expect_type(const Tensor& tensor, Input input, ElementType type) {
  if (tensor.type != type) fail(std::string(kInputNames[input]) + ": type", type_name(tensor.type), type_name(type));
}

class Inputs {
 public:
  explicit Inputs(const OrtKernelContext* context) : context_(context) {
    check(api().KernelContext_GetInputCount(context, &count_));
  }

  Tensor optional(Input input, ElementType type) const {
    if (input >= count_) return {};
    const OrtValue* value = nullptr;
    check(api().KernelContext_GetInput(context_, input, &value));
    if (value == nullptr) return {};
    const Tensor result = tensor(value);
    expect_type(result, input, type);
    return result;
  }

  Tensor required(Input input, ElementType type) const {
    const Tensor result = optional(input, type);
    if (!result) fail(kInputNames[input], "nothing", "a tensor");
    return result;
  }

  void refuse(Input input) const {
    if (input >= count_) return;
    const OrtValue* value = nullptr;
    check(api().KernelContext_GetInput(context_, input, &value));
    if (value != nullptr) {
      fail(kInputNames[input], "a tensor", "nothing", "QuantizedKVAttention masks by lengths only; remove this input.");
    }
  }

 private:
  const OrtKernelContext* context_;
  size_t count_ = 0;
};

int32_t dimension(int64_t size, const char* what) {
  if (size > INT32_MAX) fail(what, std::to_string(size), "at most 2147483647");
  return static_cast<int32_t>(size);
}

// The constants of calibrated keys: all three or none.
SkvKeyBasis read_basis(const Inputs& inputs, const Attributes& attributes) {
  constexpr Input kMatrices[] = {kKeyBasis, kQueryBasis, kKeyFeedback};
  const SkvLayout& layout = attributes.key_layout;
  const float* data[3] = {};
  int given = 0;
  for (int i = 0; i < 3; ++i) {
    const Tensor matrix = inputs.optional(kMatrices[i], ElementType::kFloat);
    if (!matrix) continue;
    if (!can_have_basis(layout)) fail(kInputNames[kMatrices[i]], "a tensor", std::string("nothing, or ") + kBasisForm);
    expect_shape(matrix, kMatrices[i], {attributes.kv_num_heads, padded_dim(layout), padded_dim(layout)});
    data[i] = matrix.as<float>();
    ++given;
  }
  if (given % 3 != 0)
    fail("key_basis, query_basis and key_feedback", std::to_string(given) + " of them", "all or none");
  return {data[0], data[1], data[2]};
}

}  // namespace

Call::Call(OrtKernelContext* context, const Attributes& node_attributes, ElementType node_type)
    : attributes(node_attributes), type(node_type) {
  const Inputs inputs(context);
  for (const Input input : {kAttentionBias, kReserved12, kReserved13}) inputs.refuse(input);
  query = inputs.required(kQuery, type);
  key = inputs.optional(kKey, type);
  value = inputs.optional(kValue, type);
  if (static_cast<bool>(key) != static_cast<bool>(value)) {
    fail("key and value", key ? "a key alone" : "a value alone", "both, or neither with packed QKV");
  }
  packed = !key;

  const int64_t heads = attributes.num_heads + (packed ? 2 * int64_t{attributes.kv_num_heads} : 0);
  if (query.rank != 3 || query.shape[2] % heads != 0) {
    fail("query: shape", query.shape_text(),
         "[batch, tokens, " + std::to_string(heads) + " * head_dim]" + (packed ? " (packed QKV)" : ""));
  }
  attributes.set_head_dim(query.shape[2] / heads);
  batch = dimension(query.shape[0], "query: batch");
  tokens = dimension(query.shape[1], "query: tokens");
  head_dim = attributes.key_layout.head_dim;
  expect_shape(query, kQuery, {batch, tokens, kAny});
  if (key) expect_shape(key, kKey, {batch, tokens, kv_hidden_size()});
  if (value) expect_shape(value, kValue, {batch, tokens, kv_hidden_size()});

  past_key = inputs.required(kPastKey, ElementType::kUint8);
  past_value = inputs.required(kPastValue, ElementType::kUint8);
  expect_shape(past_key, kPastKey, {batch, attributes.kv_num_heads, kAny, kAny});
  expect_shape(past_value, kPastValue, {batch, attributes.kv_num_heads, kAny, kAny});
  seqlens_k = inputs.required(kSeqlensK, ElementType::kInt32);
  expect_shape(seqlens_k, kSeqlensK, {batch});
  total_sequence_length = inputs.required(kTotalSequenceLength, ElementType::kInt32);
  if (total_sequence_length.count() != 1) {
    fail("total_sequence_length: shape", total_sequence_length.shape_text(), "a scalar");
  }
  query_seqlens = inputs.optional(kQuerySeqlens, ElementType::kInt32);
  if (query_seqlens) expect_shape(query_seqlens, kQuerySeqlens, {batch});

  if (attributes.do_rotary) {
    cos_cache = inputs.required(kCosCache, type);
    expect_shape(cos_cache, kCosCache, {kAny, kAny});
    sin_cache = inputs.required(kSinCache, type);
    expect_shape(sin_cache, kSinCache, {cos_cache.shape[0], cos_cache.shape[1]});
    if (2 * cos_cache.shape[1] > head_dim) {
      fail("cos_cache: shape", cos_cache.shape_text(),
           "[positions, at most head_dim / 2 = " + std::to_string(head_dim / 2) + "]");
    }
    position_ids = inputs.optional(kPositionIds, ElementType::kInt64);
    if (position_ids) expect_shape(position_ids, kPositionIds, {batch, tokens});
  }
  head_sink = inputs.optional(kHeadSink, type);
  if (head_sink) expect_shape(head_sink, kHeadSink, {attributes.num_heads});
  q_norm_weight = inputs.optional(kQNormWeight, type);
  if (q_norm_weight) expect_shape(q_norm_weight, kQNormWeight, {head_dim});
  k_norm_weight = inputs.optional(kKNormWeight, type);
  if (k_norm_weight) expect_shape(k_norm_weight, kKNormWeight, {head_dim});
  basis = read_basis(inputs, attributes);
}

CacheBuffers::CacheBuffers(OrtKernelContext* context, const Call& call) {
  const auto present = [&](Output output, const Tensor& past) {
    return optional_output(context, output, past.shape, past.rank);
  };
  const Tensor present_key = present(kPresentKey, call.past_key);
  const Tensor present_value = present(kPresentValue, call.past_value);
  appends = static_cast<bool>(present_key);
  if (appends != static_cast<bool>(present_value)) {
    fail("present_key and present_value", appends ? "the key's alone" : "the value's alone",
         "both, or neither: then nothing is appended");
  }
  key = static_cast<uint8_t*>(appends ? present_key.data : call.past_key.data);
  value = static_cast<uint8_t*>(appends ? present_value.data : call.past_value.data);
}

namespace {

const Definition& self(const CustomOp* op) { return *static_cast<const Definition*>(op); }

ElementType input_type(const CustomOp* op, size_t index) {
  switch (index) {
    case kPastKey:
    case kPastValue:
      return ElementType::kUint8;
    case kSeqlensK:
    case kTotalSequenceLength:
    case kQuerySeqlens:
      return ElementType::kInt32;
    case kPositionIds:
      return ElementType::kInt64;
    case kKeyBasis:
    case kQueryBasis:
    case kKeyFeedback:
      return ElementType::kFloat;
    case kReserved12:
    case kReserved13:
      return ElementType::kUndefined;  // any, so that a call can refuse it by name
    default:
      return self(op).type;
  }
}

Characteristic input_characteristic(const CustomOp*, size_t index) {
  const bool required = index == kQuery || (index >= kPastKey && index <= kTotalSequenceLength);
  return required ? Characteristic::kRequired : Characteristic::kOptional;
}

// A present may take its past's buffer where nothing else reads it.
size_t may_inplace(int** inputs, int** outputs) {
  *inputs = new int[2]{kPastKey, kPastValue};
  *outputs = new int[2]{kPresentKey, kPresentValue};
  return 2;
}
void release_indices(int* inputs, int* outputs) {
  delete[] inputs;
  delete[] outputs;
}

// A tensor's type and shape while the graph is being resolved; unknown and unnamed sizes are -1.
struct InferredShape {
  std::vector<int64_t> sizes;
  std::vector<const char*> names;
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's

  InferredShape(OrtShapeInferContext* context, Input input) {
    check(api().ShapeInferContext_GetInputTypeShape(context, input, &info));
    size_t rank = 0;
    check(api().GetDimensionsCount(info, &rank));
    sizes.resize(rank);
    names.resize(rank);
    check(api().GetDimensions(info, sizes.data(), rank));
    check(api().GetSymbolicDimensions(info, names.data(), rank));
  }

  // Absent inputs and those of unknown shape have rank 0, and a size that is neither known nor named can't be passed
  // on.
  bool known(size_t rank) const {
    if (sizes.size() != rank) return false;
    for (size_t i = 0; i < rank; ++i) {
      if (sizes[i] < 0 && *names[i] == '\0') return false;
    }
    return true;
  }
};

int64_t inferred_attribute(OrtShapeInferContext* context, const char* name) {
  const OrtOpAttr* attribute = nullptr;
  int64_t value = 0;
  size_t bytes = 0;
  check(api().ShapeInferContext_GetAttribute(context, name, &attribute));
  check(api().ReadOpAttr(attribute, AttributeType::kInt, &value, sizeof(value), &bytes));
  return value;
}

// The output of packed QKV: the query's shape with the queries' share of its last dimension.
void infer_unpacked(OrtShapeInferContext* context, const InferredShape& query) {
  const int64_t heads = inferred_attribute(context, "num_heads");
  const int64_t all_heads = heads + 2 * inferred_attribute(context, "kv_num_heads");
  if (query.sizes[2] < 0 || heads < 1 || all_heads <= heads) return;
  const int64_t sizes[] = {query.sizes[0], query.sizes[1], query.sizes[2] / all_heads * heads};
  const char* names[] = {query.names[0], query.names[1], ""};
  ElementType type = ElementType::kUndefined;
  check(api().GetTensorElementType(query.info, &type));
  OrtTensorTypeAndShapeInfo* made = nullptr;
  check(api().CreateTensorTypeAndShapeInfo(&made));
  const Handle<OrtTensorTypeAndShapeInfo> output(made);
  check(api().SetTensorElementType(made, type));
  check(api().SetDimensions(made, sizes, 3));
  check(api().SetSymbolicDimensions(made, names, 3));
  check(api().ShapeInferContext_SetOutputTypeShape(context, kOutput, made));
}

OrtStatus* infer_shapes(const CustomOp*, OrtShapeInferContext* context) {
  return guarded([&] {
    const auto pass_on = [&](const InferredShape& from, Output output, size_t rank) {
      if (from.known(rank)) check(api().ShapeInferContext_SetOutputTypeShape(context, output, from.info));
    };
    const InferredShape query(context, kQuery), key(context, kKey);
    ElementType key_type = ElementType::kUndefined;
    check(api().GetTensorElementType(key.info, &key_type));
    if (key_type != ElementType::kUndefined) {
      pass_on(query, kOutput, 3);
    } else if (query.known(3)) {
      infer_unpacked(context, query);
    }
    pass_on(InferredShape(context, kPastKey), kPresentKey, 4);
    pass_on(InferredShape(context, kPastValue), kPresentValue, 4);
  });
}

OrtStatus* create_kernel(const CustomOp* op, const void*, const OrtKernelInfo* info, void** kernel) {
  return guarded([&] { *kernel = self(op).make(info, self(op).type).release(); });
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  return guarded([&] { static_cast<Kernel*>(kernel)->compute(context); });
}

}  // namespace

void check_status(int status, const char* (*reason)()) {
  if (status == SKV_OK) return;
  const ErrorCode code = status == SKV_INVALID_ARGUMENT ? ErrorCode::kInvalidArgument
                         : status == SKV_NOT_SUPPORTED  ? ErrorCode::kNotImplemented
                                                        : ErrorCode::kRuntimeException;
  throw Error(code, reason());
}

Definition::Definition(const char* provider, ElementType type, Make make)
    : CustomOp{}, provider(provider), type(type), make(make) {
  version = kApiVersion;
  GetName = [](const CustomOp*) { return "QuantizedKVAttention"; };
  GetExecutionProviderType = [](const CustomOp* op) { return self(op).provider; };
  GetInputTypeCount = [](const CustomOp*) { return size_t{kNumInputs}; };
  GetInputType = input_type;
  GetInputCharacteristic = input_characteristic;
  GetInputMemoryType = [](const CustomOp*, size_t index) {
    return index == kTotalSequenceLength ? MemoryType::kCpuInput : MemoryType::kDefault;
  };
  GetOutputTypeCount = [](const CustomOp*) { return size_t{kNumOutputs}; };
  GetOutputType = [](const CustomOp* op, size_t index) {
    return index == kOutput ? self(op).type : ElementType::kUint8;
  };
  GetOutputCharacteristic = [](const CustomOp*, size_t index) {
    return index == kOutput ? Characteristic::kRequired : Characteristic::kOptional;
  };
  GetVariadicInputMinArity = [](const CustomOp*) { return 0; };
  GetVariadicInputHomogeneity = [](const CustomOp*) { return 0; };
  GetVariadicOutputMinArity = [](const CustomOp*) { return 0; };
  GetVariadicOutputHomogeneity = [](const CustomOp*) { return 0; };
  GetStartVersion = [](const CustomOp*) { return 1; };
  GetEndVersion = [](const CustomOp*) { return INT_MAX; };
  CreateKernelV2 = create_kernel;
  KernelComputeV2 = compute;
  KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  InferOutputShapeFn = infer_shapes;
  GetMayInplace = may_inplace;
  ReleaseMayInplace = release_indices;
}

}  // namespace skv::ort
