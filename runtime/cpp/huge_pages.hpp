// Weights on huge pages: the C++ side of runtime/huge_pages.py. Each token reads all weights, and on pages of 4 KiB a
// tenth of that goes into finding pages; onnxruntime does not ask Linux for larger ones. Nothing depends on it.
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
#include <thread>
#include <utility>

namespace autosteer {

/// Moves onto huge pages what memory was filled between its construction and `move`.
class HugePages {
 public:
  HugePages() : before_(filled()) {}
  HugePages(const HugePages&) = delete;
  HugePages& operator=(const HugePages&) = delete;
  ~HugePages() {
    {
      const std::lock_guard lock(mutex_);
      over_ = true;
    }
    woken_.notify_all();
    if (mover_.joinable()) mover_.join();
  }

  /// Begin, in a thread and after kSettled: it takes from a tenth of a second to more than one, during which the first
  /// answer would wait.
  void move() {
    mover_ = std::thread([this, before = std::move(before_)] {
      std::unique_lock lock(mutex_);
      if (woken_.wait_for(lock, kSettled, [this] { return over_; })) return;
      for (const auto& [start, end] : filled()) {
        const auto known = before.find(start);
        if (known == before.end() || known->second != end) move(start, end);
      }
    });
  }

 private:
  using Mappings = std::map<uintptr_t, uintptr_t>;  // start -> end

  static constexpr std::chrono::seconds kSettled{2};
  static constexpr uintptr_t kHuge = 2U << 20U;  // bytes
  static constexpr int kCollapse = 25;           // MADV_COLLAPSE, Linux 6.1: moves what is there at once

  /// This process's anonymous mappings, but for those in good part untouched: huge pages fill them.
  static Mappings filled() {
    Mappings found;
    std::ifstream smaps("/proc/self/smaps");
    uintptr_t start = 0, end = 0;
    bool anonymous = false;
    for (std::string line; std::getline(smaps, line);) {
      unsigned long first = 0, last = 0, inode = 0, resident = 0;
      char mode[5] = {}, name[16] = {};
      const int fields =
          std::sscanf(line.c_str(), "%lx-%lx %4s %*s %*s %lu %15s", &first, &last, mode, &inode, name);
      if (fields >= 4) {
        start = first, end = last;
        const std::string kind = name;
        anonymous = std::string(mode) == "rw-p" && inode == 0 &&
                    (kind.empty() || kind == "[heap]" || kind.compare(0, 5, "[anon") == 0);
      } else if (anonymous && std::sscanf(line.c_str(), "Rss: %lu", &resident) == 1) {
        if (resident << 10U >= (end - start) / 10 * 9) found[start] = end;
      }
    }
    return found;
  }

  static void move(uintptr_t start, uintptr_t end) {
    const uintptr_t first = (start + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
    if (first >= last) return;
    void* place = reinterpret_cast<void*>(first);  // NOLINT: an address out of /proc
    if (madvise(place, last - first, kCollapse) != 0) madvise(place, last - first, MADV_HUGEPAGE);
  }

  Mappings before_;
  std::mutex mutex_;
  std::condition_variable woken_;
  bool over_ = false;
  std::thread mover_;
};

}  // namespace autosteer
