// Huge pages for the loaded weights, and mapped pages given back. The C++ side of runtime/pages.py, which explains
// both. Linux only; everything works without it.
#pragma once

#include <sys/mman.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <map>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace autosteer {

/// Manages the memory that is loaded between its construction and `place`.
class Pages {
 public:
  Pages() {
    for (const Mapping& mapping : mappings()) before_[mapping.range] = mapping.resident;
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  ~Pages() {
    {
      const std::lock_guard lock(mutex_);
      over_ = true;
    }
    woken_.notify_all();
    if (mover_.joinable()) mover_.join();
  }

  // Addresses come from /proc and may be stale when advice on them is given. No advice used here changes memory's
  // content.

  /// Drop the mapped pages of files that loading has read.
  void give_back() const {
    for (const Mapping& mapping : grown()) mapping.give_back();
  }

  /// Drop mapped pages, and move the memory that loading has filled onto huge pages. A thread moves it after kSettled:
  /// it takes from 0.1 s to more than 1 s, during which the first answer would wait.
  void place() {
    std::vector<Range> now;
    for (const Mapping& mapping : grown()) {
      mapping.give_back();
      if (mapping.is_filled()) now.push_back(mapping.range);
    }
    try {
      mover_ = std::thread([this, now = std::move(now)] {
        std::unique_lock lock(mutex_);
        if (woken_.wait_for(lock, kSettled, [this] { return over_; })) return;
        for (const Range& range : now) move(range);
      });
    } catch (const std::system_error&) {  // the system gives no more threads: everything works without this one
    }
  }

 private:
  using Range = std::pair<uintptr_t, uintptr_t>;  // addresses: first, one past the last

  /// An entry of /proc/self/smaps.
  struct Mapping {
    Range range;
    std::string mode, name;      // a file's path; "", "[heap]" or "[anon...]" for anonymous memory
    unsigned long resident = 0;  // KiB

    /// Drop its pages, if it is a file's.
    void give_back() const {
      if (!name.empty() && name[0] == '/') madvise(at(range.first), range.second - range.first, kPageOut);
    }

    /// Whether it is anonymous memory of which at least 90 % is resident. Huge pages would fill the rest.
    bool is_filled() const {
      const bool anonymous = name.empty() || name == "[heap]" || name.compare(0, 5, "[anon") == 0;
      return anonymous && mode == "rw-p" && resident << 10U >= (range.second - range.first) / 10 * 9;
    }
  };

  static constexpr std::chrono::seconds kSettled{2};
  static constexpr uintptr_t kHuge = 2U << 20U;  // bytes
  static constexpr int kPageOut = 21;            // MADV_PAGEOUT, Linux 5.4
  static constexpr int kCollapse = 25;           // MADV_COLLAPSE, Linux 6.1: moves memory at once

  static std::vector<Mapping> mappings() {
    std::vector<Mapping> found;
    std::ifstream smaps("/proc/self/smaps");
    for (std::string line; std::getline(smaps, line);) {
      unsigned long start = 0, end = 0;
      char mode[5] = {};
      int name = 0;
      if (std::sscanf(line.c_str(), "%lx-%lx %4s %*s %*s %*s %n", &start, &end, mode, &name) == 3) {
        found.push_back({{start, end}, mode, line.substr(static_cast<size_t>(name))});
      } else if (!found.empty()) {
        std::sscanf(line.c_str(), "Rss: %lu", &found.back().resident);
      }
    }
    return found;
  }

  /// Mappings that are new, or of which more is resident than before.
  std::vector<Mapping> grown() const {
    std::vector<Mapping> found;
    for (const Mapping& mapping : mappings()) {
      const auto earlier = before_.find(mapping.range);
      if (earlier == before_.end() || mapping.resident > earlier->second) found.push_back(mapping);
    }
    return found;
  }

  static void move(const Range& range) {
    const uintptr_t first = (range.first + kHuge - 1) / kHuge * kHuge, last = range.second / kHuge * kHuge;
    if (first >= last) return;
    if (madvise(at(first), last - first, kCollapse) != 0) madvise(at(first), last - first, MADV_HUGEPAGE);
  }

  static void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }  // NOLINT: from /proc

  std::map<Range, unsigned long> before_;  // KiB resident
  std::mutex mutex_;
  std::condition_variable woken_;
  bool over_ = false;
  std::thread mover_;
};

}  // namespace autosteer
