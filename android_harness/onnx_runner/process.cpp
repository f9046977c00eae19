#include "process.hpp"

#include <sched.h>

#include <fstream>
#include <string>

#include "job.hpp"

namespace caliport {

void stay_on(const std::vector<std::int64_t>& cores) {
  if (cores.empty()) {
    return;
  }
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const std::int64_t core : cores) {
    if (core < CPU_SETSIZE) {
      CPU_SET(core, &set);
    }
  }
  const bool held = sched_setaffinity(0, sizeof set, &set) == 0;
  const std::vector<std::int64_t> allowed = cores_allowed();
  for (const std::int64_t core : cores) {
    bool found = false;
    for (const std::int64_t each : allowed) {
      found = found || each == core;
    }
    if (!held || !found) {
      throw InputError("cores: this process cannot stay on all that were asked for, such as " +
                       std::to_string(core) + "; expected cores that are there and online");
    }
  }
}

std::vector<std::int64_t> cores_allowed() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<std::int64_t> cores;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    for (int core = 0; core < CPU_SETSIZE; ++core) {
      if (CPU_ISSET(core, &set)) {
        cores.push_back(core);
      }
    }
  }
  return cores;
}

std::int64_t peak_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM:", 0) == 0) {
      return std::stoll(line.substr(6)) * 1024;  // in kB
    }
  }
  throw InputError("/proc/self/status: no VmHWM, expected Linux or Android");
}

}  // namespace caliport
