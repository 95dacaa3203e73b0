// Generates with an exported folder and nothing but ONNX Runtime: token ids in, token ids out, greedy.
//
//   skv_generate FOLDER LIBSKV_OPS MAX_NEW_TOKENS ID [ID ...]
//
// A tokenizer is left to the application: any that reads the folder's tokenizer.json will do.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <iterator>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "json.h"

namespace {

// What skv_config.json says of the model.
struct Model {
  struct Cache {
    std::string name;  // "0.key"
    int64_t heads;
    Json layout;

    // The cache tensor's rows for so many tokens: tiles of quantized tokens, then the full-precision rows.
    int64_t rows(int64_t max_length) const {
      const Json& shape = layout["shape"];
      const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
      const int64_t beyond = std::max<int64_t>(0, max_length - shape["full_rows"].integer() + 1);
      int64_t tiles = up(beyond, layout["tile_tokens"].integer());
      const int64_t most = shape["max_tiles"].integer();  // of a layer with a sliding window
      if (most > 0) tiles = std::min(tiles, most);
      return up(tiles * shape["tile_bytes"].integer() + shape["full_bytes"].integer(), shape["width"].integer());
    }

    int64_t width() const { return layout["shape"]["width"].integer(); }
  };

  // What a recurrent layer keeps instead of keys and values.
  struct State {
    std::string name;  // "0.conv"
    std::vector<int64_t> shape;
  };

  std::vector<Cache> caches;
  std::vector<State> states;
  std::set<int64_t> ends;
  int64_t context_length, vocab_size;
  bool all_logits;

  static Model load(const std::string& folder) {
    const std::string path = folder + "/skv_config.json";
    std::ifstream file(path);
    if (!file) throw std::runtime_error(path + ": can't be read; expected a folder written by `skv-export model`");
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    const Json config = Json::parse(text);
    if (config["format_version"].integer() != 1) throw std::runtime_error(path + ": expected format_version 1");
    Model model;
    for (const Json& layer : config["layers"].items())
      for (const char* part : {"key", "value"})
        model.caches.push_back({std::to_string(layer["layer"].integer()) + "." + part,
                                layer["num_key_value_heads"].integer(), layer[part]});
    for (const Json& state : config["states"].items()) {
      std::vector<int64_t> shape = {1};
      for (const Json& size : state["shape"].items()) shape.push_back(size.integer());
      model.states.push_back({std::to_string(state["layer"].integer()) + "." + state["name"].text(), shape});
    }
    for (const Json& end : config["eos_token_id"].items()) model.ends.insert(end.integer());
    model.context_length = config["context_length"].integer();
    model.vocab_size = config["vocab_size"].integer();
    model.all_logits = config["logits"].text() == "all";
    return model;
  }
};

// One sequence: the session and the buffers that it updates in place.
class Sequence {
 public:
  Sequence(const Model& model, Ort::Session& session, int64_t max_length)
      : model_(model), session_(session), binding_(session) {
    Ort::AllocatorWithDefaultOptions allocator;
    for (const Model::Cache& cache : model.caches) {
      const int64_t shape[] = {1, cache.heads, cache.rows(max_length), cache.width()};
      buffers_.push_back(Ort::Value::CreateTensor(allocator, shape, 4, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8));
      // The same buffer as past and as present: nothing is copied. Its first content does not matter.
      binding_.BindInput(("past_key_values." + cache.name).c_str(), buffers_.back());
      binding_.BindOutput(("present." + cache.name).c_str(), buffers_.back());
    }
    for (const Model::State& state : model.states) {
      const auto kind = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
      buffers_.push_back(Ort::Value::CreateTensor(allocator, state.shape.data(), state.shape.size(), kind));
      const size_t count = buffers_.back().GetTensorTypeAndShapeInfo().GetElementCount();
      std::fill_n(buffers_.back().GetTensorMutableData<float>(), count, 0.0f);
      binding_.BindInput(("past_state." + state.name).c_str(), buffers_.back());
      binding_.BindOutput(("present_state." + state.name).c_str(), buffers_.back());
    }
    for (size_t i = 0; i < session.GetInputCount(); ++i)
      inputs_.insert(session.GetInputNameAllocated(i, allocator).get());
  }

  // Appends tokens and returns the likeliest next one.
  int64_t run(std::vector<int64_t> tokens) {
    const auto count = static_cast<int64_t>(tokens.size());
    std::vector<int64_t> positions(tokens.size()), mask(static_cast<size_t>(length_ + count), 1);
    for (int64_t i = 0; i < count; ++i) positions[static_cast<size_t>(i)] = length_ + i;
    std::vector<float> logits(static_cast<size_t>((model_.all_logits ? count : 1) * model_.vocab_size));
    bind("input_ids", tokens);
    bind("attention_mask", mask);
    bind("position_ids", positions);
    const int64_t shape[] = {1, model_.all_logits ? count : 1, model_.vocab_size};
    binding_.BindOutput("logits", Ort::Value::CreateTensor<float>(memory_, logits.data(), logits.size(), shape, 3));
    session_.Run(Ort::RunOptions{nullptr}, binding_);
    length_ += count;
    const auto last = logits.end() - model_.vocab_size;
    return std::max_element(last, logits.end()) - last;
  }

 private:
  // Some graphs count positions themselves and have no such input.
  void bind(const char* name, std::vector<int64_t>& values) {
    if (inputs_.count(name) == 0) return;
    const int64_t shape[] = {1, static_cast<int64_t>(values.size())};
    binding_.BindInput(name, Ort::Value::CreateTensor<int64_t>(memory_, values.data(), values.size(), shape, 2));
  }

  const Model& model_;
  Ort::Session& session_;
  Ort::IoBinding binding_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<Ort::Value> buffers_;
  std::set<std::string> inputs_;
  int64_t length_ = 0;
};

int64_t number(const std::string& text) {
  size_t end = 0;
  const int64_t value = std::stoll(text, &end);
  if (end != text.size()) throw std::invalid_argument(text);
  return value;
}

int generate(const std::string& folder, const std::string& library, int64_t max_new_tokens,
             const std::vector<int64_t>& prompt) {
  if (max_new_tokens < 1) throw std::runtime_error("MAX_NEW_TOKENS: expected at least 1");
  const Model model = Model::load(folder);
  for (const int64_t token : prompt)
    if (token < 0 || token >= model.vocab_size)
      throw std::runtime_error("token " + std::to_string(token) + ": expected 0 ... " +
                               std::to_string(model.vocab_size - 1));
  const int64_t length = static_cast<int64_t>(prompt.size()) + max_new_tokens;
  if (length > model.context_length)
    throw std::runtime_error(std::to_string(length) + " tokens: expected at most the model's context of " +
                             std::to_string(model.context_length));

  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "skv_generate");
  Ort::SessionOptions options;
  options.RegisterCustomOpsLibrary(library.c_str());
  Ort::Session session(env, (folder + "/model.onnx").c_str(), options);

  Sequence sequence(model, session, length);
  std::vector<int64_t> tokens = prompt;
  for (int64_t i = 0; i < max_new_tokens; ++i) {
    const int64_t next = sequence.run(std::move(tokens));
    std::cout << next << (i + 1 < max_new_tokens ? " " : "") << std::flush;
    if (model.ends.count(next) != 0) break;
    tokens = {next};
  }
  std::cout << std::endl;
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) {
    std::cerr << "usage: skv_generate FOLDER LIBSKV_OPS MAX_NEW_TOKENS ID [ID ...]\n";
    return 2;
  }
  try {
    std::vector<int64_t> prompt;
    for (int i = 4; i < argc; ++i) prompt.push_back(number(argv[i]));
    return generate(argv[1], argv[2], number(argv[3]), prompt);
  } catch (const std::invalid_argument& error) {
    std::cerr << "error: not a number: " << error.what() << "\n";
  } catch (const std::exception& error) {  // ONNX Runtime's errors are among them
    std::cerr << "error: " << error.what() << "\n";
  }
  return 1;
}
