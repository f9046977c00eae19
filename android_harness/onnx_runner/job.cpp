#include "job.hpp"

#include <filesystem>
#include <fstream>
#include <limits>
#include <set>

namespace caliport {
namespace {

using nlohmann::json;

/// The value's beginning, to show in an error.
std::string shown(const json& value) {
  return value.dump(-1, ' ', false, json::error_handler_t::replace).substr(0, 40);
}

std::int64_t whole(const json& value, const std::string& where, std::int64_t least) {
  const bool fits = value.is_number_integer() &&
                    (!value.is_number_unsigned() ||
                     value.get<std::uint64_t>() <= std::numeric_limits<std::int32_t>::max());
  if (!fits || value.get<std::int64_t>() < least) {
    throw InputError(where + ": found " + shown(value) + ", expected a whole number of " +
                     std::to_string(least) + " or more");
  }
  return value.get<std::int64_t>();
}

std::vector<std::int64_t> wholes(const json& value, const std::string& where, std::int64_t least) {
  if (!value.is_array()) {
    throw InputError(where + ": found " + shown(value) + ", expected a list");
  }
  std::vector<std::int64_t> found;
  for (const json& each : value) {
    found.push_back(whole(each, where, least));
  }
  return found;
}

std::string text(const json& value, const std::string& where) {
  if (!value.is_string()) {
    throw InputError(where + ": found " + shown(value) + ", expected a text");
  }
  return value.get<std::string>();
}

/// An object's fields, each of which must be asked for before `done`.
class Fields {
 public:
  Fields(const json& object, const std::string& where) : object_(object), where_(where) {
    if (!object.is_object()) {
      throw InputError(where + ": found " + shown(object) + ", expected an object");
    }
  }

  std::string place(const std::string& name) const { return where_ + ": " + name; }

  /// A field, or null where it is missing or null itself.
  const json* find(const std::string& name) {
    asked_.insert(name);
    const auto found = object_.find(name);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  const json& need(const std::string& name) {
    const json* found = find(name);
    if (found == nullptr) {
      throw InputError(place(name) + ": missing, expected a value");
    }
    return *found;
  }

  std::int64_t whole_or(const std::string& name, std::int64_t fallback, std::int64_t least) {
    const json* found = find(name);
    return found == nullptr ? fallback : whole(*found, place(name), least);
  }

  std::vector<std::int64_t> wholes_or_none(const std::string& name) {
    const json* found = find(name);
    return found == nullptr ? std::vector<std::int64_t>() : wholes(*found, place(name), 0);
  }

  void done() const {
    for (const auto& field : object_.items()) {
      if (asked_.count(field.key()) == 0) {
        throw InputError(place(field.key()) + ": unknown field, expected those of version 1");
      }
    }
  }

 private:
  const json& object_;
  std::string where_;
  std::set<std::string> asked_;
};

std::vector<std::int64_t> some(Fields& fields, const std::string& name, std::int64_t least) {
  const auto found = wholes(fields.need(name), fields.place(name), least);
  if (found.empty()) {
    throw InputError(fields.place(name) + ": found none, expected at least one");
  }
  return found;
}

Prompt read_prompt(const json& value, const std::string& where) {
  Fields fields(value, where);
  Prompt prompt;
  prompt.tokens = some(fields, "tokens", 0);
  prompt.targets = fields.wholes_or_none("targets");
  if (const json* write = fields.find("write")) {
    if (!write->is_boolean()) {
      throw InputError(fields.place("write") + ": found " + shown(*write) +
                       ", expected true or false");
    }
    prompt.write = write->get<bool>();
  }
  fields.done();
  return prompt;
}

Timing read_timing(const json& value, const std::string& where) {
  Fields fields(value, where);
  Timing timing;
  timing.prompt_lengths = some(fields, "prompt_lengths", 1);
  timing.new_tokens = whole(fields.need("new_tokens"), fields.place("new_tokens"), 1);
  timing.warmup = fields.whole_or("warmup", timing.warmup, 0);
  timing.repetitions = fields.whole_or("repetitions", timing.repetitions, 1);
  fields.done();
  return timing;
}

}  // namespace

json read_json(const std::string& path) {
  if (std::filesystem::exists(path) && !std::filesystem::is_regular_file(path)) {
    throw InputError(path + ": not a regular file, expected a JSON file");  // a pipe would wait
  }
  std::ifstream stream(path);
  if (!stream) {
    throw InputError(path + ": cannot be read, expected a JSON file");
  }
  try {
    return json::parse(stream);
  } catch (const json::exception& error) {
    throw InputError(path + ": not JSON (" + error.what() + ")");
  }
}

Job read_job(const std::string& path) {
  const json file = read_json(path);
  Fields fields(file, path);
  if (const std::int64_t version = fields.whole_or("version", 1, 0); version != 1) {
    throw InputError(fields.place("version") + ": found " + std::to_string(version) +
                     ", expected 1");
  }
  const std::string runtime = text(fields.need("runtime"), fields.place("runtime"));
  if (runtime != "onnx") {
    throw InputError(fields.place("runtime") + ": found " + runtime + ", expected onnx");
  }
  Job job;
  job.directory = text(fields.need("directory"), fields.place("directory"));
  if (const json* adapter = fields.find("adapter")) {
    job.adapter = text(*adapter, fields.place("adapter"));
  }
  job.threads = whole(fields.need("threads"), fields.place("threads"), 1);
  job.cores = fields.wholes_or_none("cores");
  job.ends = fields.wholes_or_none("ends");
  job.max_new_tokens = whole(fields.need("max_new_tokens"), fields.place("max_new_tokens"), 1);
  job.top = fields.whole_or("top", job.top, 1);
  if (const json* prompts = fields.find("prompts")) {
    if (!prompts->is_array()) {
      throw InputError(fields.place("prompts") + ": found " + shown(*prompts) +
                       ", expected a list");
    }
    for (std::size_t i = 0; i < prompts->size(); ++i) {
      const std::string where = fields.place("prompts") + "." + std::to_string(i);
      job.prompts.push_back(read_prompt((*prompts)[i], where));
    }
  }
  if (const json* timing = fields.find("timing")) {
    job.timing = read_timing(*timing, fields.place("timing"));
  }
  fields.done();
  return job;
}

}  // namespace caliport
