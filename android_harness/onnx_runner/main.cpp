// caliport-onnx JOB RESULT: read a job, run an ONNX artifact with it, write the result.
// android_harness/job.py describes both files.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <numeric>

#include "decoder.hpp"
#include "job.hpp"
#include "process.hpp"

namespace caliport {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

constexpr const char* kName = "caliport-onnx 1";

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// The most likely token, lowest id first among equals.
std::int64_t most_likely(const Logits& logits) {
  return std::max_element(logits.data, logits.data + logits.size) - logits.data;
}

/// The `top` largest logits, largest first, lowest id first among equals, and two checksums.
json row(const Logits& logits, std::int64_t top) {
  const float* data = logits.data;
  std::vector<std::int64_t> ids(logits.size);
  std::iota(ids.begin(), ids.end(), 0);
  if (!std::all_of(data, data + logits.size, [](float x) { return std::isfinite(x); })) {
    throw InputError("logits: found one that is not finite, expected an artifact that computes");
  }
  const auto middle = ids.begin() + std::min(top, logits.size);
  std::partial_sort(ids.begin(), middle, ids.end(), [data](std::int64_t a, std::int64_t b) {
    return data[a] != data[b] ? data[a] > data[b] : a < b;
  });
  ids.erase(middle, ids.end());
  std::vector<float> largest;
  for (const std::int64_t id : ids) {
    largest.push_back(data[id]);
  }
  double sum = 0;
  double exponentials = 0;
  for (std::int64_t i = 0; i < logits.size; ++i) {
    sum += data[i];
    exponentials += std::exp(static_cast<double>(data[i]) - largest.front());
  }
  return {{"ids", ids},
          {"logits", largest},
          {"mean", sum / static_cast<double>(logits.size)},
          {"logsumexp", largest.front() + std::log(exponentials)}};
}

/// Greedy tokens, the ending one included, as `validation.runner.greedy`.
Tokens greedy(Decoder& decoder, const Job& job, const Tokens& prompt) {
  Logits logits = decoder.prefill(prompt);
  const auto room = std::min<std::int64_t>(
      job.max_new_tokens, decoder.context() - static_cast<std::int64_t>(prompt.size()));
  Tokens tokens;
  while (static_cast<std::int64_t>(tokens.size()) < room) {
    tokens.push_back(most_likely(logits));
    const bool ended = std::count(job.ends.begin(), job.ends.end(), tokens.back()) > 0;
    if (ended || static_cast<std::int64_t>(tokens.size()) == room) {
      break;
    }
    logits = decoder.extend({tokens.back()});
  }
  return tokens;
}

json answer(Decoder& decoder, const Job& job, const Prompt& prompt) {
  json rows = json::array();
  for (std::size_t i = 0; i < prompt.targets.size(); ++i) {
    const Logits logits =
        i == 0 ? decoder.prefill(prompt.tokens) : decoder.extend({prompt.targets[i - 1]});
    rows.push_back(row(logits, job.top));
  }
  json tokens;
  if (prompt.write) {
    tokens = greedy(decoder, job, prompt.tokens);
  }
  return {{"tokens", tokens}, {"rows", rows}};
}

/// One timed answer; ends are ignored.
json turn(Decoder& decoder, std::int64_t length, std::int64_t new_tokens) {
  Tokens prompt(length);
  for (std::int64_t i = 0; i < length; ++i) {
    prompt[i] = i % std::min<std::int64_t>(256, decoder.vocabulary());
  }
  auto start = Clock::now();
  std::int64_t token = most_likely(decoder.prefill(prompt));
  const double first = seconds_since(start);
  std::vector<double> steps;
  for (std::int64_t i = 1; i < new_tokens; ++i) {
    start = Clock::now();
    token = most_likely(decoder.extend({token}));
    steps.push_back(seconds_since(start));
  }
  return {{"prompt_tokens", length}, {"first_token_seconds", first}, {"step_seconds", steps}};
}

json turns(Decoder& decoder, const Timing& timing) {
  json found = json::array();
  for (std::int64_t i = -timing.warmup; i < timing.repetitions; ++i) {
    for (const std::int64_t length : timing.prompt_lengths) {
      json one = turn(decoder, length, timing.new_tokens);
      if (i >= 0) {
        found.push_back(std::move(one));
      }
    }
  }
  return found;
}

json result_of(const Job& job) {
  stay_on(job.cores);
  const std::int64_t idle = peak_bytes();
  const auto start = Clock::now();
  Decoder decoder(job.directory, job.adapter, job.threads);
  const double load = seconds_since(start);
  const std::int64_t loaded = peak_bytes();
  json answers = json::array();
  for (const Prompt& prompt : job.prompts) {
    answers.push_back(answer(decoder, job, prompt));
  }
  json timed = job.timing ? turns(decoder, *job.timing) : json::array();
  return {{"version", 1},
          {"runner", kName},
          {"runtime_version", Ort::GetVersionString()},
          {"threads", job.threads},
          {"cores", cores_allowed()},
          {"load_seconds", load},
          {"idle_bytes", idle},
          {"loaded_bytes", loaded},
          {"peak_bytes", peak_bytes()},
          {"answers", answers},
          {"turns", timed}};
}

/// Whole or not at all: beside, then renamed.
void write(const std::string& path, const json& result) {
  const std::string partial = path + ".partial";
  {
    std::ofstream stream(partial);
    stream << result.dump() << "\n" << std::flush;
    if (stream && std::rename(partial.c_str(), path.c_str()) == 0) {
      return;
    }
  }
  std::remove(partial.c_str());
  throw InputError(path + ": cannot be written, expected a writable place with room");
}

}  // namespace
}  // namespace caliport

int main(int count, char** arguments) {
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // ONNX Runtime's usage events, unless told otherwise
  if (count != 3) {
    std::cerr << "caliport-onnx: " << count - 1 << " arguments, expected JOB RESULT\n";
    return 2;
  }
  try {
    caliport::write(arguments[2], caliport::result_of(caliport::read_job(arguments[1])));
  } catch (const std::exception& error) {
    std::string line = error.what();
    std::replace(line.begin(), line.end(), '\n', ' ');
    std::cerr << "caliport-onnx: " << line << "\n";
    return 2;
  }
  return 0;
}
