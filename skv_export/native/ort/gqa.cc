// Implementation of ort/gqa.h.
#include "ort/gqa.h"

namespace skv::ort {
namespace {

Handle<OrtOpAttr> attribute(const char* name, const void* value, AttributeType type) {
  OrtOpAttr* made = nullptr;
  check(api().CreateOpAttr(name, value, 1, type, &made));
  return Handle<OrtOpAttr>(made);
}

OrtStatus* create(const OrtKernelInfo* info, const Attributes& a, ElementType type, int64_t no_window, OrtOp** op) {
  const int64_t num_heads = a.num_heads, kv_num_heads = a.kv_num_heads;
  const int64_t window = a.key_layout.local_window_size > 0 ? a.key_layout.local_window_size : no_window;
  const Handle<OrtOpAttr> attributes[] = {
      attribute("num_heads", &num_heads, AttributeType::kInt),
      attribute("kv_num_heads", &kv_num_heads, AttributeType::kInt),
      attribute("local_window_size", &window, AttributeType::kInt),
      attribute("scale", &a.scale, AttributeType::kFloat),
      attribute("softcap", &a.softcap, AttributeType::kFloat),
  };
  std::vector<const OrtOpAttr*> pointers;
  for (const auto& handle : attributes) pointers.push_back(handle.get());
  const char* type_names[] = {"T", "M", "T_CACHE", "T_KV_SCALE"};
  const ElementType types[] = {type, ElementType::kInt32, type, ElementType::kFloat};
  // The cache's types are constraints of their own since it can be quantized; before (1.24) there are the first two.
  OrtStatus* status = nullptr;
  for (const int num_types : {4, 2}) {
    if (status != nullptr) api().ReleaseStatus(status);
    status = api().CreateOp(info, "GroupQueryAttention", "com.microsoft", 1, type_names, types, num_types,
                            pointers.data(), static_cast<int>(pointers.size()), kGqaInputs, kGqaOutputs, op);
    if (status == nullptr) break;
  }
  return status;
}

}  // namespace

Handle<OrtOp> make_gqa(const OrtKernelInfo* info, const Attributes& attributes, ElementType type, const Log& log,
                       int64_t no_window) {
  OrtOp* op = nullptr;
  if (OrtStatus* status = create(info, attributes, type, no_window, &op)) {
    log.write(Severity::kWarning,
              std::string("prompts take the slower path of the op's own kernel, as this ONNX Runtime gives no "
                          "GroupQueryAttention: ") +
                  api().GetErrorMessage(status));
    api().ReleaseStatus(status);
  }
  return Handle<OrtOp>(op);
}

}  // namespace skv::ort
