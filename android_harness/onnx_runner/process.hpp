// What the system knows of this process.
#pragma once

#include <cstdint>
#include <vector>

namespace caliport {

/// Stay on these cores, threads to come included; none leaves that to the system.
/// InputError where not all of them may be used.
void stay_on(const std::vector<std::int64_t>& cores);

/// Cores that this process may run on.
std::vector<std::int64_t> cores_allowed();

/// Resident memory at its highest so far, bytes (VmHWM).
std::int64_t peak_bytes();

}  // namespace caliport
