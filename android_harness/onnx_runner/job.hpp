// What the runner is asked: android_harness/job.py describes each field.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace caliport {

using Tokens = std::vector<std::int64_t>;

/// A wrong input; its text is one line that says what was found, where, and what would be right.
struct InputError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Prompt {
  Tokens tokens;
  Tokens targets;
  bool write = true;
};

struct Timing {
  std::vector<std::int64_t> prompt_lengths;
  std::int64_t new_tokens = 1;
  std::int64_t warmup = 1;
  std::int64_t repetitions = 5;
};

struct Job {
  std::string directory;
  std::optional<std::string> adapter;
  std::int64_t threads = 1;
  std::vector<std::int64_t> cores;
  Tokens ends;
  std::int64_t max_new_tokens = 1;
  std::int64_t top = 10;
  std::vector<Prompt> prompts;
  std::optional<Timing> timing;
};

/// A file as JSON; InputError where it cannot be read or is none.
nlohmann::json read_json(const std::string& path);

/// A job file; InputError at the first field that is missing, unknown or wrong.
Job read_job(const std::string& path);

}  // namespace caliport
