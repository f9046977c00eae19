// An ONNX artifact: tokens in, logits of the last token out. The same as validation/onnx_runner.py.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "job.hpp"

namespace caliport {

/// Logits [vocabulary] after one token; valid until the decoder reads more.
struct Logits {
  const float* data;
  std::int64_t size;
};

class Decoder {
 public:
  /// Open the graph that `directory`/genai_config.json names, and read one token with it.
  /// `adapter` is a file within `directory`. InputError where that fails.
  Decoder(const std::string& directory, const std::optional<std::string>& adapter,
          std::int64_t threads);

  /// Forget what came before and read `tokens`; logits after the last.
  Logits prefill(const Tokens& tokens);

  /// Read more tokens; logits after the last. InputError where the context has no room for them.
  Logits extend(const Tokens& tokens);

  /// Tokens of the prompt and after it for which there is room.
  std::int64_t context() const { return context_; }

  std::int64_t vocabulary() const { return vocabulary_; }

 private:
  void reset();

  Ort::Env environment_;
  Ort::Session session_{nullptr};
  Ort::LoraAdapter adapter_{nullptr};
  Ort::RunOptions options_;
  Ort::MemoryInfo memory_;
  std::string directory_;
  std::int64_t context_ = 0;
  std::int64_t vocabulary_ = 0;
  std::int64_t length_ = 0;
  bool positions_ = false;
  std::vector<std::int64_t> empty_shape_;
  std::vector<std::string> inputs_;   // caches first, then ids, mask and perhaps positions
  std::vector<std::string> outputs_;  // logits first, then caches
  std::vector<Ort::Value> caches_;
  Ort::Value logits_{nullptr};
};

}  // namespace caliport
