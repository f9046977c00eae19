#include "decoder.hpp"

#include <algorithm>
#include <filesystem>
#include <numeric>

namespace caliport {
namespace {

using nlohmann::json;

std::string of_layer(const std::string& pattern, std::int64_t layer) {
  const std::size_t at = pattern.find("%d");
  if (at == std::string::npos) {
    throw InputError(pattern + ": names no layer, expected %d in it");
  }
  return pattern.substr(0, at) + std::to_string(layer) + pattern.substr(at + 2);
}

std::vector<const char*> pointers(const std::vector<std::string>& names) {
  std::vector<const char*> found;
  for (const std::string& name : names) {
    found.push_back(name.c_str());
  }
  return found;
}

/// What `call` gives; an error of ONNX Runtime's becomes an InputError that begins with `problem`.
template <typename Call>
auto guarded(const std::string& problem, Call call) {
  try {
    return call();
  } catch (const Ort::Exception& error) {
    throw InputError(problem + " (" + error.what() + ")");
  }
}

Ort::Session open(const Ort::Env& environment, const std::string& graph, std::int64_t threads) {
  Ort::SessionOptions options;
  options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);  // what fails comes as an exception
  options.SetIntraOpNumThreads(static_cast<int>(threads));
  return guarded(graph + ": ONNX Runtime cannot load it",
                 [&] { return Ort::Session(environment, graph.c_str(), options); });
}

/// Nothing but files and directories lies in an artifact: ONNX Runtime waits for a named pipe.
void check_files(const std::string& directory) {
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    if (!entry.is_regular_file() && !entry.is_directory()) {
      throw InputError(entry.path().string() + ": not a regular file");
    }
  }
}

}  // namespace

Decoder::Decoder(const std::string& directory, const std::optional<std::string>& adapter,
                 std::int64_t threads)
    : environment_(ORT_LOGGING_LEVEL_FATAL, "caliport"),
      memory_(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)),
      directory_(directory) {
  const std::string path = directory + "/genai_config.json";
  const json config = read_json(path);
  check_files(directory);
  std::string graph;
  try {
    const json& model = config.at("model");
    const json& decoder = model.at("decoder");
    const json& inputs = decoder.at("inputs");
    const json& outputs = decoder.at("outputs");
    graph = directory + "/" + decoder.at("filename").get<std::string>();
    context_ = model.at("context_length").get<std::int64_t>();
    empty_shape_ = {1, decoder.at("num_key_value_heads").get<std::int64_t>(), 0,
                    decoder.at("head_size").get<std::int64_t>()};
    outputs_.push_back(outputs.at("logits"));
    const auto layers = decoder.at("num_hidden_layers").get<std::int64_t>();
    for (std::int64_t layer = 0; layer < layers; ++layer) {
      for (const char* kind : {"key", "value"}) {
        const std::string names = std::string(kind) + "_names";
        inputs_.push_back(of_layer(inputs.at("past_" + names), layer));
        outputs_.push_back(of_layer(outputs.at("present_" + names), layer));
      }
    }
    inputs_.push_back(inputs.at("input_ids"));
    inputs_.push_back(inputs.at("attention_mask"));
    positions_ = inputs.contains("position_ids");  // others count inside the graph
    if (positions_) {
      inputs_.push_back(inputs.at("position_ids"));
    }
  } catch (const json::exception& error) {
    throw InputError(path + ": not a generation config (" + error.what() + ")");
  }
  session_ = open(environment_, graph, threads);
  options_.SetRunLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
  if (adapter) {
    const std::string file = directory + "/" + *adapter;
    adapter_ = guarded(file + ": not an adapter of ONNX Runtime",
                       [&] { return Ort::LoraAdapter::CreateLoraAdapter(file, nullptr); });
    options_.AddActiveLoraAdapter(adapter_);
  }
  vocabulary_ = prefill({0}).size;
}

void Decoder::reset() {
  length_ = 0;
  caches_.clear();
  static float nothing = 0;  // a tensor of no elements still asks for an address
  for (std::size_t i = 1; i < outputs_.size(); ++i) {
    caches_.push_back(Ort::Value::CreateTensor(memory_, &nothing, 0, empty_shape_.data(),
                                               empty_shape_.size()));
  }
}

Logits Decoder::prefill(const Tokens& tokens) {
  reset();
  return extend(tokens);
}

Logits Decoder::extend(const Tokens& tokens) {
  const auto count = static_cast<std::int64_t>(tokens.size());
  const std::int64_t end = length_ + count;
  if (count == 0 || end > context_) {
    throw InputError(directory_ + ": " + std::to_string(count) + " tokens after " +
                     std::to_string(length_) + ", expected 1 to " +
                     std::to_string(context_ - length_) + " within its context of " +
                     std::to_string(context_));
  }
  if (const auto most = *std::max_element(tokens.begin(), tokens.end());
      vocabulary_ > 0 && most >= vocabulary_) {
    throw InputError(directory_ + ": token " + std::to_string(most) + ", expected 0 to " +
                     std::to_string(vocabulary_ - 1));
  }
  Tokens ids = tokens;
  Tokens mask(end, 1);
  Tokens positions(count);
  std::iota(positions.begin(), positions.end(), length_);
  const std::int64_t row[] = {1, count};
  const std::int64_t whole[] = {1, end};
  std::vector<Ort::Value> values = std::move(caches_);
  values.push_back(Ort::Value::CreateTensor(memory_, ids.data(), ids.size(), row, 2));
  values.push_back(Ort::Value::CreateTensor(memory_, mask.data(), mask.size(), whole, 2));
  if (positions_) {
    values.push_back(Ort::Value::CreateTensor(memory_, positions.data(), positions.size(), row, 2));
  }
  std::vector<Ort::Value> found = guarded(directory_ + ": ONNX Runtime cannot run it", [&] {
    return session_.Run(options_, pointers(inputs_).data(), values.data(), values.size(),
                        pointers(outputs_).data(), outputs_.size());
  });
  logits_ = std::move(found.front());
  caches_.assign(std::make_move_iterator(found.begin() + 1), std::make_move_iterator(found.end()));
  length_ = end;
  const auto facts = logits_.GetTensorTypeAndShapeInfo();
  const std::vector<std::int64_t> shape = facts.GetShape();
  if (facts.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || shape.size() != 3) {
    throw InputError(directory_ + ": logits are not float32 [1, n, vocabulary], as expected");
  }
  const float* all = logits_.GetTensorData<float>();
  return {all + facts.GetElementCount() - shape.back(), shape.back()};
}

}  // namespace caliport
