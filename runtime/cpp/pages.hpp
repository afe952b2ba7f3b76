// Which pages of memory the weights lie on: the C++ side of runtime/pages.py. Huge ones: each token reads all weights,
// and on pages of 4 KiB a tenth of that goes into finding pages; onnxruntime does not ask Linux for larger ones. And
// once: onnxruntime keeps scales of which it has packed copies mapped. Nothing depends on it.
#pragma once

#include <sys/mman.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace autosteer {

/// What is loaded between its construction and `place`.
class Pages {
 public:
  Pages() : before_(filled()) {}
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

  /// Give back what was mapped of the files in `folder`, and move onto huge pages what memory was filled: in a thread
  /// and after kSettled, because it takes from a tenth of a second to more than one, during which the first answer
  /// would wait.
  void place(const std::filesystem::path& folder) {
    std::error_code ignored;
    const std::string files = (std::filesystem::canonical(folder, ignored) / "").string();
    for (const Mapping& mapping : mappings()) {
      if (mapping.name.compare(0, files.size(), files) == 0 && mapping.changed == 0) {
        madvise(at(mapping.start), mapping.end - mapping.start, MADV_DONTNEED);
      }
    }
    mover_ = std::thread([this, before = std::move(before_)] {
      std::unique_lock lock(mutex_);
      if (woken_.wait_for(lock, kSettled, [this] { return over_; })) return;
      for (const auto& [start, end] : filled()) {
        if (before.count({start, end}) == 0) move(start, end);
      }
    });
  }

 private:
  using Ranges = std::set<std::pair<uintptr_t, uintptr_t>>;  // start, end

  /// An entry of /proc/self/smaps; sizes in KiB.
  struct Mapping {
    uintptr_t start = 0, end = 0;
    std::string mode, name;  // a file's path; "", "[heap]" or "[anon...]" for memory of no file
    unsigned long resident = 0;
    unsigned long changed = 0;  // of a file's: no longer what the file says
  };

  static constexpr std::chrono::seconds kSettled{2};
  static constexpr uintptr_t kHuge = 2U << 20U;  // bytes
  static constexpr int kCollapse = 25;           // MADV_COLLAPSE, Linux 6.1: moves what is there at once

  static std::vector<Mapping> mappings() {
    std::vector<Mapping> found;
    std::ifstream smaps("/proc/self/smaps");
    for (std::string line; std::getline(smaps, line);) {
      unsigned long start = 0, end = 0;
      char mode[5] = {};
      int name = 0;
      if (std::sscanf(line.c_str(), "%lx-%lx %4s %*s %*s %*s %n", &start, &end, mode, &name) == 3) {
        found.push_back({start, end, mode, line.substr(static_cast<size_t>(name))});
      } else if (!found.empty()) {
        unsigned long size = 0;
        if (std::sscanf(line.c_str(), "Rss: %lu", &size) == 1) found.back().resident = size;
        if (std::sscanf(line.c_str(), "Anonymous: %lu", &size) == 1) found.back().changed += size;
        if (std::sscanf(line.c_str(), "Swap: %lu", &size) == 1) found.back().changed += size;
      }
    }
    return found;
  }

  /// Memory of no file, but for what is in good part untouched: huge pages fill it.
  static Ranges filled() {
    Ranges found;
    for (const Mapping& mapping : mappings()) {
      const bool anonymous =
          mapping.name.empty() || mapping.name == "[heap]" || mapping.name.compare(0, 5, "[anon") == 0;
      if (anonymous && mapping.mode == "rw-p" && mapping.resident << 10U >= (mapping.end - mapping.start) / 10 * 9) {
        found.insert({mapping.start, mapping.end});
      }
    }
    return found;
  }

  static void move(uintptr_t start, uintptr_t end) {
    const uintptr_t first = (start + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
    if (first >= last) return;
    if (madvise(at(first), last - first, kCollapse) != 0) madvise(at(first), last - first, MADV_HUGEPAGE);
  }

  static void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }  // NOLINT: one out of /proc

  Ranges before_;
  std::mutex mutex_;
  std::condition_variable woken_;
  bool over_ = false;
  std::thread mover_;
};

}  // namespace autosteer
