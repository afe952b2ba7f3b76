// How many processors this process may use: its affinity, and the CPU limit of its container.
//
// Linux keeps the limit in the cgroup of the process: cpu.max (version 2), cpu.cfs_quota_us and cpu.cfs_period_us
// (version 1). Inside a container the root of /sys/fs/cgroup is the container's own.

#pragma once

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace autosteer {

/// CPUs' worth of time, above 0, that each cgroup of this process may take; nothing for those without a limit.
/// `membership`: /proc/self/cgroup, `root`: where cgroups are mounted.
inline std::vector<double> cpu_limits(const std::filesystem::path& membership, const std::filesystem::path& root) {
  std::vector<double> limits;
  std::ifstream lines(membership);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream fields(line);
    std::string number, controllers, own;
    std::getline(fields, number, ':');
    std::getline(fields, controllers, ':');
    std::getline(fields, own);
    const bool first_version = !controllers.empty();
    if (first_version && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    std::filesystem::path place = first_version ? root / "cpu" : root;
    for (const auto& name : std::filesystem::path("." + own)) {  // a limit of a group holds for the groups in it
      if (name.empty()) continue;  // of "./"
      place /= name;
      double quota = 0, period = 0;
      if (first_version) {
        std::ifstream(place / "cpu.cfs_quota_us") >> quota;
        std::ifstream(place / "cpu.cfs_period_us") >> period;
      } else {
        std::ifstream(place / "cpu.max") >> quota >> period;  // "max 100000": neither is read
      }
      if (quota > 0 && period > 0) limits.push_back(quota / period);  // -1: no limit
    }
  }
  return limits;
}

/// Processors that this process may use; a limit of 1.5 CPUs (docker run --cpus) counts as two.
inline int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int cores = static_cast<int>(std::max(std::thread::hardware_concurrency(), 1U));
  if (sched_getaffinity(0, sizeof set, &set) == 0) cores = std::max(CPU_COUNT(&set), 1);
  for (const double limit : cpu_limits("/proc/self/cgroup", "/sys/fs/cgroup")) {
    cores = static_cast<int>(std::min<double>(cores, std::ceil(limit)));
  }
  return cores;
}

}  // namespace autosteer
